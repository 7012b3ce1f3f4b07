"""Distances between checkpoints are those of their weights; repeated and misplaced ones are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mechscope.errors import ModelError
from mechscope.subject.load import load
from mechscope.subject.series import distance, sketch, survey
from tests import families
from tests.subject.saved import save, save_adapter


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_distance_of_sketches_is_that_of_the_weights_as_they_act(family: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", family)
    adapted = load(save_adapter(tmp_path / "adapter", base, family))
    one, other = dict(load(base).weights()), dict(adapted.weights())
    truth = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5
    assert truth > 0.1
    whole = distance(*(sketch(one, entries=10**6) for one in (adapted.without_adapter(), adapted)))
    assert whole == pytest.approx(truth, rel=1e-5)  # weights are kept whole
    part = distance(sketch(adapted.without_adapter(), entries=256), sketch(adapted, entries=256))
    assert part == pytest.approx(truth, rel=0.25)
    assert part != whole


def test_a_sketch_keeps_few_entries_and_estimates_squares_without_bias() -> None:
    subject = families.subject("gpt2")
    sizes = {name: weight.numel() for name, weight in subject.weights()}
    for _, weight in subject.weights():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    changed = sketch(subject, entries=64)
    assert {name: values.numel() for name, values in changed.items()} == {name: min(size, 64) for name, size in sizes.items()}
    size = sum(float(values.double().square().sum()) for values in changed.values())
    assert size == pytest.approx(sum(float(weight.double().square().sum()) for _, weight in subject.weights()), rel=0.1)


def points(*places: tuple[float, float]) -> list[dict[str, Tensor]]:
    return [{"weight": torch.tensor(place)} for place in places]


def test_repeated_weights_are_named_and_a_step_off_the_path_jumps() -> None:
    # along a line, but that step 3 has the weights of the end, and step 5 repeats step 4
    found = survey([0, 1, 2, 3, 4, 5, 6], list("abcgeeg"), points((0, 0), (1, 0), (2, 0), (9, 0), (3, 0), (3, 0), (9, 0)))
    assert found["step"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert found["repeats"].fillna(-1).tolist() == [-1, -1, -1, -1, -1, 4, 3]
    assert found.loc[found["jumps"], "step"].tolist() == [3]
    assert found["moved"].tolist()[1:] == [1, 1, 7, 6, 0, 6]
    assert found["away"].tolist() == [0, 1, 2, 9, 3, 3, 9]
    assert found["size"].tolist() == found["away"].tolist()


def test_steps_of_a_straight_path_and_of_a_random_walk_do_not_jump() -> None:
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn((40, 500), generator=generator).cumsum(0)
    line = torch.arange(40)[:, None] * torch.ones(500)
    for path in (walk, line):
        found = survey(range(40), [str(i) for i in range(40)], [{"weight": row} for row in path])
        assert not found["jumps"].any()


def test_weights_of_different_models_are_refused() -> None:
    with pytest.raises(ModelError, match="weights of other names or shapes"):
        distance(sketch(families.subject("gpt2")), sketch(families.subject("llama")))
