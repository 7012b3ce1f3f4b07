"""Counterfactual runs: what the metric becomes when components take their values from elsewhere."""

from __future__ import annotations

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.intervals import interval_plot
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, table
from mechscope.report.shared import NORMALISED, WITHHELD, effect_columns, few_texts, share_of, sized
from mechscope.report.statements import Caveat, Finding
from mechscope.report.theme import interval, label
from mechscope.report.theme import number as written

COUNTERFACTUAL = table(
    "One row per declared run.",
    **effect_columns(component="the run's name", site="counterfactual", positions="all"),
    normalised=NORMALISED,
    withheld=WITHHELD,
    changed="its components, and where they take their values from",
)


def _figures(tables: Tables) -> list[Figure]:
    runs = tables["counterfactual"]
    rows = runs.rename(columns={"component": "row", "effect": "value", "value": "mean"})
    return [
        interval_plot(
            rows,
            name="counterfactual",
            title="What each run changes",
            axis=f"change of {runs['metric'].iloc[0]}",
            caption="Point: mean over texts of the changed run minus the unchanged one. Rule: 95\u202f% interval over texts.",
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    view = Table(tables["counterfactual"]).words("component", "run").texts("changed", "takes its values from").numbers("value", "metric")
    view = view.numbers("effect", "effect", ends=("low", "high"), sign=True, bold="q")
    view = view.shares("normalised", "normalised", ends=("normalised_low", "normalised_high")).numbers("q", "q").numbers("n", "texts")
    return [Shown("Declared runs", view.view(), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    return [
        Finding(
            f"Run “{label(row['component'])}” changes {row['metric']} by {written(row['effect'], sign=True)} "
            f"{interval(row['low'], row['high'], sign=True)} to {written(row['value'])}, "
            f"{share_of(row, 'normalised', 'the way from the corrupt run to the clean one')}",
            n=row["n"],
            rows=(row,),
            effect=sized(row),
            folded=bool(row["q"] >= Q_SIGNIFICANT),
            table="counterfactual",
        )
        for _, row in tables["counterfactual"].head(5).iterrows()
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat("A declared run has no control but the other declared ones: declare one with as many other components too."),
        *few_texts(tables, "counterfactual"),
    ]


SECTION = Section(
    id="counterfactual",
    heading="Counterfactual runs",
    intro=(
        "Each run reads one text while the components it names take their values from elsewhere: the other text, another text of the batch, a mean, a number, "
        "or another model (Vig et al. 2020 for values of a counterfactual text; Prakash et al. 2024 for another model's). Components that are not named "
        "compute on what they are given. Each effect is that run minus the unchanged one on the same text, the mean over texts with a 95\u202f% interval; q is "
        "Benjamini–Hochberg over the table."
    ),
    tables={"counterfactual": COUNTERFACTUAL},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
