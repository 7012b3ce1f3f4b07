"""Roles of heads on the page: maps run from chance to the best there is, and only what is significant is called a change."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest

from tests.report import synthetic_reading as invented
from tests.report.drawn import cards_of, figures_of, findings_of, named, rows_of, view_of, views_of


def test_role_map_runs_from_null_to_the_largest_score_and_marks_who_has_it(tables: dict[str, pd.DataFrame]) -> None:
    drawn_rows = {(row["role"], row["component"]): row for row in rows_of(named(figures_of(tables, "roles"), "roles-1"), "strength")}
    own = tables["head_roles"].query("model == 'base'")
    assert len(drawn_rows) == len(own)
    for row in own.to_dict("records"):
        drawn = drawn_rows[row["role"], row["component"]]
        assert drawn["strength"] == pytest.approx((row["score"] - row["null"]) / (1.0 - row["null"]), abs=1e-5)
        assert drawn["has_role"] is row["has_role"]


def test_a_role_without_a_stated_range_runs_to_its_best_head(tables: dict[str, pd.DataFrame]) -> None:
    roles = tables["head_roles"].query("model == 'base'")
    drawn = rows_of(named(figures_of({"head_roles": roles}), "roles"), "strength")
    assert max(row["strength"] for row in drawn if row["role"] == "induction") == 1.0


def test_role_changes_outline_what_is_significant_and_leave_out_the_mean(tables: dict[str, pd.DataFrame]) -> None:
    changes = tables["head_role_changes"]
    drawn = rows_of(named(figures_of(tables, "roles"), "roles-change"), "surely")
    heads = changes[changes["component"] != "all"]
    assert len(drawn) == len(heads)
    assert sum(row["surely"] for row in drawn) == (heads["q"] < 0.05).sum() > 0


def test_role_tables_put_the_mean_over_heads_first(tables: dict[str, pd.DataFrame]) -> None:
    shown = views_of(tables, "roles")
    assert shown[0].heading == "How much of each role the model has"
    whole_ = tables["head_role_changes"].query("component == 'all'").sort_values("change", ascending=False)
    assert [row[0].text for row in shown[0].view.rows] == whole_["role"].tolist()
    assert [row[3].strong for row in shown[0].view.rows] == (whole_["q"] < 0.05).tolist()


def test_a_role_without_bounds_says_so(tables: dict[str, pd.DataFrame]) -> None:
    definitions = tables["role_definitions"].copy()
    definitions.loc[0, ["low", "high"]] = np.nan
    view = view_of(views_of({"role_definitions": definitions}), "What each role means").view
    at = view.columns.index("range")
    assert [row[at].text for row in view.rows[:2]] == ["any number", "0.00 to 1.00"]


def test_each_role_lists_its_highest_heads(tables: dict[str, pd.DataFrame]) -> None:
    own = tables["head_roles"].query("model == 'tuned'")
    rows = view_of(views_of(tables, "roles"), "Heads of each role, tuned").view.rows
    for role in invented.ROLES:
        top = own[own["role"] == role].sort_values("score", ascending=False, kind="stable").head(3)
        assert [row[1].text for row in rows if row[0].text == role] == top["component"].tolist()


def test_roles_without_significant_change_are_said_not_to_have_changed(tables: dict[str, pd.DataFrame]) -> None:
    still = findings_of({"head_role_changes": tables["head_role_changes"].assign(q=0.5)})
    assert still == [
        "No role's mean over heads changed significantly; 0 of 128 single heads' scores changed at q < 0.05; roles gained: 0, lost: 0 "
        "(n = 80 texts)."
    ]
    moved = " ".join(findings_of({"head_role_changes": tables["head_role_changes"].assign(q=0.01, change=-0.2, low=-0.3, high=-0.1)}))
    assert "fell (−0.200 [−0.300, −0.100])" in moved
    assert "rose" not in moved


def test_cards_count_heads_with_a_role(tables: dict[str, pd.DataFrame]) -> None:
    having = tables["head_roles"].query("has_role and model == 'tuned'")["component"].nunique()
    assert f"{having} of 16" in [card.value for card in cards_of({"head_roles": tables["head_roles"]})]


def test_figures_of_small_panels_keep_their_width_in_files_and_in_the_page(tables: dict[str, pd.DataFrame]) -> None:
    figure = named(figures_of(tables, "roles"), "roles-1")
    assert "facet" in figure.page_spec()
    assert "width" not in figure.export()
    width = float(re.findall(r'<svg[^>]* width="([\d.]+)"', figure.svg())[0])
    assert 300 < width < 1100
    assert not math.isnan(width)
