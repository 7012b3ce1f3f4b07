"""A model whose circuit is known: which edges are written into its weights, and what they carry."""

from __future__ import annotations

from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, table
from mechscope.report.statements import Caveat, Derived, Finding
from mechscope.report.theme import label

GROUND_TRUTH = table(
    "One row per edge that is written between embedding and logits.",
    program="what the model does",
    edge="the edge, such as embed->a0.h0<v>",
    carries="variables that its receiver reads of what its sender writes",
    told="whether what it carries differs between texts: the circuit that methods are judged by",
    of="edges of the model",
)


def _views(tables: Tables) -> list[Shown]:
    view = Table(tables["ground_truth"]).words("edge", "edge").texts("carries", "carries").words("told", "in the circuit")
    return [Shown("Written edges", view.view(), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    edges = tables["ground_truth"]
    written, told = Derived("ground_truth"), Derived("ground_truth", (("told", "==", True),))
    row = edges.iloc[0]
    return [
        Finding(
            f"Of {int(row['of']):,} edges of the model {label(row['program'])}, {written.written(tables)} are written between embedding and logits; "
            f"{told.written(tables)} of them carry what differs between texts and are its circuit",
            derived=(written, told),
            rows=(row,),
            table="ground_truth",
        )
    ]


SECTION = Section(
    id="ground-truth",
    heading="The written circuit",
    intro=(
        "The model is a program written into the weights of a GPT-2: the edges of its circuit are the reads and writes that are not zero. Other heads and MLPs "
        "compute something that never reaches the logits. The folder holds the model, its circuit (circuit.txt, circuit.json) and prompt pairs (pairs.jsonl)."
    ),
    tables={"ground_truth": GROUND_TRUTH},
    views=_views,
    findings=_findings,
    caveats=lambda tables: [
        Caveat(
            "Edges that carry positions or constants alone are the same in texts of equal length: no method that compares texts can see them."
        )
    ],
)
