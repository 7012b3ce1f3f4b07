"""What two models share: planted copies are found whole, untrained strangers are at the floor, and chance is told as chance."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mechscope.errors import DataError
from mechscope.heads.pattern_roles import pattern_roles
from mechscope.instrument import Execution, load, record
from mechscope.instrument.walk import run_backbone
from mechscope.subject import Subject
from mechscope.universality import align, read_rows, same_heads, same_neurons, same_representations, similarity_grid
from mechscope.universality.representations import procrustes, svcca
from tests import families

TEXTS = [" ".join(f"w{3 + (7 * at + 5 * text + at * at) % 40}" for at in range(9 + text % 4)) for text in range(24)]


@cache
def subject(family: str = "gpt2", seed: int = 0) -> Subject:
    return load(families.build(family, seed=seed), tokenizer=families.tokenizer())


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXT_OF = np.repeat(np.arange(60), 10)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
def test_rows_are_what_each_text_alone_gives(family: str) -> None:
    here = subject(family)
    aligned = align({"a": here, "b": here}, TEXTS[:7], per_text=4, seed=1)
    rows = read_rows(here, aligned.texts["a"], aligned.places["a"], ("residual", "neuron"), execution=Execution(tokens_per_batch=40))
    assert aligned.rows == len(rows.layers("residual")[0]) == 28
    begin = 0
    for pair, places in zip(aligned.texts["a"], aligned.places["a"], strict=True):
        assert 0 not in places
        with record(here, "residual", "neuron") as recording:
            run_backbone(here, torch.tensor([pair.clean]), None)
        for (site, layer), value in recording.values.items():
            torch.testing.assert_close(
                rows.values[site, layer][begin : begin + len(places)], value[0, list(places)].float(), rtol=1e-4, atol=1e-5
            )
        begin += len(places)


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that cuts `w12` into letter and number, and has another start."""
    words = ["<pad>", "w", *map(str, range(families.VOCABULARY)), " "]
    inner = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = Split(__import__("tokenizers").Regex(r"w|[0-9]+|\s"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")


def test_texts_of_two_tokenizers_are_compared_where_both_end_a_token() -> None:
    other = load(families.build("gpt2", vocab_size=families.VOCABULARY + 4), tokenizer=pieces_tokenizer())
    aligned = align({"words": subject(), "pieces": other}, TEXTS, per_text=64)
    for text, one, two, here, there in zip(
        TEXTS, aligned.texts["words"], aligned.texts["pieces"], aligned.places["words"], aligned.places["pieces"], strict=True
    ):
        words = text.split()
        assert len(two.clean) == 3 * len(words) - 1
        # behind each word, but for one that ends the first token of a text
        assert [families.tokenizer().decode([one.clean[at]]) for at in here][-3:] == words[-3:]
        assert [other.tokenizer.decode([two.clean[at]]) for at in there][-3:] == [word[1:] for word in words[-3:]]
        assert len(here) == len(there) >= len(words) - 1


def test_permuted_neurons_are_found_one_by_one_and_strangers_are_not() -> None:
    first = [gaussian(600, 30, seed=layer) for layer in range(2)]
    order = [torch.randperm(30, generator=torch.Generator().manual_seed(layer)) for layer in range(2)]
    # layers exchanged, neurons in another order, each scaled and shifted
    second = [3 * first[1][:, order[1]] + 1, 0.5 * first[0][:, order[0]] - 2]
    found = same_neurons(first, second, TEXT_OF)
    np.testing.assert_allclose(found["correlation"], 1, rtol=0, atol=1e-5)
    expected = [f"m{1 - layer}.n{int((order[layer] == neuron).nonzero())}" for layer in range(2) for neuron in range(30)]
    assert list(found["partner"]) == expected
    # a rotation of 30 directions has one that is near any neuron, but never it
    assert 0.2 < found["rotated"].mean() < 0.6
    assert found["rotated"].max() < 0.9
    strangers = same_neurons(first, [gaussian(600, 30, seed=7), gaussian(600, 30, seed=8)], TEXT_OF)
    # chosen on one half, told of the other: no more than chance is left
    assert abs(strangers["correlation"].mean()) < 3 / np.sqrt(300 * 60)
    assert abs(strangers["excess"].mean()) < 0.03


def test_a_turned_basis_has_no_neurons_of_its_own() -> None:
    first = [gaussian(600, 40).relu()]
    turn, _ = torch.linalg.qr(gaussian(40, 40, seed=3))
    found = same_neurons(first, [first[0] @ turn], TEXT_OF)
    assert abs(found["excess"].mean()) < 0.05
    assert found["correlation"].max() < 0.9


def test_a_neuron_that_never_changes_has_no_partner_and_is_none() -> None:
    first = [gaussian(600, 6)]
    first[0][:, 2] = 5.0
    second = [first[0].clone()]
    found = same_neurons(first, second, TEXT_OF)
    assert np.isnan(found["correlation"][2])
    assert (found["correlation"].drop(2) > 0.999).all()
    assert "m0.n2" not in set(found["partner"].drop(2))


def test_a_rotated_stream_is_the_same_and_another_one_is_not() -> None:
    first = [gaussian(600, 12, seed=layer) @ torch.diag(torch.arange(1.0, 13)) for layer in range(3)]
    turn, _ = torch.linalg.qr(gaussian(12, 12, seed=5))
    same = same_representations(first, [4 * layer @ turn + 3 for layer in first], TEXT_OF)
    for column in ("cka", "procrustes", "svcca"):
        np.testing.assert_allclose(same[column], 1, rtol=0, atol=1e-4, err_msg=column)
    assert (same["cka_shuffled"].abs() < 0.05).all()
    assert (same["withheld"] == "").all()
    other = same_representations(first, [gaussian(600, 12, seed=20 + layer) for layer in range(3)], TEXT_OF)
    assert (other["cka"].abs() < 0.05).all()
    assert (other["svcca"] < 0.3).all()
    grid = similarity_grid(first, first).pivot(index="layer", columns="other_layer", values="cka")
    np.testing.assert_allclose(np.diag(grid), 1, atol=1e-6)
    assert grid.to_numpy()[~np.eye(3, dtype=bool)].max() < 0.05


def test_similarities_are_those_of_their_formulas() -> None:
    x, y = gaussian(50, 4).numpy().astype(float), gaussian(50, 3, seed=1).numpy().astype(float)
    y[:, 0] += 2 * x[:, 1]
    centred = [each - each.mean(0) for each in (x, y)]
    # the best rotation and scale, by its residual
    u, s, vt = np.linalg.svd(centred[0].T @ centred[1], full_matrices=False)
    moved = centred[0] @ (u @ vt) * (s.sum() / (centred[0] ** 2).sum())
    # a map into fewer directions is no rotation of all: compare the explained share on the side that is turned
    assert procrustes(x, y) == pytest.approx(s.sum() ** 2 / ((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    assert 1 - ((centred[1] - moved) ** 2).sum() / (centred[1] ** 2).sum() <= procrustes(x, y) * 2
    from sklearn.cross_decomposition import CCA

    both = CCA(n_components=3, max_iter=5000, tol=1e-12).fit(x, y).transform(x, y)
    by_hand = np.mean([np.corrcoef(both[0][:, at], both[1][:, at])[0, 1] for at in range(3)])
    assert svcca(x, y)[0] == pytest.approx(by_hand, abs=1e-3)
    assert svcca(x[:30], y[:30])[1] == "too few rows: 30 of at least 40, ten for each of 4 directions"
    assert svcca(x, np.ones((50, 2)))[1] == "the representation does not vary"
    assert np.isnan(procrustes(x, np.ones((50, 2))))


def test_heads_in_another_order_are_matched_and_another_seed_is_at_chance() -> None:
    here = pattern_roles(subject(), n=24)
    order = np.stack([np.random.default_rng(layer).permutation(4) for layer in range(3)])
    shuffled = tuple(
        replace(
            one,
            score=np.take_along_axis(one.score, order[None], axis=2),
            null=np.take_along_axis(one.null, order[None], axis=2),
            turned=None,
        )
        for one in here
    )
    summary, matches = same_heads(here, shuffled)
    known = summary["agreement"].notna()
    assert (summary.loc[known, "agreement"] > 0.9999).all()
    back = np.argsort(order, axis=1)
    assert list(matches["partner"]) == [f"a{layer}.h{back[layer, head]}" for layer in range(3) for head in range(4)]
    other, _ = same_heads(here, pattern_roles(subject(seed=3), n=24))
    assert (other["p"].dropna() > 0.01).all()


def test_chance_of_matched_heads_is_calibrated() -> None:
    """Models that share nothing have matched heads that agree, as any two do, and are called alike no more often than is said."""
    low, rng = [], np.random.default_rng(0)
    template = pattern_roles(subject(), n=8)[:2]
    for draw in range(60):
        made = []
        for _ in range(2):
            level = [rng.normal(size=(1, 3, 4)) for _ in template]
            made.append(
                tuple(
                    replace(one, score=own + 0.1 * rng.normal(size=one.score.shape), null=np.zeros_like(one.null), turned=None)
                    for one, own in zip(template, level, strict=True)
                )
            )
        summary, _ = same_heads(*made, draws=99, seed=draw)
        low.append((summary["p"] <= 0.05).tolist())
    assert np.mean(low) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 120)


def test_what_cannot_be_compared_is_said() -> None:
    with pytest.raises(DataError, match="model 'b' has no tokenizer: models are compared where their tokenizers end a token"):
        align({"a": subject(), "b": load(families.build("gpt2"))}, TEXTS)
    with pytest.raises(DataError, match="end a token at the same character in 1 of 1 texts: at least 2 are needed"):
        align({"a": subject(), "b": subject()}, TEXTS[:1])
    with pytest.raises(DataError, match="3 texts are too few, give at least 4"):
        same_neurons([gaussian(30, 3)], [gaussian(30, 3)], np.repeat([0, 1, 2], 10))
