"""The section of a series says when the planted change came, and names steps that are not what they should be."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import torch

from mechscope.report.course import curves, meaning
from mechscope.report.sections.dynamics import SECTION
from mechscope.studies.course import changes
from mechscope.subject.series import survey
from tests.studies.test_course import STEPS, roles


@cache
def tables() -> dict[str, pd.DataFrame]:
    """Return the tables of ten steps in which one head becomes an induction head at step 16, another drifts, and step 8 is misplaced."""
    random = np.random.default_rng(2)
    jumping = np.where(np.array(STEPS) >= 16, 0.9, 0.2) + 0.01 * random.standard_normal(len(STEPS))
    drifting = 0.02 * np.arange(len(STEPS)) + 0.01 * random.standard_normal(len(STEPS))
    each = [roles(step, {("induction", "a0.h1"): jumping[i], ("copying", "a1.h0"): drifting[i]}) for i, step in enumerate(STEPS)]
    values = curves({"head_roles": pd.concat(each, ignore_index=True)})
    changed = changes(values)
    changed.insert(2, "meaning", [meaning(table, quantity) for table, quantity in zip(changed["table"], changed["quantity"], strict=True)])
    places = [{"w": torch.tensor([float(i if step != 8 else 40)])} for i, step in enumerate(STEPS)]
    steps = survey(STEPS, [str(step % 256) for step in STEPS], places).assign(source="here")
    return {"series_steps": steps, "series_values": values, "series_changes": changed}


def test_the_first_sentence_says_when_which_head_changed_and_that_it_is_a_change_point() -> None:
    first, *_ = (finding.sentence for finding in SECTION.findings(tables()))
    assert first.startswith("induction, a0.h1 (")
    assert "rose most from step 8 to step 16" in first
    assert "the intervals do not overlap" in first
    assert "its change point is step 16 (interval 16 to 16)" in first
    assert first.endswith("(n = 9 texts).")


def test_it_counts_the_curves_that_jump_and_says_where_the_weights_moved() -> None:
    sentences = [finding.sentence for finding in SECTION.findings(tables())]
    assert "2 of 4 curves have a change point that is beyond the null (n = 10 steps)." in sentences
    assert any(
        text.startswith("The weights moved farthest from step 4 to step 8, by 37.0; at the last step they lie 9.00") for text in sentences
    )


def test_steps_that_repeat_or_lie_off_the_path_are_caveats() -> None:
    said = " ".join(caveat.text for caveat in SECTION.caveats(tables()))
    assert "Step 256 has the weights of step 0" in said
    assert "The weights of step 8 lie far from both neighbours" in said
    assert "of step 4 lie far" not in said


def test_curves_and_heads_are_drawn_with_step_zero_and_the_change_point() -> None:
    drawn = {figure.name: figure for figure in SECTION.drawn(tables())}
    assert set(drawn) == {"dynamics-curves", "dynamics-heads", "dynamics-weights"}
    rows = [row for data in drawn["dynamics-curves"].datasets.values() for row in data]
    assert {row["panel"] for row in rows} == {"induction, a0.h1 · excess", "copying, a1.h0 · excess"}  # their scores go alike
    assert {row["at"] for row in rows if row["panel"].startswith("induction")} == {16}
    assert {row["at"] for row in rows if row["panel"].startswith("copying")} == {None}
    cells = [row for data in drawn["dynamics-heads"].datasets.values() for row in data]
    assert [row["at"] for row in cells] == [str(step) for step in STEPS]
    assert all(figure.svg().startswith("<svg") for figure in drawn.values())
