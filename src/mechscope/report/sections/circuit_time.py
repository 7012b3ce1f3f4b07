"""The circuit over training: how faithful and how large it is at every checkpoint, and how much of it was there before."""

from __future__ import annotations

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.series import Series, curves, long
from mechscope.report.section import Section, Tables, number, optional, table
from mechscope.report.statements import Derived, Finding, sample
from mechscope.report.theme import interval, name_of
from mechscope.report.theme import number as written

TIME = table(
    "One row per model, from the base over the checkpoints to the tuned one.",
    model="the model or checkpoint",
    order="its place in training, from 0",
    edges="edges of its own circuit",
    faithfulness=number("faithfulness of its own circuit", "share", bare=True),
    low=optional("the interval of faithfulness (95\u202f%), lower end", "share"),
    high=optional("its interval, upper end", "share"),
    fraction=optional("size at which circuits are compared, of all edges", "share"),
    jaccard_base=number("edges shared with the first model's circuit", "Jaccard index"),
    jaccard_base_null=optional("the same of layer-matched random circuits, mean", "Jaccard index"),
    jaccard_previous=number("edges shared with the circuit of the model before", "Jaccard index"),
    jaccard_previous_null=optional("the same of layer-matched random circuits, mean", "Jaccard index"),
    nodes_base=optional("heads and MLPs shared with the first model's circuit", "Jaccard index"),
    nodes_base_null=optional("the same of layer-matched random circuits, mean", "Jaccard index"),
    nodes_previous=optional("heads and MLPs shared with the circuit of the model before", "Jaccard index"),
    nodes_previous_null=optional("the same of layer-matched random circuits, mean", "Jaccard index"),
)


def _figures(tables: Tables) -> list[Figure]:
    ordered = tables["circuit_time"].sort_values("order", kind="stable")
    ordered = ordered.assign(model=[name_of(model) for model in ordered["model"]])
    series = (
        Series("faithfulness", "faithfulness", ""),
        Series("overlap with the first", "jaccard_base"),
        Series("overlap with the one before", "jaccard_previous"),
    )
    x, kinds = ("model", "checkpoint"), ("circuit", "random circuits")
    counted = f"{sample([len(ordered)], 'checkpoints')}."
    return [
        *curves(
            long(ordered, series, ("model",)),
            name="circuit-time",
            title="The circuit over training",
            x=x,
            axis="faithfulness, Jaccard index",
            caption=f"Faithfulness of each checkpoint's own circuit, and the overlap of its edges with earlier ones, at one share of edges. {counted}",
            logarithmic=False,
            kinds=kinds,
        ),
        *curves(
            long(ordered, [Series("edges", "edges")], ("model",)),
            name="circuit-size-time",
            title="Size of the circuit over training",
            x=x,
            axis="edges",
            caption=f"Edges of each checkpoint's circuit. {counted}",
            logarithmic=False,
            unit=False,
            kinds=kinds,
        ),
    ]


def _findings(tables: Tables) -> list[Finding]:
    ordered = tables["circuit_time"].sort_values("order", kind="stable")
    if len(ordered) < 2:
        return []
    first, last = ordered.iloc[0], ordered.iloc[-1]
    faithful = [f"{written(row['faithfulness'])} {interval(row.get('low'), row.get('high'))}".strip() for row in (first, last)]
    chance = (
        ""
        if "jaccard_base_null" not in ordered
        else f" (random circuits with as many edges in every layer: {written(last['jaccard_base_null'])})"
    )
    count = Derived("circuit_time")
    return [
        Finding(
            f"Over the {count.written(tables)} checkpoints from {name_of(first['model'])} to {name_of(last['model'])} the faithfulness of the circuit "
            "goes from "
            f"{faithful[0]} to {faithful[1]} and its size from {written(int(first['edges']))} to {written(int(last['edges']))} edges; the last circuit "
            "shares a "
            f"Jaccard index of {written(last['jaccard_base'])} with the first{chance}",
            n=len(ordered),
            unit="checkpoints",
            rows=(first, last),
            derived=(count,),
            table="circuit_time",
        )
    ]


SECTION = Section(
    id="circuit-time",
    heading="The circuit over training",
    intro=(
        "The circuit of every checkpoint on the same texts. Faithfulness and size are those of each checkpoint's own circuit; overlaps are of circuits "
        "chosen at one share of the edges, since circuits of different sizes overlap less the more their sizes differ."
    ),
    unit="checkpoints",
    tables={"circuit_time": TIME},
    figures=_figures,
    findings=_findings,
    question="circuit",
)
