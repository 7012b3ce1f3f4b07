"""Jobs in indirect-object identification: scores equal what Hugging Face's maps and modules give by hand; planted heads are told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import sdpa_mask

from mechscope.data.newsroom import newsroom_model_path
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.errors import DataError
from mechscope.heads.roles import Role, RoleScores
from mechscope.heads.task_roles import ROLES, roles_on, task_roles
from mechscope.instrument import load as load_checked
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests import families
from tests.instrument.attention_oracle import _whole_map, truth

NAMES = range(10, 20)
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3", "opt")
# RMS norms compute in float32 whatever the type
CLOSE = {family: 1e-9 if family in ("gpt2", "gpt_neox", "opt") else 2e-5 for family in FAMILIES}


def stories(n: int = 12, *, length: int = 12, vary: bool = True, seed: int = 0) -> Pairs:
    """Return pairs of the task's form in random words: two names, and one of them again; six orders and, if they vary, three lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(n):
        size = length - (index % 3 if vary else 0)
        io, subject, *others = (torch.randperm(len(NAMES), generator=generator)[:5] + NAMES[0]).tolist()
        text = torch.randint(20, families.VOCABULARY, (size,), generator=generator).tolist()
        first, second, again = 1 + index % 2, 4, size - 3
        here, there = (first, second) if index % 4 < 2 else (second, first)
        clean, corrupt = list(text), list(text)
        for at, name, other in zip((here, there, again), (io, subject, subject), others, strict=True):
            clean[at], corrupt[at] = name, other
        segments = {name: ((at, at + 1),) for name, at in (("io", here), ("s1", there), ("s2", again))}
        made.append(PromptPair(f"story {index}", tuple(clean), tuple(corrupt), (io,), (subject,), segments=segments))
    return Pairs(tuple(made), "random stories")


def by_name(scores: tuple[RoleScores, ...]) -> dict[str, RoleScores]:
    return {one.role.name: one for one in scores}


_NOTED: list[tuple[Any, Tensor, Tensor, Tensor]] = []


