"""The circuit of a task: which edges of a model do it, drawn, and how much of the model's behaviour they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from mechscope.report.marks.circuit_slider import Picture, pictures
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.series import Series, curves, long
from mechscope.report.marks.tables import Cell, Shown, Table, View, strongest, value, words
from mechscope.report.section import Panel, Section, Tables, number, optional, table
from mechscope.report.shared import WITHHELD, counted_in, each_model, few_texts, metric_in_words, withheld_shares
from mechscope.report.statements import Card, Caveat, Derived, Finding, Row
from mechscope.report.theme import interval, name_of, percent
from mechscope.report.theme import number as written

_TOP = 40
_IN = ("in_circuit", "==", True)
# of methods that learn which edges to keep
_CONVERGED = "learning converged (1: yes)"
_MEASURES = {
    "faithfulness": "faithfulness",
    "CPR": "CPR (area under faithfulness, higher is better)",
    "CMD": "CMD (area between faithfulness and 1, lower is better)",
}

# of methods that score every text
_SURE = {
    "se": optional("standard error of the score over texts", "of the metric"),
    "low": optional("interval of the score (95\u202f%), lower end", "of the metric"),
    "high": optional("its interval, upper end", "of the metric"),
    "p": optional("p: that the score is zero, two-sided"),
    "q": optional("q: p after Benjamini–Hochberg over the model's rows"),
}
EDGES = table(
    "One row per model and edge of its graph.",
    model="whose edge: model, base, tuned or a checkpoint",
    edge="the edge, sender->receiver",
    sender="the node that writes: embed, a0.h3, m2",
    receiver="what reads it: a head's query, key or value (a4.h1<q>), an MLP (m5) or logits",
    sender_layer="layer of the sender, −1 for embed",
    receiver_layer="layer of the receiver, the number of layers for logits",
    score=number("change of the metric when the edge carries the other run's value", "of the metric"),
    n="texts",
    **_SURE,
    in_circuit="whether the edge belongs to the chosen circuit",
)
NODES = table(
    "One row per model and node that writes to the residual stream.",
    model="whose node",
    node="the node",
    layer="its layer, −1 for embed",
    score=number("sum of the scores of the edges that leave it", "of the metric"),
    n="texts",
    **_SURE,
    in_circuit="whether an edge of the chosen circuit touches it",
)
CURVE = table(
    "One row per model and size of a circuit.",
    model="whose circuit",
    fraction=number("size that was chosen, of all edges, before dead ends are removed", "share"),
    edges="edges of the circuit",
    metric="the metric",
    n="texts",
    value=number("mean metric of the circuit", "of the metric"),
    faithfulness=number("(circuit − no edges) / (model − no edges) of the mean metric", "share", "low", "high", bare=True),
    withheld=WITHHELD,
    random=number("the same, mean over random circuits with as many edges in every layer", "share", "low", "high"),
)
SUMMARY = table(
    "One row per model and measure of its chosen circuit.",
    model="whose circuit",
    measure="what was measured: edges, nodes, faithfulness, CPR, CMD, incompleteness, Jaccard indices of resampled circuits …",
    value=number("its value", "of the measure", "low", "high", bare=True),
    random=number("the same of random circuits, where measured", "of the measure", "low", "high"),
    withheld="why a share is not given, in words; empty where it is, and for what is no share",
)


def _panels(tables: Tables) -> list[Panel]:
    drawn = pictures(tables)
    data = {"name": "circuit", "pictures": drawn}
    return [Panel("circuit", data, json=[picture.data() for picture in drawn], drawings=drawn)] if drawn else []


def _figures(tables: Tables) -> list[Figure]:
    if "circuit_curve" not in tables:
        return []
    curve, parts = tables["circuit_curve"], []
    models = curve["model"].nunique()
    for model, own in curve.groupby("model", sort=False):
        name = name_of(model) if models > 1 else "the model"
        # the bands of many models' random circuits would cover one another
        around = "random_" if models < 3 else None
        parts.append(long(own, [Series(name, "faithfulness", ""), Series(name, "random", around, chance=True)], ("edges", "fraction")))
    return curves(
        pd.concat(parts, ignore_index=True),
        name="circuit-faithfulness",
        title="Faithfulness by number of edges",
        x=("edges", "edges in the circuit"),
        axis="faithfulness (1: as the whole model)",
        caption=counted_in(
            "How much of the model's behaviour a circuit of that many edges keeps when all other edges carry the other run's values. Bands: 95\u202f% over "
            "texts, and over random circuits with as many edges in every layer.",
            curve,
        ),
        kinds=("circuit", "random circuits"),
        wide=True,
    )


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "circuit_summary" in tables:
        shown.append(Shown("Measures", measures(tables["circuit_summary"]), terminal=True))
    if "circuit_edges" in tables:
        for _, whose, own in each_model(tables["circuit_edges"]):
            view = _strongest(own)
            shown.append(Shown(f"The {len(view.rows)} strongest edges{whose}", view, folded=True))
    return shown


def measures(summary: pd.DataFrame) -> View:
    """Return a line per measure: its value for every model, beside random circuits of the same size where they were measured."""
    models = list(dict.fromkeys(summary["model"]))
    of = {(row["measure"], row["model"]): row for row in summary.to_dict("records")}
    rows = tuple(
        (
            words(_MEASURES.get(str(measure), name_of(measure))),
            *(_measured(of[measure, model]) if (measure, model) in of else Cell("") for model in models),
        )
        for measure in dict.fromkeys(summary["measure"])
    )
    return View(("measure", *(name_of(model) if len(models) > 1 else "circuit" for model in models)), rows)


def _measured(row: Mapping[Any, Any]) -> Cell:
    if row.get("withheld"):
        return Cell("withheld", str(row["withheld"]))
    random = f"random {written(row['random'])} {interval(row['random_low'], row['random_high'])}".strip() if pd.notna(row["random"]) else ""
    # a count is whole and has no interval
    count = pd.isna(row["low"]) and float(row["value"]).is_integer()
    ends = interval(row["low"], row["high"])
    return value(int(row["value"]) if count else row["value"], note=" · ".join(note for note in (ends, random) if note))


def _strongest(edges: pd.DataFrame) -> View:
    view = Table(strongest(edges, "score", _TOP)).words("edge", "edge", strong=lambda row: bool(row["in_circuit"]))
    view = view.numbers("score", "score", ends=("low", "high"), sign=True).numbers("q", "q", digits=2)
    return view.cells("in_circuit", "in the circuit", lambda row: Cell("yes" if row["in_circuit"] else "no")).view()


def _findings(tables: Tables) -> list[Finding]:
    unconverged, drawn, found = _unconverged(tables), pictures(tables), list[Finding]()
    for picture in _ends(drawn):
        if picture.model in unconverged:
            said = f"What the circuit of {_whose(picture.model)} is"
            found.append(Finding(said, withheld=f"{unconverged[picture.model]}; give it more steps", table="circuit_edges"))
        else:
            found.append(_of_one(tables, picture, several=len(drawn) > 1))
    return [*found, *_metric(tables)]


def _of_one(tables: Tables, picture: Picture, *, several: bool) -> Finding:
    """Say how large a model's circuit is and how much of the model's behaviour it keeps beside random ones; where that was not measured, its size alone."""
    whose, here = _whose(picture.model), (("model", "==", picture.model),)
    every, own, whole = (
        Derived("circuit_edges", here),
        Derived("circuit_edges", (*here, _IN)),
        Derived("circuit_edges", here, "in_circuit", "mean"),
    )
    counts = (own, every, whole)
    size = f"{own.written(tables)} of {every.written(tables)} edges ({percent(whole.of(tables), digits=2)})"
    after = f", {name_of(picture.model)}" if several else ""
    if picture.chosen is None:
        text = f"The circuit of {whose} has {size}; how much of what the model does it keeps was not measured"
        card = Card(
            own.written(tables), f"edges in the circuit{after}", f"{percent(whole.of(tables), digits=2)} of {every.written(tables)}"
        )
        return Finding(text, n=_texts_scored(tables), unit="texts that were scored", derived=counts, card=card, table="circuit_edges")
    row, n = picture.chosen, None if picture.curve is None or "n" not in picture.curve else picture.curve["n"].max()
    if row.get("withheld"):
        card = Card("withheld", f"faithfulness{after}", str(row["withheld"]))
        text = f"How much of what {whose} does its circuit of {size} keeps (faithfulness)"
        return Finding(text, n=n, derived=counts, withheld=str(row["withheld"]), card=card, table="circuit_summary")
    faithful, _ = picture.faithfulness_words()
    beside, around = _random(tables, picture)
    shown = "; these texts do not show that it carries anything, as the interval holds zero" if row["low"] <= 0 else ""
    note = f"{interval(row['low'], row['high'])}; {beside}; {size}".removeprefix("; ")
    return Finding(
        f"The circuit of {whose}, {size}, keeps {faithful} of what the model does (faithfulness, 1: all of it); {beside}{shown}",
        n=n,
        rows=(*around, *_own(tables, picture)),
        derived=counts,
        effect=0.0 if shown else abs(float(row["value"])),
        folded=bool(shown) or not around,
        card=Card(written(row["value"]), f"faithfulness{after}", note),
        table="circuit_summary",
    )


def _random(tables: Tables, picture: Picture) -> tuple[str, tuple[Row, ...]]:
    """Say what random circuits of the chosen one's size keep, and return the rows that say so: measured beside it, or the nearest sizes of the curve."""
    for measured in _own(tables, picture):
        if pd.notna(measured["random"]):
            return f"random circuits of its size keep {_kept(measured)}", (measured,)
    curve, edges = picture.curve, len(picture.circuit)
    if curve is None or curve["random"].isna().all():
        return "no random circuits of its size were measured", ()
    near = pd.concat([curve[curve["edges"] <= edges].tail(1), curve[curve["edges"] >= edges].head(1)]).drop_duplicates("edges")
    rows = tuple(one for _, one in near.iterrows())
    if len(rows) == 1 and rows[0]["edges"] == edges:
        return f"random circuits of its size keep {_kept(rows[0])}", rows
    return "; ".join(f"random circuits of {written(int(one['edges']))} edges keep {_kept(one)}" for one in rows), rows


