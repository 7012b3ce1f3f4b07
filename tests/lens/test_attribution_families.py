"""Direct logit attribution of families whose blocks are built otherwise: the parts add up to what plain Hugging Face says."""

from __future__ import annotations

import pytest
import torch

from mechscope.errors import ModelError
from mechscope.instrument import load
from mechscope.lens.attribution import attribute_logits
from tests.causal.pairs import random_pairs
from tests.matrix.plain import build


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granite", "glm4"])
def test_the_parts_add_up_to_the_metric(family: str) -> None:
    model, pairs = build(family, 0, torch.float64), random_pairs(3)
    found = attribute_logits(load(model), pairs)
    for at, pair in enumerate(pairs.pairs):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([pair.clean]), use_cache=False).logits[0, -1]
        expected = float(logits[list(pair.answers)].mean() - logits[list(pair.wrong_answers)].mean())
        assert found.effects[at].sum() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_neurons_of_a_mixture_of_experts_are_refused_one_by_one_only() -> None:
    with pytest.raises(ModelError, match="is a mixture of 4 experts: it has no neurons"):
        attribute_logits(load(build("mixtral", 0, torch.float64)), random_pairs(2), neurons=(1,))
