"""Methods of circuit discovery on models whose circuit is known."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.statements import Caveat, Derived, Finding
from mechscope.report.theme import label
from mechscope.report.theme import number as written

BENCHMARK = table(
    "One row per model and method.",
    program="what the model does, and how sharply its heads attend",
    method="how edges were scored",
    circuit="edges of the known circuit",
    edges="edges of the model",
    n="prompt pairs that edges were scored on",
    auroc=number("probability that an edge of the circuit has a larger |score| than one outside it", "probability"),
    auroc_chance=number("the same, exceeded by one random order of the edges in forty", "probability"),
    precision=number("share of the circuit among as many edges of largest |score|; also the recall there", "share"),
    found="whether these are exactly the circuit",
    cpr=number("area under the faithfulness of circuits of rising size, on other pairs; 1 at best, or above", "share"),
    cmd=number("area of their |1 − faithfulness|; 0 at best", "share"),
    forward=number("forward passes over all pairs", "passes"),
    backward=number("backward passes", "passes"),
)


def _views(tables: Tables) -> list[Shown]:
    view = Table(tables["circuit_benchmark"]).words("program", "model").words("method", "method").numbers("auroc", "AUROC")
    view = (
        view.numbers("auroc_chance", "by chance, 97.5\u202f%")
        .numbers("precision", "precision at true size")
        .numbers("cpr", "CPR")
        .numbers("cmd", "CMD")
    )
    view = view.numbers("forward", "forward").numbers("backward", "backward").numbers("n", "pairs")
    return [Shown("Methods beside known circuits", view.view(), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    return [_finding(tables, str(method), own) for method, own in tables["circuit_benchmark"].groupby("method", sort=False)]


def _finding(tables: Tables, method: str, own: pd.DataFrame) -> Finding:
    here = (("method", "==", method),)
    found, every = Derived("circuit_benchmark", (*here, ("found", "==", True))), Derived("circuit_benchmark", here)
    worst, lowest = own.nsmallest(1, "auroc").iloc[0], ""
    if not worst["found"]:
        beside = "above" if worst["auroc"] > worst["auroc_chance"] else "not above"
        lowest = (
            f"; its lowest AUROC is {written(worst['auroc'])}, of {label(worst['program'])}, {beside} the {written(worst['auroc_chance'])} "
            "that one random order in forty exceeds"
        )
    return Finding(
        f"Method {label(method)} finds exactly the circuit in {found.written(tables)} of {every.written(tables)} models{lowest}",
        n=own["n"].iloc[0],
        unit="pairs of each model",
        rows=(worst,),
        derived=(found, every),
        effect=found.of(tables) / every.of(tables),
        table="circuit_benchmark",
    )


SECTION = Section(
    id="circuit-benchmark",
    heading="Methods beside known circuits",
    intro=(
        "Models whose circuit is written into their weights, among heads and MLPs that do something else. A method scores every edge; the largest |scores|, as "
        "many as the circuit has edges, should be the circuit. Clean and corrupt texts have nothing in common but their length."
    ),
    unit="pairs",
    tables={"circuit_benchmark": BENCHMARK},
    views=_views,
    findings=_findings,
    caveats=lambda tables: [
        Caveat(
            "Written models attend sharply and superpose nothing: methods that fail here fail on easy ones, and success here is no promise elsewhere."
        ),
    ],
)
