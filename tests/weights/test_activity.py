"""Statistics of neurons over texts, held against loops over unpadded texts in float64."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.data.pairs import Pairs, PromptPair, collate_pairs
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.instrument.mlp import Mlps
from mechscope.subject.load import load
from mechscope.weights.activity import Activity, neuron_activity
from mechscope.weights.layer_activity import position_group
from mechscope.weights.memories import memories
from tests import families
from tests.stats.skewed import mean_test
from tests.weights.run_alone import LENGTHS, from_rows, run, texts_of

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
# half of the families' norms compute in float32, so padding and batching move their activations that much
LOOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def group_of(position: int) -> int:
    """The groups of positions by their definition: single up to 16, then eight to an octave."""
    edges, octave = [*range(16)], 8
    while edges[-1] <= position:
        octave *= 2
        edges += [octave + octave * part // 8 for part in range(8)]
    return max(at for at, edge in enumerate(edges) if edge <= position)


def strength(value: float) -> float:
    """Round to 17 significant bits, as strengths are compared."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.floor(mantissa * 2**17 + 0.5), exponent - 17)


def strongest(values: list[np.ndarray], layer: int, neuron: int, k: int, *, by_size: bool) -> list[tuple[float, int, int]]:
    found = [
        (float(value), text, position)
        for text, whole in enumerate(values)
        for position, value in enumerate(whole[layer, :, neuron])
        if (abs(value) if by_size else value) > 0
    ]
    return sorted(found, key=lambda one: (-strength(abs(one[0])), one[1], one[2]))[:k]


@torch.no_grad()
def test_every_statistic_is_that_of_a_loop(family: str) -> None:
    subject, texts, k = families.subject(family, torch.float64), texts_of(), 4
    table = neuron_activity(subject, texts, contexts=k, execution=Execution(tokens_per_batch=64)).table()
    neurons, opened = run(subject, texts)
    gated = family in ("llama", "qwen3", "gemma2", "gemma3", "phi3")
    n, tokens = len(texts), sum(LENGTHS)
    groups = np.array([group_of(position) for length in LENGTHS for position in range(length)])
    assert set(table["n"]) == {n}
    assert set(table["n_tokens"]) == {tokens}
    for layer in range(3):
        for neuron in range(0, neurons[0].shape[2], 5):
            row = table[(table["layer"] == layer) & (table["neuron"] == neuron)].iloc[0]
            assert row["component"] == f"m{layer}.n{neuron}"
            values = np.concatenate([whole[layer, :, neuron] for whole in neurons])
            active = [whole[layer, :, neuron] > 0 for whole in opened]
            expected: dict[str, float] = {}
            for name, by_text in {
                "mean": [whole[layer, :, neuron].mean() for whole in neurons],
                "active": [share.mean() for share in active],
            }.items():
                low, high, _ = mean_test(np.array(by_text))
                error = np.std(by_text, ddof=1) / n**0.5
                expected |= {name: np.mean(by_text), f"{name}_se": error, f"{name}_low": float(low), f"{name}_high": float(high)}
            between = sum((groups == group).sum() * (values[groups == group].mean() - values.mean()) ** 2 for group in set(groups))
            total = ((values - values.mean()) ** 2).sum()
            contexts = strongest(neurons, layer, neuron, k, by_size=gated)
            counts = Counter(texts.pairs[text].clean[position] for _, text, position in contexts)
            expected |= {
                "sd": values.std(ddof=1),
                "minimum": values.min(),
                "maximum": values.max(),
                "active_tokens": sum(share.sum() for share in active),
                "dead": not any(share.any() for share in active),
                "position_r2": between / total if total > 0 else np.nan,
                "position_r2_chance": (len(set(groups)) - 1) / (tokens - 1),
                "contexts": len(contexts),
                "token_purity": max(counts.values()) / len(contexts) if len(contexts) > 1 else np.nan,
            }
            close = CLOSE if family in ("gpt2", "gpt_neox", "opt") else LOOSE
            for name, value in expected.items():
                np.testing.assert_allclose(float(row[name]), float(value), **close, err_msg=name)


@torch.no_grad()
def test_contexts_are_those_of_a_sort(family: str) -> None:
    subject, texts, k = families.subject(family, torch.float64), texts_of(), 4
    activity = neuron_activity(subject, texts, contexts=k, execution=Execution(tokens_per_batch=64))
    neurons, _ = run(subject, texts)
    gated = family in ("llama", "qwen3", "gemma2", "gemma3", "phi3")
    for layer in range(3):
        top = activity.layers[layer].contexts
        for neuron in range(neurons[0].shape[2]):
            expected = strongest(neurons, layer, neuron, k, by_size=gated)
            filled = top.filled[:, neuron]
            assert int(filled.sum()) == len(expected)
            found = list(zip(top.text[filled, neuron].tolist(), top.position[filled, neuron].tolist(), strict=True))
            assert found == [(text, position) for _, text, position in expected]
            np.testing.assert_allclose(top.activation[filled, neuron].numpy(), [value for value, _, _ in expected], **LOOSE)
            assert top.token[filled, neuron].tolist() == [texts.pairs[text].clean[position] for text, position in found]


