"""Causal scrubbing: how much of the behaviour is left when what a hypothesis calls irrelevant is exchanged."""

from __future__ import annotations

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.intervals import interval_plot
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import WITHHELD, few_texts
from mechscope.report.statements import Card, Caveat, Finding
from mechscope.report.theme import interval, label, percent
from mechscope.report.theme import number as written

_RUNS = {"full": "the model itself", "everything": "every head and MLP exchanged", "scrubbed": "the hypothesis"}
_MEASURED: dict[str, Column | str] = {
    "metric": "the metric",
    "n": "texts",
    "value": number("mean metric of the run", "of the metric"),
    "effect": number("its mean difference from the model itself", "of the metric", "se", "low", "high", bare=True),
    "recovered": number("(value − everything exchanged) / (model − everything exchanged), a ratio of means", "share", "low", "high"),
    "withheld": WITHHELD,
}
SCRUB = table(
    "One row per run, texts averaged over the draws.",
    run="full (the model itself), everything (every head and MLP takes another text's value), scrubbed (the hypothesis)",
    **_MEASURED,
)
SAMPLES = table("One row per draw of the scrubbed run.", sample="the draw", **_MEASURED)
HYPOTHESIS = table(
    "One row per part of the hypothesis.",
    component="the components",
    depends_on="what their values may depend on: nothing, answers, wrong_answers, a segment; labels given: a list in the file",
    labels="different labels among the texts",
    alone="texts that are the only ones with their label: they keep their own value",
    n="texts",
)


def _figures(tables: Tables) -> list[Figure]:
    if "scrub" not in tables:
        return []
    runs = tables["scrub"]
    rows = runs.assign(row=[_RUNS.get(str(run), str(run)) for run in runs["run"]]).rename(columns={"effect": "value", "value": "mean"})
    return [
        interval_plot(
            rows,
            name="scrub",
            title="What is left",
            axis=f"{runs['metric'].iloc[0]} minus that of the model itself",
            caption="Zero: nothing is lost. Rule: 95\u202f% interval over texts.",
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "scrub" in tables:
        view = Table(tables["scrub"]).mapped("run", "run", lambda run: _RUNS.get(str(run), str(run))).numbers("value", "metric")
        view = view.numbers("effect", "effect", ends=("low", "high"), sign=True)
        view = view.shares("recovered", "recovered", ends=("recovered_low", "recovered_high")).numbers("n", "texts")
        shown.append(Shown("Runs", view.view(), terminal=True))
    if "scrub_hypothesis" in tables:
        parts = Table(tables["scrub_hypothesis"]).words("component", "components").words("depends_on", "may depend on")
        parts = parts.numbers("labels", "labels").numbers("alone", "texts alone with their label").numbers("n", "texts")
        shown.append(Shown("The hypothesis", parts.view()))
    if "scrub_samples" in tables:
        draws = Table(tables["scrub_samples"]).numbers("sample", "draw").numbers("value", "metric")
        draws = draws.shares("recovered", "recovered", ends=("recovered_low", "recovered_high"))
        shown.append(Shown("Single draws", draws.view(), folded=True))
    return shown


def _findings(tables: Tables) -> list[Finding]:
    if "scrub" not in tables:
        return []
    runs = {row["run"]: row for _, row in tables["scrub"].iterrows()}
    scrubbed, full, everything = (runs[name] for name in ("scrubbed", "full", "everything"))
    rows, n, left = (scrubbed, full, everything), scrubbed["n"], f"of {scrubbed['metric']}"
    if scrubbed.get("withheld"):
        card = Card("withheld", f"how much {left} is left under the hypothesis", str(scrubbed["withheld"]))
        said = f"the share {left} that is left under the hypothesis"
        return [Finding(said, n=n, rows=rows, withheld=str(scrubbed["withheld"]), card=card, table="scrub")]
    ends = interval(100 * scrubbed["recovered_low"], 100 * scrubbed["recovered_high"])
    return [
        Finding(
            f"Under the hypothesis {percent(scrubbed['recovered'])} {ends} {left} is left: {written(scrubbed['value'])}, between "
            f"{written(everything['value'])} with everything exchanged and {written(full['value'])} of the model itself",
            n=n,
            rows=rows,
            effect=float(scrubbed["recovered"]),
            card=Card(percent(scrubbed["recovered"]), f"{left} left under the hypothesis", ends),
            table="scrub",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    said = []
    if "scrub_hypothesis" in tables:
        parts = tables["scrub_hypothesis"]
        said += [
            Caveat(
                f"{written(int(row['alone']))} of {written(int(row['n']))} texts are the only ones with their label at {label(row['component'])} and keep "
                "their own value: they do not test the hypothesis.",
                "scrub",
            )
            for row in parts[parts["alone"] > 0].to_dict("records")
        ]
    return [
        *said,
        Caveat(
            "What the hypothesis does not name computes as it does, and values come from ordinary runs of other texts: a hypothesis that names little keeps "
            "much."
        ),
        *few_texts(tables, "scrub"),
    ]


SECTION = Section(
    id="scrub",
    heading="Causal scrubbing",
    intro=(
        "Components take their values from other texts wherever the hypothesis says that it does not matter, all at once; if the hypothesis is right, the "
        "metric stays (Chan et al. 2022, “Causal Scrubbing”, simplified: values are not scrubbed recursively). Two controls give the scale: the model as it "
        "is (100\u202f%), and every head and MLP taken from other texts (0\u202f%). Intervals are over texts, averaged over the draws."
    ),
    tables={"scrub": SCRUB, "scrub_samples": SAMPLES, "scrub_hypothesis": HYPOTHESIS},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
