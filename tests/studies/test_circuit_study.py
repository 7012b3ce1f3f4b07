"""The circuit of summarizing within the study: it is found before and after fine-tuning, claims are made of it, and LoRA is placed by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechscope.errors import SettingsError
from mechscope.settings import resolve
from mechscope.studies.jobs.summarization import JOB
from tests.studies.conftest import TINY
from tests.studies.running import run


def test_the_study_finds_the_circuit_of_summarizing_and_places_lora_by_it(tiny_model: Path, tmp_path: Path) -> None:
    changed = {
        "circuit": True,
        "circuit_documents": 8,
        "circuit_size": 0.05,
        "circuit_method": "eap",
        "causal": False,
        "test_documents": 12,
    }
    strategies = {"strategies": "standard,circuit,random_circuit,none", "protocols": "equal_parameters"}
    tables = run(JOB, tmp_path / "run", base=str(tiny_model), **{**TINY, **changed, **strategies}).tables
    assert set(tables["circuit_summary"]["model"]) == {"base", "tuned"}
    claims = tables["claims"].set_index("claim")
    assert {"circuit_changed", "few_edges_carry_gain", "circuit_vs_random.equal_parameters"} <= set(claims.index)
    bakeoff = tables["bakeoff"].set_index("strategy")
    components = tables["circuit_components"]
    tuned = set(components.loc[components["model"] == "tuned", "component"])
    assert set(bakeoff.loc[["circuit"], "components"].iloc[0].split(",")) == tuned
    assert not (bakeoff.loc[["random_circuit"], "components"] == bakeoff.loc[["circuit"], "components"].iloc[0]).any()
    budget = bakeoff.loc[["standard"], "trainable_parameters"].iloc[0]
    assert bakeoff.loc[["circuit"], "trainable_parameters"].iloc[0] == pytest.approx(budget, rel=0.06)


def test_a_study_with_a_wrong_circuit_setting_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(SettingsError, match="eap-gi"):
        resolve(JOB.settings, base="there/is/none", **{**TINY, "circuit_method": "eap-gi"})