def _noting(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **options: Any) -> Any:
    z, weights = _whole_map(module, query, key, value, mask, scaling, **options)
    heads = torch.stack([value[0, head * value.shape[1] // query.shape[1]] for head in range(query.shape[1])])
    _NOTED.append((module, weights[0], heads, z[0]))
    return z, weights


AttentionInterface.register("noting_oracle", _noting)
AttentionMaskInterface.register("noting_oracle", sdpa_mask)


class Oracle:
    """One text through the plain model: maps, and what heads write to the logits of names, by the model's own modules."""

    def __init__(self, model: Any, ids: tuple[int, ...]) -> None:
        self.model, text = model, torch.tensor(ids)
        self.last = truth(model, text).hidden[-2][-1]
        implementation = model.config._attn_implementation
        model.set_attn_implementation("noting_oracle")
        _NOTED.clear()
        try:
            model(text[None], use_cache=False)
        finally:
            model.set_attn_implementation(implementation)
        self.layers = list(_NOTED)

    def map(self, layer: int, head: int) -> Tensor:
        return self.layers[layer][1][head]

    def value(self, layer: int, head: int, at: int) -> Tensor:
        return self.layers[layer][2][head, at]

    def z(self, layer: int, head: int, at: int) -> Tensor:
        return self.layers[layer][3][at, head]

    def logits(self, layer: int, head: int, vector: Tensor) -> Tensor:
        """Return what a head's vector before W_O adds to all logits at the last token, all norms frozen there."""
        module, _, _, z = self.layers[layer]
        project = next(getattr(module, name) for name in ("o_proj", "out_proj", "dense", "c_proj") if hasattr(module, name))
        alone = torch.zeros_like(z[-1])
        alone[head] = vector
        written = project(alone.flatten()) - project(torch.zeros_like(alone).flatten())
        if self.model.config.model_type.startswith("gemma"):
            written = frozen(self.model.model.layers[layer].post_attention_layernorm, written, project(z[-1].flatten()))
        names = ("ln_f", "final_layer_norm", "norm")
        final = [module for name, module in self.model.named_modules() if name.split(".")[-1] in names and ".layers." not in name]
        return self.model.get_output_embeddings().weight @ frozen(final[-1], written, self.last)


def frozen(norm: Any, x: Tensor, at: Tensor) -> Tensor:
    """Apply a norm without its shift, dividing by what it divides another vector by."""
    if isinstance(norm, torch.nn.LayerNorm):
        return norm.weight * (x - x.mean()) / (at.var(correction=0) + norm.eps).sqrt()
    is_gemma = type(norm).__name__.startswith("Gemma")
    eps = norm.eps if is_gemma else norm.variance_epsilon
    return (norm.weight + is_gemma) * x / (at.square().mean() + eps).sqrt()


def expected(oracle: Oracle, pair: PromptPair, ids: tuple[int, ...], names: list[int], layer: int, head: int) -> list[float]:
    io, s1, s2 = (pair.segments[name][0][0] for name in ("io", "s1", "s2"))
    p = oracle.map(layer, head)
    moved = oracle.logits(layer, head, oracle.value(layer, head, io))
    best, worst = max(names, key=lambda name: float(moved[name])), min(names, key=lambda name: float(moved[name]))
    effect = oracle.logits(layer, head, oracle.z(layer, head, -1))
    attention = p[-1, io].item()
    return [
        attention * (best == ids[io]),
        attention * (worst == ids[io]),
        p[-1, s2].item(),
        p[s2, s1].item(),
        p[s2, s1 + 1].item(),
        (effect[ids[io]] - effect[ids[s1]]).item(),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_are_what_maps_and_modules_give_by_hand(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), stories()
    found = roles_on(subject, pairs, execution=Execution(tokens_per_batch=50))
    assert [one.role for one in found] == list(ROLES)
    assert len({id(pair) for pair in pairs}) == len(found[0].texts) == 12
    names = sorted({ids[pair.segments[name][0][0]] for pair in pairs for ids in (pair.clean, pair.corrupt) for name in pair.segments})
    copying = 0
    for which in ("score", "null"):
        values = np.stack([getattr(one, which) for one in found], -1)
        for text, pair in enumerate(pairs):
            ids = pair.clean if which == "score" else pair.corrupt
            oracle = Oracle(subject.plain, ids)
            for layer in range(families.LAYERS):
                for head in range(families.HEADS):
                    wanted = expected(oracle, pair, ids, names, layer, head)
                    np.testing.assert_allclose(values[text, layer, head], wanted, rtol=CLOSE[family], atol=CLOSE[family])
                    copying += (wanted[0] > 0) + (wanted[1] > 0)
    assert copying > 10  # some head copies some name by chance: the products above are not all zero


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_matter(family: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, pairs = families.subject(family, torch.float64), stories(6)
    alone = roles_on(subject, pairs, execution=Execution(tokens_per_batch=1))
    batches = Pairs.batches
    monkeypatch.setattr(Pairs, "batches", lambda self, **options: batches(self, **{**options, "padding": padding}))
    for one, two in zip(alone, roles_on(subject, pairs, execution=Execution(tokens_per_batch=10_000)), strict=True):
        np.testing.assert_allclose(two.score, one.score, rtol=0, atol=CLOSE[family], err_msg=one.role.name)
        np.testing.assert_allclose(two.null, one.null, rtol=0, atol=CLOSE[family], err_msg=one.role.name)


LENGTH, WORDS, ROOM = 12, 40, 60  # a head's room holds words and places
RIGHT = (10, 15)  # names that only indirect objects have, in texts for planted heads


def planted() -> Subject:
    """Return a GPT-2 of one layer whose heads have their jobs written by hand."""
    heads = 6
    sizes = {"n_layer": 1, "n_head": heads, "n_embd": ROOM * heads, "n_positions": LENGTH, "vocab_size": WORDS}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, tie_word_embeddings=False, **sizes)).double()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state |= {name: torch.ones_like(value) for name, value in state.items() if ".ln_" in name and name.endswith("weight")}
    width, place = ROOM * heads, WORDS
    state["transformer.wte.weight"] = torch.eye(WORDS, width, dtype=torch.float64)
    state["transformer.wpe.weight"][:, place : place + LENGTH] = torch.eye(LENGTH, dtype=torch.float64)
    state["lm_head.weight"] = torch.eye(WORDS, width, dtype=torch.float64)
    read, write = state["transformer.h.0.attn.c_attn.weight"], state["transformer.h.0.attn.c_proj.weight"]
    query, key, value = read[:, :width], read[:, width : 2 * width], read[:, 2 * width :]
    last, again = place + LENGTH - 1, place + LENGTH - 3

    def job(head: int, looks: dict[int, list[int]], writes: float) -> None:
        start = ROOM * head
        for row, (asker, wanted) in enumerate(looks.items()):
            query[asker, start + row] = 10.0
            key[wanted, start + row] = 4.0
        for word in range(WORDS):
            value[word, start + word], write[start + word, word] = 1.0, writes

    right = [*range(*RIGHT)]
    job(0, {last: right}, 1.0)  # the end looks at right names and writes them
    job(1, {last: right}, -1.0)  # or against them
    job(2, {last: [again]}, 0.0)  # it looks at a place
    job(3, {name: [name] for name in range(WORDS)}, 0.0)  # every word at its like
    job(4, {last: [*range(NAMES.start, NAMES.stop)]}, 1.0)  # all names alike
    model.load_state_dict(state)
    return load(model.eval())


def sided(n: int = 12) -> Pairs:
    """Return stories of one length whose indirect objects are right names, and whose other names, in both texts, are not."""
    made = []
    for index, pair in enumerate(stories(n, length=LENGTH, vary=False)):
        io, s, *others = RIGHT[0] + index % 5, RIGHT[1] + index % 5, *(RIGHT[1] + (index + step) % 5 for step in (1, 2, 3))
        clean, corrupt = list(pair.clean), list(pair.corrupt)
        for name, mine, other in zip(("io", "s1", "s2"), (io, s, s), others, strict=True):
            at = pair.segments[name][0][0]
            clean[at], corrupt[at] = mine, other
        # other words than names, and few enough for the model
        text = [[word if word in NAMES else 20 + word % 20 for word in ids] for ids in (clean, corrupt)]
        made.append(PromptPair(pair.id, tuple(text[0]), tuple(text[1]), (io,), (s,), segments=pair.segments))
    return Pairs(tuple(made), "sided stories")


def test_planted_heads_are_told_apart() -> None:
    found = by_name(roles_on(planted(), sided()))

    def scores(name: str) -> tuple[np.ndarray, np.ndarray]:
        return found[name].score[:, 0], found[name].null[:, 0]

    mover, mover_null = scores("name-mover")
    assert (mover[:, 0] > 0.99).all()
    np.testing.assert_allclose(mover_null[:, 0], 1 / LENGTH, atol=1e-9)  # with no name to look for it looks everywhere
    # a head that looks at all names alike gives IO a third of its attention, in both texts
    np.testing.assert_allclose(mover[:, 4], 1 / 3, atol=0.01)
    np.testing.assert_allclose(mover_null[:, 4], 1 / 3, atol=0.01)
    np.testing.assert_array_equal(mover[:, [1, 2, 3, 5]], 0)  # lowers it, or writes nothing: no name is raised above all others
    negative, _ = scores("negative-name-mover")
    assert (negative[:, 1] > 0.99).all()
    np.testing.assert_array_equal(negative[:, 0], 0)
    effect, _ = scores("ioi-direct-effect")
    assert (effect[:, 0] > 1).all()
    np.testing.assert_allclose(effect[:, 1], -effect[:, 0], rtol=1e-9)
    assert np.abs(effect[:, [2, 3]]).max() < 1e-9
    place, place_null = scores("s-inhibition")
    assert (place[:, 2] > 0.99).all()
    np.testing.assert_allclose(place_null[:, 2], place[:, 2], rtol=1e-9)  # a place, not a repeated name
    same, same_null = scores("ioi-duplicate-token")
    np.testing.assert_allclose(same[:, 3], 0.5, atol=0.01)  # S2 looks at S1 and at itself
    assert (same_null[:, 3] < 0.02).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_random_weights_score_chance(family: str) -> None:
    pairs = stories(24)
    gaps: dict[Role, list[float]] = {}
    for seed in range(16):
        for one in roles_on(load(families.build(family, seed=seed)), pairs):
            gaps.setdefault(one.role, []).append(float((one.score - one.null).mean()))
    for role, values in gaps.items():
        low, high = stats.t.interval(0.999, len(values) - 1, np.mean(values), stats.sem(values))
        assert low < 0 < high, role.name
        assert high - low < (0.1 if role.high == 1 else 2), role.name


def test_task_roles_writes_its_own_prompts() -> None:
    subject = load_checked(str(newsroom_model_path()))
    found = task_roles(subject, n=8, execution=Execution(seed=1))
    assert [one.role.name for one in found] == [role.name for role in ROLES]
    assert found[0].texts == tuple(f"ioi-1-{index}" for index in range(8))
    for one in found:
        assert one.score.shape == one.null.shape == (8, 6, 4)
        assert np.isfinite(one.score).all()
        assert one.role.low is None or (one.role.low <= one.score).all()
        assert one.role.high is None or (one.score <= one.role.high).all()
    again = task_roles(subject, n=8, execution=Execution(seed=1))
    np.testing.assert_array_equal(again[2].score, found[2].score)


def test_tokenizers_without_names_are_refused() -> None:
    model = families.build("gpt2")
    with pytest.raises(DataError, match="names as single tokens"):
        task_roles(load(model, tokenizer=families.tokenizer()))
    with pytest.raises(DataError, match="has no tokenizer to write prompts with"):
        task_roles(load(model))
