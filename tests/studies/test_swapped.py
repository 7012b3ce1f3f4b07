"""Base and tuned exchanged: of a fine-tuning that made the loss higher nothing is said that presupposes an improvement."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mechscope.circuits.gain import tuned_edges
from mechscope.instrument.execution import Execution
from mechscope.report.sections.matters import SECTION
from mechscope.studies.causal import measure_importance
from mechscope.studies.paper_2505_17073.circuits import SIZE, few_edges_carry_gain
from mechscope.studies.paper_2505_17073.interventions import heads_matter, layers_carry
from mechscope.studies.paper_2505_17073.judgement import Judgement, Scope
from mechscope.studies.selection import Chosen
from mechscope.subject import Components, Pair, pair
from tests import families
from tests.circuits.test_gain import TEXTS, trained

FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])
REASON = "fine-tuning did not lower the loss on these"


def measured(both: Pair) -> dict[str, pd.DataFrame]:
    """Return the tables of the interventions and of the edges that carry the gain."""
    random = np.random.default_rng(0)
    layers = pd.DataFrame({"rows": "all", "layer": range(families.LAYERS), "kl_base_tuned": random.random(families.LAYERS)})
    heads = layers.merge(pd.DataFrame({"head": range(families.HEADS)}), how="cross")
    tables = measure_importance(
        both,
        TEXTS,
        Chosen(Components.parse("layers:1"), Components.parse("a0.h1,a2.h3")),
        {"layers": layers, "heads": heads.assign(kl_base_tuned=random.random(len(heads)))},
        rows="all",
        source="zero",
        random_sets=45,
        execution=Execution(),
    )
    edges = tuned_edges(both, TEXTS, fractions=(SIZE, 1.0), random=4, metric="loss")
    return {**tables, "circuit_gain": edges.table}


def judged(tables: dict[str, pd.DataFrame]) -> list[Judgement]:
    judgements = [judge(tables, Scope()) for judge in (layers_carry, heads_matter, few_edges_carry_gain)]
    assert all(judgement is not None for judgement in judgements)
    return [judgement for judgement in judgements if judgement is not None]


@FAMILIES
def test_exchanged_models_have_no_shares_and_no_verdict_on_an_improvement(family: str) -> None:
    both = trained(family, "loss")
    there, back = measured(both), measured(pair(both.tuned, both.base))
    shares = {"cross_model": "normalised", "layer_sets": "share", "circuit_gain": "share"}
    for name, column in shares.items():
        assert there[name][column].notna().all(), name
        assert (there[name]["withheld"] == "").all(), name
        assert back[name][column].isna().all(), name
        assert back[name]["withheld"].str.startswith(REASON).all(), name
    assert back["importance"]["rho"].isna().all()
    assert not any(judgement.verdict == "withheld" for judgement in judged(there))
    for judgement in judged(back):
        assert judgement.verdict == "withheld", judgement.statement
        assert judgement.measured.startswith(f"Withheld: {REASON}")
        assert np.isnan([judgement.value, judgement.low, judgement.high]).all()
        assert judgement.overturn
    # what the gain would be is told with its sign, and the page says no number of it
    assert ": −" in back["layer_sets"]["withheld"][0]
    (finding,) = SECTION.findings(back)
    assert "withheld, as fine-tuning did not lower the loss" in finding.sentence
    assert "%" not in finding.sentence


def test_a_model_and_itself_gain_nothing_that_could_be_carried() -> None:
    base = trained("gpt2", "loss").base
    for judgement in judged(measured(pair(base, base))):
        assert judgement.verdict == "withheld"