@torch.no_grad()
def test_batching_and_the_side_of_the_padding_do_not_matter(family: str) -> None:
    subject, texts = families.subject(family, torch.float64), texts_of()
    expected = neuron_activity(subject, texts, execution=Execution(tokens_per_batch=10_000))
    close = CLOSE if family in ("gpt2", "gpt_neox", "opt") else LOOSE
    others = [neuron_activity(subject, texts, execution=Execution(tokens_per_batch=size)) for size in (1, 40, 70)]
    mlps = Mlps(subject)
    for pad_id in (0, 50):
        left = Activity(mlps, texts)
        for some in ((3, 4), (0, 1, 2), (5,)):
            batch = collate_pairs([texts.pairs[at] for at in some], indices=some, pad_id=pad_id, padding="left")
            left.add(left.of(mlps, batch)[0])
        others.append(left)
    for other in others:
        pd.testing.assert_frame_equal(other.table(), expected.table(), **close)
        for one, two in zip(other.layers, expected.layers, strict=True):
            assert torch.equal(one.contexts.place, two.contexts.place)
            assert torch.equal(one.contexts.token, two.contexts.token)


@torch.no_grad()
def test_shards_merge_to_the_whole() -> None:
    subject, texts = families.subject("opt", torch.float64), texts_of((9, 14, 31, 9, 50, 12))
    whole = neuron_activity(subject, texts)
    merged, *rest = [neuron_activity(subject, Pairs(some, "shard")) for some in (texts.pairs[:2], texts.pairs[2:3], texts.pairs[3:])]
    for shard in rest:
        merged.merge(shard)
    pd.testing.assert_frame_equal(merged.table(), whole.table(), **CLOSE)
    assert merged.texts == whole.texts
    for one, two in zip(merged.layers, whole.layers, strict=True):
        assert torch.equal(one.contexts.place, two.contexts.place)
        np.testing.assert_allclose(one.position_r2, two.position_r2, **CLOSE)
    with pytest.raises(DataError, match="text 't0' is in both"):
        merged.merge(neuron_activity(subject, texts.first(1)))


@torch.no_grad()
def test_a_text_given_twice_counts_twice_and_one_name_may_stand_for_two_texts() -> None:
    subject = load(families.build("gpt2", torch.float64), dtype="float64", tokenizer=families.tokenizer())
    first, second = (5, 6, 7, 8), (9, 10, 11)
    named = [
        Pairs(tuple(PromptPair(name, row, row) for name, row in zip(names, (first, second, first), strict=True)), "x")
        for names in ("abc", "aaa")
    ]
    apart, alike = (neuron_activity(subject, texts, contexts=2) for texts in named)
    pd.testing.assert_frame_equal(alike.table(), apart.table(), **CLOSE)
    assert alike.n_tokens == 11
    pd.testing.assert_frame_equal(
        memories(subject, alike, named[1], before=2, k=2).drop(columns="text"),
        memories(subject, apart, named[0], before=2, k=2).drop(columns="text"),
        **CLOSE,
    )
    with pytest.raises(DataError, match="'a' names several of the texts"):
        memories(subject, alike, Pairs(named[1].pairs[:2], "y"), before=2, k=2)


@torch.no_grad()
def test_equal_activations_are_kept_in_the_order_of_texts() -> None:
    row = tuple(families.documents(lengths=(8,))[0].tolist())
    texts = from_rows(*[row] * 7)
    subject = families.subject("gpt2", torch.float64)
    for size in (8, 24, 1000):
        top = neuron_activity(subject, texts, contexts=3, execution=Execution(tokens_per_batch=size)).layers[0].contexts
        alive = top.filled[0]
        assert alive.any()
        assert torch.equal(top.text[:, alive], torch.arange(3)[:, None].expand(3, int(alive.sum())))
    mlps, shuffled = Mlps(subject), Activity(Mlps(subject), texts, contexts=3)
    for some in ([6, 1, 4], [5, 0], [3, 2]):
        shuffled.add(shuffled.of(mlps, collate_pairs([texts.pairs[at] for at in some], indices=some))[0])
    assert torch.equal(shuffled.layers[0].contexts.place, top.place)


def test_positions_are_grouped_one_by_one_and_then_by_octaves() -> None:
    positions = torch.arange(5000)
    found = position_group(positions).tolist()
    assert found == [group_of(position) for position in positions.tolist()]
    assert found[:17] == list(range(17))
    assert found[1023] == 63
    assert found[1024] == 64
    assert int(position_group(torch.tensor(2**31 - 1))) == 16 + 27 * 8 - 1


# --- what is refused ----------------------------------------------------------------------------------------------------------------------------


def test_no_texts_and_no_contexts_are_refused() -> None:
    with pytest.raises(DataError, match="there are no texts"):
        neuron_activity(families.subject("gpt2"), Pairs((), "x"))
    with pytest.raises(SettingsError, match="contexts is 0"):
        neuron_activity(families.subject("gpt2"), texts_of(), contexts=0)


@torch.no_grad()
def test_activations_that_overflow_are_refused() -> None:
    model = families.build("opt")
    model.model.decoder.embed_tokens.weight[10] = 1e30  # its square is too large for float32
    with pytest.raises(ModelError, match="neurons of layer 0 are not finite: load it in bfloat16 or float32"):
        neuron_activity(load(model), from_rows((5, 6), (7, 10, 8)))


def test_progress_ends_with_all_texts() -> None:
    calls: list[tuple[str, int, int]] = []
    neuron_activity(
        families.subject("gpt2"), texts_of(), execution=Execution(tokens_per_batch=40, progress=lambda *call: calls.append(call))
    )
    assert calls[0] == ("texts", 0, len(LENGTHS))
    assert calls[-1] == ("texts", len(LENGTHS), len(LENGTHS))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
