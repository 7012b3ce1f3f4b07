"""The lens reads what the model's own norm and unembedding would make of its hidden states, whatever the padding."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mechscope.data.pairs import Pairs, PromptPair, collate_pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import Walk, record
from mechscope.instrument.execution import Execution
from mechscope.instrument.readout import Readout
from mechscope.lens import projection as projection_module
from mechscope.lens.logit_lens import _Lens, logit_lens
from mechscope.lens.places import SITES, places_of
from mechscope.lens.reading import CHANGES, LensReading, compare_lenses
from mechscope.stats.inference import benjamini_hochberg
from mechscope.subject.load import Subject, load
from tests import families
from tests.slips import slip
from tests.stats.skewed import mean_test

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
# RMS norms compute in float32 whatever the type
RMS: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
LAYERNORM = ("gpt2", "gpt_neox", "opt", "phi")
VOCABULARY = families.VOCABULARY
LAST = families.LAYERS - 1


def close(family: str) -> dict[str, Any]:
    return CLOSE if family in LAYERNORM else RMS


@pytest.fixture(params=families.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def texts(lengths: tuple[int, ...] = families.LENGTHS) -> Pairs:
    documents = families.documents(lengths=lengths)
    pairs = [PromptPair(f"text {at}", ids, ids, (7, 8), (9,)) for at, ids in enumerate(tuple(text.tolist()) for text in documents)]
    return Pairs(tuple(pairs), "random")


def place(reading: LensReading, component: str) -> int:
    return [one.component for one in reading.places].index(component)


@torch.no_grad()
def test_the_last_layer_reads_as_the_models_own_logits(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts()
    reading = logit_lens(subject, pairs, layers=[LAST], k=VOCABULARY)
    for text, pair in zip(reading.texts, pairs, strict=True):
        expected, tokens = subject.plain(torch.tensor([pair.clean])).logits[0].log_softmax(-1).sort(descending=True)
        assert np.array_equal(text.top[0], tokens.numpy())
        np.testing.assert_allclose(text.top_log_probability[0], expected.numpy(), **close(family))
        assert np.array_equal(text.final_top, tokens[:, 0].numpy())
        np.testing.assert_allclose(text.kl[0], 0.0, atol=1e-9)


@torch.no_grad()
def test_every_layer_reads_as_hugging_faces_hidden_state_through_the_norm_and_the_unembedding(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts()
    anatomy, model = subject.anatomy, subject.plain
    assert anatomy.final_norm is not None
    reading = logit_lens(subject, pairs)
    assert [one.component for one in reading.places] == ["embed", "resid0", "resid1", "resid2"]
    for text, pair in zip(reading.texts, pairs, strict=True):
        output = model(torch.tensor([pair.clean]), output_hidden_states=True)
        final = output.logits[0].log_softmax(-1)
        following = [*pair.clean[1:], 7]
        for layer in range(-1, LAST):  # the last hidden state that Hugging Face gives has met the norm already
            logits = anatomy.unembedding(anatomy.final_norm(output.hidden_states[layer + 1][0]))
            if anatomy.logit_softcap is not None:
                logits = torch.tanh(logits / anatomy.logit_softcap) * anatomy.logit_softcap
            lens = logits.log_softmax(-1)
            own = lens[range(len(following)), following]
            found = place(reading, "embed" if layer < 0 else f"resid{layer}")
            np.testing.assert_allclose(text.log_probability[found], own, **close(family))
            assert text.rank[found].tolist() == [1 + int((row > one).sum()) for row, one in zip(lens, own, strict=True)]
            np.testing.assert_allclose(text.entropy[found], -(lens.exp() * lens).sum(-1), **close(family))
            np.testing.assert_allclose(text.kl[found], (final.exp() * (final - lens)).sum(-1), **close(family))
            np.testing.assert_allclose(text.top_log_probability[found], lens.topk(5).values, **close(family))


@torch.no_grad()
def test_what_attention_and_mlp_add_reads_through_its_own_norm(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts((9,))
    anatomy = subject.anatomy
    assert anatomy.final_norm is not None
    reading = logit_lens(subject, pairs, sites=("mlp_output", "attention_output"), layers=[1], k=VOCABULARY)
    assert [one.component for one in reading.places] == ["a1", "m1"]
    with record(subject, "attention_output", "mlp_output") as seen:
        subject.plain(torch.tensor([pairs.pairs[0].clean]))
    for component, site in (("a1", "attention_output"), ("m1", "mlp_output")):
        logits = anatomy.unembedding(anatomy.final_norm(seen[site, 1][0]))
        if anatomy.logit_softcap is not None:
            logits = torch.tanh(logits / anatomy.logit_softcap) * anatomy.logit_softcap
        expected = logits.log_softmax(-1).sort(descending=True).values
        np.testing.assert_allclose(reading.texts[0].top_log_probability[place(reading, component)], expected, **close(family))


def centred_logits(reading: LensReading, component: str) -> np.ndarray:
    """Return a place's logits of all words by their ids, less their mean: what log-probabilities know of them."""
    text, at = reading.texts[0], place(reading, component)
    logits = np.empty_like(text.top_log_probability[at])
    np.put_along_axis(logits, text.top[at].astype(np.int64), text.top_log_probability[at], axis=1)
    return np.asarray(logits - logits.mean(1, keepdims=True))


