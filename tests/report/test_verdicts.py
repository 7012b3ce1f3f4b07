"""What headlines say of verdicts: how many changed by more than what matters, and nothing of changes that are too small to be one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mechscope.report.sections import heads, layers, outputs
from mechscope.report.statements import Finding
from mechscope.report.theme import interval
from mechscope.report.verdicts import FEWEST, changed_parts, largest, parts_finding
from mechscope.stats import verdicts
from tests.report.synthetic import tables

LAYERS, HEADS = 6, 8


def tiny() -> dict[str, pd.DataFrame]:
    """Return a study whose changes are sure (every q below .05), and too small to be of interest."""
    made = tables(LAYERS, HEADS)
    made["heads"]["entropy_change_q"] = 0.001
    for name in ("heads", "layers", "outputs"):
        for column in made[name].filter(like="_verdict"):
            made[name][column] = "negligible"
    return made


def test_sure_but_negligible_changes_are_not_headlined() -> None:
    made = tiny()
    found = [*heads.SECTION.findings(made), *layers.SECTION.findings(made)]
    said = [finding.sentence for finding in found]
    assert said[0] == (
        "None of 48 heads changed what they write on the same input by more than 0.060 of it, the smallest effect of interest; "
        "48 negligible (shown to be smaller) (n = 32 documents)."
    ).replace(") (n", "; n")
    assert said[1].startswith("None of 48 heads changed their attention entropy by more than 0.0040 nats")
    assert all(sentence.startswith("None of ") for sentence in said)
    assert not any("largest" in sentence or "focused" in sentence for sentence in said)
    assert all(finding.folded and finding.effect == 0 for finding in found)
    negligible = outputs.SECTION.findings({**made, "smallest_effects": with_outputs(made)})
    assert "negligible: shown to be less than 0.70" in negligible[0].sentence
    assert all(finding.folded for finding in negligible)


def with_outputs(made: dict[str, pd.DataFrame]) -> pd.DataFrame:
    effects = made["smallest_effects"]
    more = effects.iloc[:2].assign(table="outputs", quantity=["kl_base_tuned", "loss_change"], smallest=[0.5, 0.7])
    return pd.concat([effects, more], ignore_index=True)


def test_changes_are_counted_by_their_verdicts_and_not_by_their_p() -> None:
    made = tiny()
    everything = made["heads"]["rows"] == "all"
    chosen = made["heads"].index[everything][[3, 7, 11]]
    made["heads"].loc[chosen, "entropy_change"] = [-0.2, 0.1, -0.3]
    made["heads"].loc[chosen, "entropy_change_verdict"] = "changed"
    made["heads"].loc[made["heads"].index[everything][20:25], "entropy_change_verdict"] = "undecided"
    entropy = heads.SECTION.findings(made)[1]
    top = made["heads"].loc[chosen[2]]
    assert entropy.sentence == (
        "3 of 48 heads changed their attention entropy by more than 0.0040 nats, the smallest effect of interest; 40 negligible (shown to be smaller), "
        f"5 undecided; the largest change is that of {top['component']}, −0.300 {interval(top['entropy_change_low'], top['entropy_change_high'], sign=True)}; "
        "of those that changed 2 became more focused, 1 more diffuse (n = 200 documents)."
    )
    assert entropy.effect == pytest.approx(0.3 / 0.004)


def test_the_largest_is_one_that_changed_where_any_did() -> None:
    table = pd.DataFrame({"x": [0.1, -0.5, 0.3], "x_verdict": ["negligible", "undecided", "changed"], "component": ["a", "b", "c"]})
    assert largest(table, "x")["component"] == "c"
    assert largest(table[table["x_verdict"] != "changed"], "x")["component"] == "b"
    counts = changed_parts({"parts": table.assign(rows="all")}, "parts", "x")
    of = {word: int(count.of({"parts": table.assign(rows="all")})) for word, count in counts.items()}
    assert of == {"": 3, "changed": 1, "negligible": 1, "undecided": 1, "not measured": 0}


def of_parts(table: pd.DataFrame, smallest: float = 0.1) -> Finding:
    effects = pd.DataFrame({"table": ["parts"], "quantity": ["x"], "smallest": [smallest]})
    tables = {"parts": table.assign(rows="all"), "smallest_effects": effects if smallest > 0 else effects.iloc[:0]}
    return parts_finding(tables, "parts", "x", of="heads", what="changed", unit="nats")


def test_without_a_smallest_effect_nothing_is_judged() -> None:
    table = pd.DataFrame({"x": [0.1, 0.2], "x_verdict": "not measured", "n": 20})
    for smallest in (0.1, 0.0):
        finding = of_parts(table, smallest)
        assert finding.sentence.startswith("Whether heads changed: withheld, as no smallest effect of interest was measured or set")
    made = tiny()
    made["heads"]["write_change_verdict"] = made["heads"]["entropy_change_verdict"] = "not measured"
    assert all(finding.withheld and finding.card is None for finding in heads.SECTION.findings(made))


@pytest.mark.parametrize("kind", ["all", "summary"])
def test_heads_are_listed_by_the_size_of_what_they_write(kind: str) -> None:
    made = tables(LAYERS, HEADS)
    view = next(shown.view for shown in heads.SECTION.views(made) if shown.view.kind == kind)
    rows = made["heads"][made["heads"]["rows"] == kind].sort_values("write_change", ascending=False)
    assert [row[0].text for row in view.rows] == rows["component"].head(heads.TOP_HEADS).tolist()
    assert np.all(np.diff(rows["write_change"]) <= 0)


def test_few_documents_are_not_judged_and_no_verdict_is_not_no_change() -> None:
    table = pd.DataFrame({"x": [0.5, 0.6], "x_low": [0.4, 0.5], "x_high": [0.6, 0.7], "x_verdict": ["undecided", "undecided"], "n": [4, 4]})
    assert of_parts(table).sentence == (
        "Whether heads changed by more than 0.10 nats, the smallest effect of interest: withheld, as a verdict needs 12 documents (n = 4 documents)."
    )
    assert of_parts(table.assign(n=20)).sentence.startswith("Of 2 heads none is shown to have changed by more than 0.10 nats")
    assert FEWEST == verdicts.FEWEST
