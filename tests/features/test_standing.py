"""Tokens that dictionaries are not meant to read, the first ones of a text and those of huge norm, count in no mean, and nothing is changed there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.causal import ablate, attribution_patch, mean_of, patch
from mechscope.data.pairs import Pairs, PromptPair, collate_pairs
from mechscope.errors import SettingsError
from mechscope.features import Rule
from mechscope.features.faithfulness import faithfulness
from mechscope.features.node_effects import node_effects
from mechscope.features.node_patching import node_means, patch_nodes, patch_places
from mechscope.features.places import Place
from mechscope.features.shift import _Pooled
from mechscope.features.standing import Node, Standing, in_order
from mechscope.instrument import Execution, load
from mechscope.subject import Subject
from tests import families
from tests.features.node_world import PAIRS, add, decoders, made, metric, parts, seen

# a token whose embedding is a thousand times that of others: where it stands, so large is the residual stream
HUGE = 2
LIMIT = 100.0
TOPK, RELU = Place("residual", 0), Place("attention_output", 1)
# of a dictionary that left out huge norms, and of one that left out none
LATENTS = ("resid0.f2", "resid0.f9", "a1.f3")
Side = Literal["clean", "corrupt"]
# texts of 9, 7 and 9 tokens in one batch, which pads one of them, and each alone
every_batch = pytest.mark.parametrize("tokens_per_batch", [1024, 9])


def texts() -> Pairs:
    """Return texts that begin with the huge token; it stands again within the first text, and within the corrupt version of the second."""
    within = {(0, "clean"): 6, (0, "corrupt"): 6, (1, "corrupt"): 3}

    def replaced(number: int, pair: PromptPair, side: Side) -> tuple[int, ...]:
        return tuple(HUGE if at in (0, within.get((number, side))) else token for at, token in enumerate(getattr(pair, side)))

    pairs = [
        replace(pair, clean=replaced(number, pair, "clean"), corrupt=replaced(number, pair, "corrupt")) for number, pair in enumerate(PAIRS)
    ]
    return Pairs(tuple(pairs), "with a huge token")


TEXTS = texts()


@cache
def model() -> Subject:
    built = families.build("gpt2", torch.float64)
    with torch.no_grad():
        built.transformer.wte.weight[HUGE] *= 1000
    return load(built.requires_grad_(False))


@cache
def standing() -> tuple[Standing, ...]:
    """Return a dictionary whose training left out huge norms, and one whose training left out the first token alone."""
    about: dict[str, dict[str, Any]] = {
        "resid0": {"source": {"settings": {"first": 1, "outlier": 10.0}}, "limits": {"resid0": LIMIT}},
        "a1": {"source": {"settings": {"first": 1, "outlier": None}}},
    }
    rules = {"resid0": Rule("topk", 6), "a1": Rule("relu")}
    return in_order(
        Standing.of(replace(made(name, families.WIDTH, rules[name], at), about=about[name]), model()) for at, name in enumerate(about)
    )


def of(name: str) -> tuple[Standing, int]:
    place, _, latent = name.rpartition(".f")
    return next(each for each in standing() if each.place.name == place), int(latent)


def meant(places: Sequence[Place], *sides: Side, first: int = 1) -> Tensor:
    """Mark by ids alone what dictionaries at some places are meant to read: tokens behind the first, and at the residual stream no huge ones."""
    batch = collate_pairs(TEXTS.pairs)
    tokens = torch.zeros_like(batch.real)
    for row, pair in enumerate(TEXTS):
        start = int(batch.real[row].int().argmax())
        for at in range(first, len(pair.clean)):
            tokens[row, start + at] = TOPK not in places or all(getattr(pair, side)[at] != HUGE for side in sides)
    return tokens


def setting(name: str, value: Tensor | float, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the change that sets a latent at some tokens."""
    each, latent = of(name)

    def change(x: Tensor) -> Tensor:
        moved = x + (value - parts(each, x)[0][..., latent])[..., None] * decoders(each)[latent]
        return torch.where(tokens[..., None], moved, x)

    return change


def values(name: str, side: Side = "clean") -> Tensor:
    """Return a latent's value at all tokens."""
    each, latent = of(name)
    return parts(each, seen(model(), TEXTS, [each.place], corrupt=side == "corrupt")[each.place])[0][..., latent]


def test_huge_tokens_are_those_above_the_limit_and_no_others() -> None:
    batch = collate_pairs(TEXTS.pairs)
    for side, ids in (("clean", batch.clean), ("corrupt", batch.corrupt)):
        norms = seen(model(), TEXTS, [TOPK], corrupt=side == "corrupt")[TOPK].norm(dim=-1)
        torch.testing.assert_close((norms > LIMIT)[batch.real], (ids == HUGE)[batch.real])
    # and their latents would tell: a mean over all tokens is another one
    assert all(values(name)[batch.real].mean() > 20 * values(name)[meant([TOPK], "clean")].mean().abs() for name in LATENTS[:1])