@torch.no_grad()
def test_frozen_parts_add_up_to_the_models_logits(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts((9,))
    sites = [site for site in SITES if site != "head_output"]
    reading = logit_lens(subject, pairs, sites=sites, k=VOCABULARY, norm="frozen")
    logits = subject.plain(torch.tensor([pairs.pairs[0].clean])).logits[0]
    cap = subject.anatomy.logit_softcap
    end = centred_logits(reading, "resid2")
    np.testing.assert_allclose(end, (logits - logits.mean(-1, keepdim=True)).numpy(), **close(family))
    if cap is not None:  # the sum is of logits before the cap
        return
    parts = sum(centred_logits(reading, f"{kind}{layer}") for layer in range(families.LAYERS) for kind in "am")
    np.testing.assert_allclose(centred_logits(reading, "embed") + parts, end, **close(family))


@torch.no_grad()
def test_frozen_heads_add_up_to_what_attention_adds(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts((9,))
    reading = logit_lens(subject, pairs, sites=("head_output", "attention_output"), layers=[1], k=VOCABULARY, norm="frozen")
    assert [one.component for one in reading.places] == ["a1", "a1.h0", "a1.h1", "a1.h2", "a1.h3"]
    heads = sum(centred_logits(reading, f"a1.h{head}") for head in range(families.HEADS))
    together = centred_logits(reading, "a1")
    bias = getattr(subject.anatomy.blocks[1].output.module, "bias", None)
    if bias is None:
        np.testing.assert_allclose(heads, together, **close(family))
        return
    readout, end = Readout.of(subject), Walk(subject, torch.tensor([pairs.pairs[0].clean])).run()[0]
    of_bias = (readout.directions(torch.arange(VOCABULARY)) @ bias) * readout.scale(end)  # the projection's bias is no head's
    np.testing.assert_allclose(heads + (of_bias - of_bias.mean(-1, keepdim=True)).numpy(), together, **close(family))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma3", "gemma2"])
def test_padding_never_matters(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts()
    for norm in ("applied", "frozen"):
        lens = _Lens(subject, places_of(subject, SITES), k=3, norm=norm, translators=None, statistics=True)
        alone = [lens.of(collate_pairs([pair]))[0] for pair in pairs]
        for side in ("left", "right"):
            for found, expected in zip(lens.of(collate_pairs(pairs.pairs, padding=side)), alone, strict=True):
                assert found.id == expected.id
                for name in ("log_probability", "rank", "entropy", "kl", "top", "top_log_probability", "final_top"):
                    np.testing.assert_allclose(getattr(found, name), getattr(expected, name), err_msg=f"{side} {name}", **close(family))


def test_batches_change_nothing_and_texts_keep_their_order() -> None:
    subject, pairs = families.subject("gpt2", torch.float64), texts()
    calls: list[tuple[str, int, int]] = []
    one = logit_lens(subject, pairs, sites=SITES)
    other = logit_lens(subject, pairs, sites=SITES, execution=Execution(tokens_per_batch=1, progress=lambda *call: calls.append(call)))
    assert calls == [("lens", 1, 3), ("lens", 2, 3), ("lens", 3, 3)]
    pd.testing.assert_frame_equal(one.table(), other.table(), rtol=1e-9)
    assert [text.id for text in other.texts] == ["text 0", "text 1", "text 2"]


def test_without_statistics_the_likeliest_tokens_are_the_same_and_the_rest_is_missing() -> None:
    subject, pairs = families.subject("gpt2", torch.float64), texts()
    one, other = logit_lens(subject, pairs), logit_lens(subject, pairs, statistics=False)
    for full, bare in zip(one.texts, other.texts, strict=True):
        assert np.array_equal(full.top, bare.top)
        assert np.array_equal(full.log_probability, bare.log_probability)
        assert np.isnan(bare.rank).all()
        assert np.isnan(bare.entropy).all()
        assert np.isnan(bare.kl).all()
        assert (bare.final_top == -1).all()
    assert np.isnan(other.summary()["agreement"]).all()


def test_the_models_own_token_is_known_when_the_last_layer_is_not_read() -> None:
    subject, pairs = families.subject("gpt2", torch.float64), texts()
    one, other = logit_lens(subject, pairs), logit_lens(subject, pairs, layers=[0])
    assert [text.final_top.tolist() for text in one.texts] == [text.final_top.tolist() for text in other.texts]


@torch.no_grad()
def test_an_adapter_is_read_where_it_is_active() -> None:
    model = families.build("llama", torch.float64)
    before = logit_lens(load(families.build("llama", torch.float64)), texts())
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    adapted = load(wrapped.double().eval())
    pd.testing.assert_frame_equal(logit_lens(adapted.without_adapter(), texts()).table(), before.table(), rtol=1e-5)
    own = logit_lens(adapted, texts(), layers=[LAST], k=1).texts[0]
    logits = wrapped(torch.tensor([texts().pairs[0].clean])).logits[0].log_softmax(-1)
    np.testing.assert_allclose(own.top_log_probability[0, :, 0], logits.amax(-1), **RMS)
    assert not np.allclose(own.top_log_probability[0], before.texts[0].top_log_probability[-1, :, :1], rtol=1e-3)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.most = max(self.most, made.numel())
        return made


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_no_array_of_tokens_by_vocabulary_is_made(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = 1500
    subject, pairs = load(families.build(family, vocab_size=words)), texts((40, 40, 40))
    monkeypatch.setattr(projection_module, "_HELD", 8 * 1536 * 4)
    with Largest() as seen:
        logit_lens(subject, pairs, sites=SITES)
    assert seen.most <= max(words * subject.anatomy.d_model, 120 * 4 * subject.anatomy.d_model), "weights and hidden states, no logits"
    assert seen.most < 120 * words


def named() -> tuple[Subject, Pairs]:
    subject = load(families.build("gpt2", torch.float64), tokenizer=families.tokenizer())
    ids = ((5, 6, 7, 8, 9), (10, 11, 12), (13, 14, 15, 16))
    pairs = [PromptPair(f"{at}", one, one, target=(1, len(one))) for at, one in enumerate(ids)]
    return subject, Pairs(tuple(pairs), "by hand")


def test_the_table_names_every_place_position_and_token() -> None:
    subject, pairs = named()
    reading = logit_lens(subject, pairs, k=2, sites=("residual", "head_output"))
    table = reading.table()
    expected = ["text", "site", "layer", "head", "component", "position", "token", "target", "rank", "probability", "entropy", "kl"]
    assert list(table) == [*expected, "top_1", "top_2", "p_1", "p_2"]
    assert len(table) == (4 + 12) * 12
    row = table[(table.text == "2") & (table.component == "a1.h3") & (table.position == 1)].iloc[0]
    assert (row.site, row.layer, row["head"], row.token, row.target) == ("head_output", 1, 3, "w14", "w15")
    text, at = reading.texts[2], place(reading, "a1.h3")
    assert row["rank"] == text.rank[at, 1]
    assert row.probability == np.exp(text.log_probability[at, 1])
    assert (row.entropy, row.kl) == (text.entropy[at, 1], text.kl[at, 1])
    assert row.top_2 == subject.tokenizer.decode([text.top[at, 1, 1]])
    assert row.p_1 == np.exp(text.top_log_probability[at, 1, 0])
    assert table[table.position == 0].token.unique().tolist() == ["w5", "w10", "w13"]
    ends = table[table.target.isna()]
    assert ends.groupby("text").position.unique().map(list).tolist() == [[4], [2], [3]]
    assert ends["rank"].isna().all()
    assert ends.probability.isna().all()
    assert not ends.entropy.isna().any()


def test_the_summary_is_the_mean_of_texts_means() -> None:
    subject, pairs = named()
    more = ((6, 9, 8), (12, 5, 7, 9, 10), (16, 14, 11, 5))
    pairs = Pairs((*pairs, *(PromptPair(f"{at}", one, one, target=(1, len(one))) for at, one in enumerate(more, start=3))), "by hand")
    reading = logit_lens(subject, pairs)
    table = reading.table()
    table["agreement"] = (table.top_1 == table.groupby(["text", "position"]).top_1.transform("last")).astype(float)
    table["log_probability"], table["reciprocal_rank"] = np.log(table.probability), 1 / table["rank"]
    kinds: tuple[tuple[Literal["all", "target"], pd.DataFrame], ...] = (("all", table), ("target", table[table.target.notna()]))
    for rows, kept in kinds:
        summary = reading.summary(rows=rows)
        assert summary.component.tolist() == ["embed", "resid0", "resid1", "resid2"]
        assert summary.n.tolist() == [6] * 4
        for name in ("log_probability", "reciprocal_rank", "agreement", "entropy", "kl"):
            per_text = kept.groupby(["component", "text"])[name].mean().unstack()
            np.testing.assert_allclose(summary[name], per_text.mean(axis=1), rtol=1e-9, atol=1e-9)
            low, high, _ = mean_test(per_text.to_numpy().T)
            np.testing.assert_allclose(summary[f"{name}_high"], high, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(summary[f"{name}_low"], low, rtol=1e-9, atol=1e-9)
    assert summary.agreement.iloc[-1] == 1.0


def test_target_rows_are_those_that_predict_the_span_or_the_answer() -> None:
    ids = (5, 6, 7, 8, 9, 10)
    spanned, answered = PromptPair("spanned", ids, ids, target=(3, 5)), PromptPair("answered", ids, ids, answers=(11,))
    reading = logit_lens(families.subject("gpt2"), Pairs((spanned, answered), "by hand"))
    assert [text.in_target.tolist() for text in reading.texts] == [[False, False, True, True, False, False], [False] * 5 + [True]]
    assert [text.targets.tolist() for text in reading.texts] == [[6, 7, 8, 9, 10, -1], [6, 7, 8, 9, 10, 11]]


def test_two_models_are_compared_text_by_text() -> None:
    pairs = texts((*families.LENGTHS, 8, 10, 9))
    base, tuned = (logit_lens(families.subject("gpt2", torch.float64, seed), pairs) for seed in (0, 1))
    found = compare_lenses(base, tuned)
    assert found.component.tolist() == ["embed", "resid0", "resid1", "resid2"]
    for name in CHANGES:
        before, after = (np.stack([np.nanmean(getattr(text, name), axis=1) for text in one.texts]) for one in (base, tuned))
        np.testing.assert_allclose(found[f"{name}_base"], before.mean(0), rtol=1e-9)
        np.testing.assert_allclose(found[f"{name}_change"], (after - before).mean(0), rtol=1e-9, atol=1e-9)
        *_, p = mean_test((after - before)[:, :3])  # the last layer's KL is zero in both
        np.testing.assert_allclose(found[f"{name}_change_p"][:3], p, rtol=1e-6)
        np.testing.assert_allclose(found[f"{name}_change_q"], benjamini_hochberg(found[f"{name}_change_p"]))
    same = compare_lenses(base, base)
    assert (same[[f"{name}_change" for name in CHANGES]] == 0).all(axis=None)
    assert (same.kl_change_p == 1).all()


def test_what_does_not_compare_is_refused() -> None:
    subject, pairs = families.subject("gpt2"), texts()
    whole = logit_lens(subject, pairs)
    with pytest.raises(SettingsError, match="same settings"):
        compare_lenses(whole, logit_lens(subject, pairs, layers=[0]))
    with pytest.raises(DataError, match="text number 3"):
        compare_lenses(whole, logit_lens(subject, pairs.first(2)))
    with pytest.raises(DataError, match="text text 0"):
        compare_lenses(whole, logit_lens(subject, Pairs(pairs.pairs[::-1], "turned")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ("z",)}, "the sites are residual"),
        ({"layers": [3]}, "layers 0-2"),
        ({"sites": ()}, "at least one site"),
        ({"sites": ("mlp_output",), "layers": [-1]}, "at least one site"),
        ({"norm": "none"}, "use applied or frozen"),
        ({"k": 0}, "1 to 97"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        logit_lens(families.subject("gpt2"), texts(), **options)


def test_rows_and_texts_that_cannot_be_are_refused() -> None:
    subject = families.subject("gpt2")
    plain = Pairs((PromptPair("plain", (5, 6, 7), (5, 6, 7)),), "by hand")
    reading = logit_lens(subject, plain)
    with pytest.raises(DataError, match="'plain' has neither a target span nor answers"):
        reading.summary(rows="target")
    with pytest.raises(SettingsError, match="use all or target"):
        reading.summary(rows=slip("some"))
    with pytest.raises(DataError, match="vocabulary has 97"):
        logit_lens(subject, Pairs((PromptPair("far", (500,), (500,)),), "by hand"))