def _own(tables: Tables, picture: Picture) -> tuple[pd.Series, ...]:
    """Return the row of the summary that has a model's faithfulness."""
    summary = tables["circuit_summary"]
    rows = summary[(summary["model"] == picture.model) & (summary["measure"] == "faithfulness") & summary["value"].notna()]
    return tuple(row for _, row in rows.head(1).iterrows())


def _kept(row: Row) -> str:
    return f"{written(row['random'])} {interval(row['random_low'], row['random_high'])}".strip()


def _metric(tables: Tables) -> list[Finding]:
    """Say which metric edges are scored by, and what the sign of a score means for the task."""
    names = [] if "circuit_curve" not in tables else list(dict.fromkeys(tables["circuit_curve"]["metric"]))
    return [Finding(f"Edges are scored by {metric_in_words(name)}", table="circuit_curve") for name in names]


def _few(tables: Tables) -> list[Caveat]:
    """Return the caveats that few texts were scored, or judged a circuit."""
    judged = [replace(each, weakens="circuit_summary") for each in few_texts(tables, "circuit_curve")]
    return [*(few_texts(tables, "circuit_edges") if "n" in tables.get("circuit_edges", ()) else []), *judged]


def _texts_scored(tables: Tables) -> float | None:
    edges = tables["circuit_edges"]
    return edges["n"].max() if "n" in edges and edges["n"].notna().any() else None


