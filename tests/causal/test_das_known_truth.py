"""Alignment search finds a planted subspace, says so on pairs it has not seen, and says how wide it is where it knows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mechscope.causal.das import das, random_alignment, train_das
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.instrument.execution import Execution
from mechscope.stats.inference import share_interval
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.planted import FIRST, TEST, TRAIN, logits, planted


def angles(one: Tensor, two: Tensor) -> Tensor:
    """Return the principal angles between two subspaces, in degrees."""
    return torch.linalg.svdvals(one.T @ two).clamp(max=1).acos().rad2deg()


def test_the_planted_model_answers_by_the_class_of_its_last_token() -> None:
    subject, _ = planted()
    for pair in TEST:
        assert (int(logits(subject, pair.clean).argmax()),) == pair.wrong_answers
        assert (int(logits(subject, pair.corrupt).argmax()),) == pair.answers


def test_the_planted_plane_is_found_and_judged_beside_its_controls() -> None:
    subject, plane = planted()
    table = das(subject, TRAIN, TEST, layers=[1], dimensions=2, epochs=25, learning_rate=0.03, execution=Execution(tokens_per_batch=100))
    accuracy = dict(zip(table["method"], table["accuracy"], strict=True))
    assert list(table["method"]) == ["das", "random", "random", "random", "full", "none"]
    assert accuracy["das"] > 0.95
    assert (table["accuracy"][table["method"] == "random"] < 0.1).all()
    assert accuracy["full"] == 1
    assert accuracy["none"] == 0
    assert list(table["dimensions"]) == [2, 2, 2, 2, 32, 0]
    for row in table.itertuples():
        each: Any = row
        assert (each.low, each.high) == share_interval(each.correct, 100)
        assert each.n == 100
        assert each.accuracy == each.correct / 100
    learned = train_das(subject, TRAIN, layer=1, dimensions=2, epochs=25, learning_rate=0.03, execution=Execution(tokens_per_batch=100))
    assert learned.accuracy(subject, TEST) == accuracy["das"]
    assert angles(learned.rotation, plane).max() < 10
    assert angles(random_alignment(subject, layer=1, dimensions=2).rotation, plane).max() > 45
    assert learned.curve["loss"].iloc[-1] < 0.5 * learned.curve["loss"].iloc[0]


def test_boundless_search_finds_the_plane_and_how_small_it_is() -> None:
    subject, plane = planted()
    learned = train_das(
        subject, TRAIN, layer=2, boundless=True, epochs=40, learning_rate=0.02, size_penalty=2.0, execution=Execution(tokens_per_batch=100)
    )
    assert learned.accuracy(subject, TEST) > 0.95
    assert learned.dimensions == 2
    assert learned.rotation.shape == (32, learned.dimensions)
    assert angles(learned.rotation, plane).max() < 10
    behind = dict(zip(learned.widths["dimensions"], learned.widths["behind_best_p"], strict=True))
    assert behind[1] < 0.05 <= behind[2]
    assert learned.widths.loc[learned.widths["chosen"], "dimensions"].tolist() == [2]


@lru_cache(maxsize=1)
def on_a_line() -> tuple[Subject, Tensor]:
    """Build a model whose answer, one of two, stands in one random direction of the last token's residual stream, among noise."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(families.config("llama")).double().eval()
    basis = torch.linalg.qr(torch.randn(families.WIDTH, families.WIDTH, dtype=torch.float64)).Q
    carriers = torch.arange(FIRST, families.VOCABULARY)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        features = torch.randn(families.VOCABULARY, families.WIDTH, dtype=torch.float64)
        features[carriers, 0] = 3 * signs[carriers % 2]
        model.model.embed_tokens.weight.copy_(features @ basis.T)
        model.lm_head.weight.zero_()
        model.lm_head.weight[3:5] = 2 * signs[:, None] * basis[:, :1].T
    return load(model), basis[:, :1]


def line_pairs(n: int, *, seed: int) -> Pairs:
    """Return base and source texts whose last tokens are of different signs; the answer is the source's."""
    random = np.random.default_rng(seed)
    pairs: list[PromptPair] = []
    while len(pairs) < n:
        base, source = (random.integers(FIRST, families.VOCABULARY, 4).tolist() for _ in range(2))
        labels = [3 + text[-1] % 2 for text in (base, source)]
        if labels[0] != labels[1]:
            pairs.append(PromptPair(f"line {seed}.{len(pairs)}", tuple(base), tuple(source), (labels[1],), (labels[0],)))
    return Pairs(tuple(pairs), "line")


def assert_the_line_is_found_one_dimension_wide(seed: int) -> None:
    """A soft boundary alone stops at 20 of 32 dimensions, whatever the seed."""
    subject, line = on_a_line()
    found = train_das(subject, line_pairs(150, seed=seed), layer=1, boundless=True, execution=Execution(seed=seed))
    assert found.convergence.converged
    assert found.dimensions == found.width == 1
    assert angles(found.rotation, line).max() < 25
    assert found.accuracy(subject, line_pairs(100, seed=1000 + seed)) == 1
    assert found.widths["dimensions"].max() > 10  # it was beside a wide one that it was judged


def test_a_variable_of_one_dimension_has_width_one() -> None:
    for seed in range(3):
        assert_the_line_is_found_one_dimension_wide(seed)


@pytest.mark.slow
def test_a_variable_of_one_dimension_has_width_one_in_twenty_of_twenty_seeds() -> None:
    for seed in range(20):
        assert_the_line_is_found_one_dimension_wide(seed)


def test_a_width_is_withheld_where_its_training_has_not_converged() -> None:
    subject, _ = on_a_line()
    train, test = line_pairs(60, seed=0), line_pairs(30, seed=1)
    for epochs in (2, 8):
        found = train_das(subject, train, layer=1, boundless=True, epochs=epochs, execution=Execution(tokens_per_batch=1000))
        assert not found.convergence.converged
        assert np.isnan(found.width)
    table = das(subject, train, test, layers=[1], boundless=True, epochs=2, controls=1)
    learned, *others = table.to_dict("records")
    assert not learned["converged"]
    assert np.isnan(learned["width"])
    assert "too few to tell" in learned["unconverged"]
    assert all(row["converged"] and not row["unconverged"] and np.isnan(row["width"]) for row in others)


def test_a_fixed_number_of_dimensions_is_no_finding() -> None:
    subject, _ = on_a_line()
    found = train_das(subject, line_pairs(60, seed=0), layer=1, dimensions=3, epochs=50)
    assert found.convergence.converged
    assert np.isnan(found.width)