@every_batch
def test_means_are_over_the_tokens_that_are_read(tokens_per_batch: int) -> None:
    execution = Execution(tokens_per_batch=tokens_per_batch)
    found = mean_of(model(), TEXTS, [], standing=standing(), execution=execution)
    together = node_means(model(), standing(), TEXTS, execution=execution)
    for each in standing():
        x = seen(model(), TEXTS, [each.place])[each.place]
        dense = parts(each, x)[0]
        own, all_places = meant([each.place], "clean"), meant([TOPK, RELU], "clean")
        torch.testing.assert_close(found.latents[each.place.name], dense[own].mean(0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together[each.place].latents, dense[all_places].mean(0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together[each.place].x, x[all_places].mean(0), rtol=1e-9, atol=1e-12)


def test_a_dictionary_of_unknown_training_leaves_out_the_first_token_alone() -> None:
    plain = in_order([Standing.of(replace(each.dictionary, about={}), model()) for each in standing()])
    found = mean_of(model(), TEXTS, [], standing=plain)
    for each in plain:
        dense = parts(each, seen(model(), TEXTS, [each.place])[each.place])[0]
        torch.testing.assert_close(found.latents[each.place.name], dense[meant([])].mean(0), rtol=1e-9, atol=1e-12)


def test_so_many_first_tokens_are_left_out_as_training_left_out() -> None:
    (each,) = (Standing.of(replace(standing()[1].dictionary, about={"source": {"settings": {"first": 3, "outlier": None}}}), model()),)
    dense = parts(each, seen(model(), TEXTS, [RELU])[RELU])[0]
    expected = dense[meant([], first=3)].mean(0)
    torch.testing.assert_close(mean_of(model(), TEXTS, [], standing=[each]).latents["a1"], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(node_means(model(), [each], TEXTS)[RELU].latents, expected, rtol=1e-9, atol=1e-12)
    short = Pairs((replace(PAIRS.pairs[0], clean=(5, 6, 7), corrupt=(5, 6, 7), target=None, segments={}),), "short")
    with pytest.raises(SettingsError, match="no token that the dictionary at a1 is meant to read"):
        mean_of(model(), short, [], standing=[each])


@pytest.mark.parametrize("source", ["zero", "mean", "corrupt"])
@every_batch
def test_latents_are_ablated_where_they_are_read(source: str, tokens_per_batch: int) -> None:
    given = mean_of(model(), TEXTS, [], standing=standing()) if source == "mean" else source
    execution = Execution(tokens_per_batch=tokens_per_batch)
    names = ",".join(LATENTS)
    found = ablate(
        model(), TEXTS, sites=["latent"], source=given, metric="logit-diff", components=names, standing=standing(), execution=execution
    )
    sides: tuple[Side, ...] = ("clean", "corrupt") if source == "corrupt" else ("clean",)
    for name, row in zip(found.table["component"], found.values, strict=True):
        place = of(name)[0].place
        tokens, mean = meant([place], *sides), float(values(name)[meant([place], "clean")].mean())
        becomes: dict[str, Tensor | float] = {"zero": 0.0, "mean": mean, "corrupt": values(name, "corrupt")}
        expected = metric(model(), TEXTS, {place: setting(name, becomes[source], tokens)})
        np.testing.assert_allclose(row, expected, rtol=1e-7, atol=1e-9)
    assert (found.table["effect"].abs() > 1e-6).sum() >= 2


def test_a_value_of_another_text_is_taken_where_both_tokens_are_read() -> None:
    pairs = Pairs(TEXTS.pairs[:2], "two")
    found = ablate(model(), pairs, sites=["latent"], source="resample", metric="logit-diff", components="resid0.f2", standing=standing())
    (x,) = seen(model(), pairs, [TOPK]).values()
    f = parts(standing()[0], x)[0][..., 2]
    shift = [int(row.int().argmax()) for row in collate_pairs(pairs.pairs).real]
    other, tokens = f.clone(), torch.zeros_like(f, dtype=torch.bool)
    # of two texts each takes the other's, which begins anew where it ends
    for row, own in enumerate(pairs):
        source = pairs.pairs[1 - row]
        for at in range(len(own.clean)):
            there = at % len(source.clean)
            other[row, shift[row] + at] = f[1 - row, shift[1 - row] + there]
            tokens[row, shift[row] + at] = min(at, there) > 0 and HUGE not in (own.clean[at], source.clean[there])
    expected = metric(model(), pairs, {TOPK: setting("resid0.f2", other, tokens)})
    np.testing.assert_allclose(found.values[0], expected, rtol=1e-7, atol=1e-9)
    assert abs(found.table["effect"]).item() > 1e-6


@every_batch
def test_latents_are_patched_and_attributed_where_both_runs_tokens_are_read(tokens_per_batch: int) -> None:
    execution, names = Execution(tokens_per_batch=tokens_per_batch), ",".join(LATENTS)
    found = patch(model(), TEXTS, site="latent", direction="noise", components=names, standing=standing(), execution=execution)
    estimated = attribution_patch(
        model(), TEXTS, site="latent", direction="noise", components=names, standing=standing(), check=len(LATENTS), execution=execution
    )
    np.testing.assert_allclose(estimated.table["exact"], found.table["effect"], rtol=1e-7, atol=1e-9)
    unchanged = metric(model(), TEXTS, {}).numpy()
    for name, row, estimate in zip(found.table["component"], found.values, estimated.values, strict=True):
        place = of(name)[0].place
        tokens = meant([place], "clean", "corrupt")
        expected = metric(model(), TEXTS, {place: setting(name, values(name, "corrupt"), tokens)})
        np.testing.assert_allclose(row, expected, rtol=1e-7, atol=1e-9)
        step = torch.where(tokens, values(name, "corrupt") - values(name), 0.0)[..., None] * decoders(of(name)[0])[of(name)[1]]
        ends = [metric(model(), TEXTS, {place: add(sign * 1e-5 * step)}) for sign in (1, -1)]
        np.testing.assert_allclose(estimate - unchanged, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)


@every_batch
def test_nodes_count_where_every_dictionary_is_meant_to_read(tokens_per_batch: int) -> None:
    execution = Execution(tokens_per_batch=tokens_per_batch)
    tokens = meant([TOPK, RELU], "clean", "corrupt")[..., None]
    runs = {side: seen(model(), TEXTS, [TOPK, RELU], corrupt=side == "corrupt") for side in ("clean", "corrupt")}
    unchanged = metric(model(), TEXTS, {})
    effects = node_effects(model(), standing(), TEXTS, method="attribution", execution=execution)
    nodes = [Node.parse(name) for name in (*LATENTS, "resid0.error", "a1.error")]
    exact = patch_nodes(model(), standing(), TEXTS, nodes, execution=execution)
    for node, row in zip(nodes, exact, strict=True):
        each = next(one for one in standing() if one.place == node.place)
        (f, error), (g, missed) = (parts(each, runs[side][node.place]) for side in ("clean", "corrupt"))
        delta = missed - error if node.latent is None else (g - f)[..., [node.latent]] * decoders(each)[node.latent]
        delta = torch.where(tokens, delta, 0.0)
        np.testing.assert_allclose(row, metric(model(), TEXTS, {node.place: add(delta)}) - unchanged, rtol=1e-7, atol=1e-9)
        slope = (metric(model(), TEXTS, {node.place: add(1e-5 * delta)}) - metric(model(), TEXTS, {node.place: add(-1e-5 * delta)})) / 2e-5
        estimate = effects.errors[node.place] if node.latent is None else effects.latents[node.place].toarray()[:, node.latent]
        np.testing.assert_allclose(estimate, slope, rtol=1e-5, atol=1e-8)
    places = patch_places(model(), standing(), TEXTS, execution=execution)
    for place, row in zip((TOPK, RELU), places, strict=True):
        change = torch.where(tokens, runs["corrupt"][place] - runs["clean"][place], 0.0)
        np.testing.assert_allclose(row, metric(model(), TEXTS, {place: add(change)}) - unchanged, rtol=1e-7, atol=1e-9)


@every_batch
def test_a_circuit_without_nodes_keeps_what_its_dictionaries_do_not_read(tokens_per_batch: int) -> None:
    tokens = meant([TOPK, RELU], "clean")[..., None]

    def emptied(each: Standing) -> Callable[[Tensor], Tensor]:
        bias = each.dictionary.output_maps[0].back(each.dictionary.tensors["decoder_bias"])
        return lambda x: torch.where(tokens, bias, x)

    expected = metric(model(), TEXTS, {each.place: emptied(each) for each in standing()}).mean()
    execution = Execution(tokens_per_batch=tokens_per_batch)
    table = faithfulness(model(), standing(), TEXTS, [Node(TOPK, 2)], sizes=[0], filling="zero", execution=execution)
    row = table[(table["nodes"] == 0) & (table["errors"] == "in circuit")].iloc[0]
    assert row["value"] == pytest.approx(float(expected), rel=1e-9)


@every_batch
def test_a_probe_reads_the_mean_over_the_same_tokens_with_latents_ablated_or_not(tokens_per_batch: int) -> None:
    pooled = _Pooled(model(), standing(), Place("residual", 1), Execution(tokens_per_batch=tokens_per_batch))
    tokens = meant([TOPK, RELU], "clean")
    weights = (tokens.double() / tokens.sum(1, keepdim=True))[..., None]
    found: dict[Place, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        found[TOPK] = x.clone()
        return x

    for nodes in ((), (Node.parse("resid0.f2"), Node.parse("a1.f3"))):
        changes = {node.place: setting(node.name, 0.0, tokens) for node in nodes}
        metric(model(), TEXTS, {**changes, pooled.place: keep})
        np.testing.assert_allclose(pooled(TEXTS, nodes), (weights * found[TOPK]).sum(1), rtol=1e-9, atol=1e-12)
