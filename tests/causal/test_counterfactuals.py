"""A declared world is the run with those edits, and equals the single techniques where it is one of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechscope.causal import CounterfactualRun, Text, ablate_together, mean_of, patch, run_counterfactuals
from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import collate_pairs
from mechscope.errors import SettingsError
from mechscope.instrument import Edit, intervene, observed, record
from mechscope.instrument.walk import model_inputs
from tests import families
from tests.causal.pairs import random_pairs, telling_pairs

PAIRS = random_pairs(4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
def test_one_component_from_the_other_text_is_a_patch_and_a_set_at_zero_is_an_ablation(family: str) -> None:
    subject = families.subject(family, torch.float64)
    found = run_counterfactuals(subject, PAIRS, {"patched": {"a1.h2": "corrupt"}, "ablated": {"a0.h1,m2": "zero"}})
    np.testing.assert_allclose(found.values[0], patch(subject, PAIRS, direction="noise", components="a1.h2").values[0], rtol=1e-12)
    ablated = ablate_together(subject, PAIRS, ["a0.h1,m2"], metric="logit-diff")
    np.testing.assert_allclose(found.values[1], ablated.values[0], rtol=1e-12)
    assert list(found.table["component"]) == ["patched", "ablated"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_every_component_takes_its_value_from_where_the_run_says(family: str) -> None:
    subject, other = families.subject(family, torch.float64), families.subject(family, torch.float64, 5)
    mean = mean_of(subject, PAIRS, ["z", "mlp_output"])
    mixed: CounterfactualRun = {"a0.h1": "corrupt", "m0": Text("clean", model=other), "a2.h3,m1": mean}
    found = run_counterfactuals(subject, PAIRS, {"mixed": mixed})
    batch = collate_pairs(PAIRS.pairs)
    values = {}
    for name, (model, ids) in {"corrupt": (subject, batch.corrupt), "other": (other, batch.clean)}.items():
        with torch.no_grad(), record(model, "z", "mlp_output") as recording, observed(model):
            model.plain(**model_inputs(ids, batch.real), use_cache=False)
        values[name] = recording
    edits = [
        Edit("z", 0, values["corrupt"]["z", 0], heads=(1,)),
        Edit("mlp_output", 0, values["other"]["mlp_output", 0]),
        Edit("z", 2, mean.values["z", 2], heads=(3,)),
        Edit("mlp_output", 1, mean.values["mlp_output", 1]),
    ]
    with torch.no_grad(), observed(subject), intervene(subject, *edits):
        logits = subject.plain(**model_inputs(batch.clean, batch.real), use_cache=False).logits
    np.testing.assert_allclose(found.values[0], pair_metric("logit-diff", batch)(logits).numpy(), rtol=1e-9)


def test_an_empty_declaration_is_the_run_itself() -> None:
    subject = families.subject("gpt2", torch.float64)
    found = run_counterfactuals(subject, telling_pairs(subject, 8), {"nothing": {}}, base="corrupt")
    np.testing.assert_allclose(found.values[0], found.unchanged, rtol=1e-12)
    assert found.table["normalised"][0] == pytest.approx(0.0, abs=1e-12)


def test_a_component_with_two_sources_is_refused() -> None:
    subject = families.subject("gpt2")
    with pytest.raises(SettingsError, match=r"run 'torn' gives a1\.h0 two sources: name it once"):
        run_counterfactuals(subject, PAIRS, {"torn": {"a1.h0": "zero", "layers:1": "corrupt"}})
    with pytest.raises(SettingsError, match="no run was declared"):
        run_counterfactuals(subject, PAIRS, {})