def _whose(model: str) -> str:
    return {"model": "the model", "base": "the base model", "tuned": "the tuned model"}.get(model, name_of(model))


def _unconverged(tables: Tables) -> dict[str, str]:
    """Return of each model whose circuit a search that had not converged found, why."""
    summary = tables.get("circuit_summary")
    if summary is None:
        return {}
    rows = summary[(summary["measure"] == _CONVERGED) & (summary["value"] == 0)]
    return {str(row["model"]): str(row["withheld"]) for row in rows.to_dict("records")}


def _ends(drawn: list[Picture]) -> list[Picture]:
    """Return the first and the last model: base and tuned, whatever lies between them."""
    return [drawn[0], drawn[-1]] if len(drawn) > 1 else drawn


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        *_few(tables),
        *(
            Caveat(f"The search for the circuit of {_whose(model)} had not converged: {why}.", "circuit_edges", withheld=True)
            for model, why in _unconverged(tables).items()
        ),
        *withheld_shares(tables, "circuit_curve"),
        Caveat(
            "An edge's score says what changes when that edge alone is changed. Edges that stand in for one another (redundant or backup heads) can have "
            "small scores and still matter together: completeness tests for them."
        ),
        Caveat("A circuit is of a task's texts and a metric. On other texts the same model may use other edges."),
        Caveat(
            "Faithfulness is a ratio: it can lie above 1 or below 0, and where the metric hardly differs between the two runs it says little."
        ),
    ]


SECTION = Section(
    id="circuit",
    heading="Circuit",
    intro=(
        "A model as a graph: the embedding, every head and every MLP write to the residual stream; every head's query, key and value, every MLP and the "
        "logits read from it. A circuit is the part of its edges that does the task. An edge's score is the change of the metric when the edge carries "
        "the other run's value."
    ),
    tables={"circuit_edges": EDGES, "circuit_nodes": NODES, "circuit_curve": CURVE, "circuit_summary": SUMMARY},
    figures=_figures,
    panels=_panels,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="circuit",
)
