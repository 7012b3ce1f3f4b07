"""What headlines say of verdicts: how many changed by more than what matters, and nothing of changes that are too small to be one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mechscope.report.sections import heads, layers, outputs
from mechscope.report.verdicts import FEWEST, counted, in_words, largest
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
    said = [*heads.SECTION.findings(made), *layers.SECTION.findings(made)]
    assert said[0].startswith(
        "None of 48 heads changed what they write on the same input by more than 0.060 of it, the smallest effect of interest; "
        "48 negligible (shown to be smaller), 0 undecided"
    )
    assert said[1].startswith("None of 48 heads changed their attention entropy by more than 0.0040 nats")
    assert all(sentence.startswith("None of ") for sentence in said)
    assert not any("changed most" in sentence or "focused" in sentence for sentence in said)
    cards = [*heads.SECTION.cards(made), *layers.SECTION.cards(made)]
    assert [card.value for card in cards] == ["0 of 48", "200"]
    assert "negligible: shown to be less than" in outputs.SECTION.findings({**made, "smallest_effects": with_outputs(made)})[0]


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
    assert entropy == (
        "3 of 48 heads changed their attention entropy by more than 0.0040 nats, the smallest effect of interest; 40 negligible (shown to be smaller), "
        "5 undecided; of those that changed 2 became more focused, 1 more diffuse (over 200 documents)."
    )


def test_the_largest_is_one_that_changed_where_any_did() -> None:
    table = pd.DataFrame({"x": [0.1, -0.5, 0.3], "x_verdict": ["negligible", "undecided", "changed"], "component": ["a", "b", "c"]})
    assert largest(table, "x")["component"] == "c"
    assert largest(table[table["x_verdict"] != "changed"], "x")["component"] == "b"
    assert counted(table, "x") == {"changed": 1, "negligible": 1, "undecided": 1, "not measured": 0}


def test_without_a_smallest_effect_nothing_is_judged() -> None:
    table = pd.DataFrame({"x": [0.1, 0.2], "x_verdict": "not measured"})
    sentence = in_words(table, "x", float("nan"), of="heads", what="moved", unit="nats")
    assert sentence.startswith("Whether heads moved is not judged: no smallest effect of interest")
    made = tiny()
    made["heads"]["write_change_verdict"] = made["heads"]["entropy_change_verdict"] = "not measured"
    assert heads.SECTION.cards(made) == []
    assert all("not judged" in sentence for sentence in heads.SECTION.findings(made))


@pytest.mark.parametrize("kind", ["all", "summary"])
def test_heads_are_listed_by_the_size_of_what_they_write(kind: str) -> None:
    made = tables(LAYERS, HEADS)
    view = next(shown.view for shown in heads.SECTION.views(made) if shown.view.kind == kind)
    rows = made["heads"][made["heads"]["rows"] == kind].sort_values("write_change", ascending=False)
    assert [row[0].text for row in view.rows] == rows["component"].head(heads.TOP_HEADS).tolist()
    assert np.all(np.diff(rows["write_change"]) <= 0)


def test_few_documents_are_not_judged_and_no_verdict_is_not_no_change() -> None:
    table = pd.DataFrame({"x": [0.5, 0.6], "x_verdict": ["undecided", "undecided"], "n": [4, 4]})
    said = in_words(table, "x", 0.1, of="heads", what="changed", unit="nats")
    assert said == "Whether heads changed by more than 0.10 nats, the smallest effect of interest, is not judged: 4 documents of at least 8"
    said = in_words(table.assign(n=20), "x", 0.1, of="heads", what="changed", unit="nats")
    assert said.startswith("Of 2 heads none is shown to have changed by more than 0.10 nats")
    assert FEWEST == verdicts.FEWEST
