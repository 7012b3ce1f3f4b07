"""What changed in a circuit: how much the circuits of two models share beside their own noise, which edges' scores shifted, and which carry the gain."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.series import Series, curves, long
from mechscope.report.marks.tables import Cell, Row, Shown, Table, strongest
from mechscope.report.section import Section, Tables, number, optional, table
from mechscope.report.theme import interval, label, percent
from mechscope.report.theme import number as written

_TOP = 40
_GREY = "#8C8C8C"
# the size at which two circuits are compared in a sentence, where neither's own size is known: 1 % of the edges
_USUAL = 0.01

OVERLAP = table(
    "One row per size of the two circuits and kind of part.",
    what="what is shared: edges, nodes",
    fraction=number("size of each circuit, of all edges", "share"),
    base_size=optional("edges (or nodes) of the base model's circuit"),
    tuned_size=optional("edges (or nodes) of the tuned model's circuit"),
    jaccard=number("shared / in either, of the circuits of all texts", "Jaccard index"),
    null=number("the same of layer-matched random circuits, mean; its band of 95 % over draws", "Jaccard index", "low", "high"),
    null_p=optional("share of the draws that share at least as many, the observed one among them"),
    across=number(
        "base on one half of the texts with tuned on the other, mean; its band of 95 % over halvings",
        "Jaccard index",
        "low",
        "high",
        optional=True,
    ),
    self_base=number("base on one half with base on the other, mean over halvings", "Jaccard index"),
    self_tuned=number("tuned on one half with tuned on the other, mean over halvings", "Jaccard index"),
    change=number(
        "the smaller self − across, mean; its band of 95 % over halvings. Above zero: the models share less than the noisier shares with itself",
        "Jaccard index",
        "low",
        "high",
        optional=True,
    ),
    n=optional("texts"),
)
SHIFT = table(
    "One row per edge.",
    edge="the edge, sender->receiver",
    sender="the node that writes",
    receiver="what reads it",
    sender_layer="layer of the sender, −1 for embed",
    receiver_layer="layer of the receiver, the number of layers for logits",
    base=number("score in the base model", "of the metric"),
    tuned=number("score in the tuned model", "of the metric"),
    shift=number("tuned − base, over texts", "of the metric", "se", "low", "high", "p", "q", bare=True),
    in_base="whether the edge belongs to the base model's circuit",
    in_tuned="whether the edge belongs to the tuned model's circuit",
)
GAIN = table(
    "One row per number of tuned edges and way of choosing them.",
    fraction=number("tuned edges, of all edges", "share"),
    edges="tuned edges in the base model",
    n=optional("texts"),
    kind="tuned: chosen by attribution; random: mean over random sets",
    value=optional("mean metric of the base model with these tuned edges", "of the metric"),
    share=number(
        "what it has of the gain of fine-tuning; the interval is over texts, for random over sets", "share", "low", "high", bare=True
    ),
)


def _figures(tables: Tables) -> list[Figure]:
    drawn = {"circuit_overlap": _overlap, "circuit_shift": _shift, "circuit_gain": _gain}
    return [figure for name, draw in drawn.items() if name in tables for figure in draw(tables[name])]


def _overlap(overlap: pd.DataFrame) -> list[Figure]:
    series = [
        Series("base and tuned", "jaccard"),
        Series("base and tuned, halves", "across", "across_"),
        Series("base, halves", "self_base"),
        Series("tuned, halves", "self_tuned"),
        Series("random circuits", "null", "null_", chance=True),
    ]
    return [
        figure
        for what, own in overlap.groupby("what", sort=False)
        for figure in curves(
            long(own.sort_values("fraction", kind="stable"), [each for each in series if each.column in own], ("fraction",)),
            name=f"circuit-overlap-{'nodes' if what == 'nodes' else 'edges'}",
            title=f"Overlap of the two circuits: {label(what)}",
            x=("fraction", "share of the edges in each circuit"),
            axis="Jaccard index",
            kinds=("circuit", "random circuits"),
            colours={"random circuits": _GREY},
            caption="Two circuits of one model, from two halves of the texts, differ by noise alone. Base on one half against tuned on the other "
            "differs by noise and fine-tuning: as high as the same model means that no change was shown.",
        )
    ]


def _shift(shift: pd.DataFrame) -> list[Figure]:
    layers = int(shift[["sender_layer", "receiver_layer"]].max().max())
    named = {-1: "embed", layers: "logits"} if (shift["receiver"] == "logits").any() else {-1: "embed"}
    cells = shift.assign(size=shift["shift"].abs()).groupby(["sender_layer", "receiver_layer"], as_index=False)
    means = cells.agg(mean=("size", "mean"), largest=("size", "max"), n=("size", "size"))
    for side in ("sender", "receiver"):
        means[side] = [named.get(int(layer), str(int(layer))) for layer in means[f"{side}_layer"]]
    order = [named.get(layer, str(layer)) for layer in range(-1, layers + 1)]
    title, numbers = "Where edges' scores shifted", Numbers()
    scale = alt.Scale(type="sqrt", interpolate="rgb", domain=[0, float(means["mean"].max()) or 1e-6])
    legend = alt.Legend(title="mean |shift|, √ scale", direction="horizontal", gradientLength=230, gradientThickness=10, tickCount=5)
    chart = (
        alt.Chart(numbers.add(means, ["sender", "receiver", "mean", "largest", "n"]))
        .mark_rect(cornerRadius=1)
        .encode(
            x=alt.X("sender:N", title="layer that writes", sort=order, axis=alt.Axis(labelAngle=0, grid=False)),
            y=alt.Y("receiver:N", title="layer that reads", sort=order[::-1]),
            color=alt.Color("mean:Q", scale=scale, legend=legend),
            tooltip=[
                alt.Tooltip("sender:N", title="from"),
                alt.Tooltip("receiver:N", title="to"),
                alt.Tooltip("mean:Q", title="mean |shift|", format=".4~g"),
                alt.Tooltip("largest:Q", title="largest", format=".4~g"),
                alt.Tooltip("n:Q", title="edges", format=","),
            ],
        )
        .properties(height=max(160, min(26, 560 // (layers + 2)) * (layers + 1)))
    )
    caption = "Mean over all edges between two layers of |score in tuned − score in base|."
    return [Figure(name="circuit-shift", title=title, caption=caption, spec=definition(chart, numbers, description=title), width=480)]


def _gain(gain: pd.DataFrame) -> list[Figure]:
    chosen, series = gain["kind"] == "tuned", []
    for rows, name, chance in ((gain[chosen], "edges chosen by attribution", False), (gain[~chosen], "random edges", True)):
        series.append(long(rows.sort_values("edges", kind="stable"), [Series(name, "share", "", chance)], ("edges", "fraction")))
    return curves(
        pd.concat(series, ignore_index=True),
        name="circuit-gain",
        title="Which tuned edges carry the gain",
        x=("edges", "tuned edges in the base model"),
        axis="share of the gain",
        kinds=("circuit", "random circuits"),
        colours={"random edges": _GREY},
        caption="Share of the change by fine-tuning that appears when these edges of the tuned model are put into the base model. 1: the whole gain.",
    )


def _views(tables: Tables) -> list[Shown]:
    if "circuit_shift" not in tables:
        return []
    view = Table(strongest(tables["circuit_shift"], "shift", _TOP)).words("edge", "edge")
    view = view.numbers("base", "score in base", sign=True).numbers("tuned", "in tuned", sign=True)
    view = view.numbers("shift", "shift", ends=("low", "high"), sign=True, bold="q").numbers("q", "q", digits=2)
    return [Shown("The largest shifts", view.cells("in_base", "in the circuit of", _whose).view())]


def _whose(row: Row) -> Cell:
    where = {(True, True): "both", (True, False): "base", (False, True): "tuned", (False, False): "neither"}
    return Cell(where[bool(row["in_base"]), bool(row["in_tuned"])])


def _findings(tables: Tables) -> list[str]:
    return [sentence for sentence in (_overlap_finding(tables), _shift_finding(tables), _gain_finding(tables)) if sentence]


def _overlap_finding(tables: Tables) -> str:
    overlap = tables.get("circuit_overlap")
    rows = None if overlap is None else overlap[overlap["what"] == "edges"]
    if rows is None or rows.empty:
        return ""
    row = rows.iloc[int((rows["fraction"] - _size(tables)).abs().to_numpy().argmin())]
    chance = f"{written(row['null'])} {interval(row['null_low'], row['null_high'])}".strip()
    shared = (
        f"With {percent(row['fraction'], digits=2)} of the edges each, the circuits of base and tuned share a Jaccard index of "
        f"{written(row['jaccard'])}{_texts(row)}; chance gives {chance}"
    )
    if any(pd.isna(row.get(column)) for column in ("across", "change", "change_low", "change_high")):
        return f"{shared}."
    verdict = "fine-tuning changed the circuit more than noise does" if row["change_low"] > 0 else "no change beyond noise was shown"
    return (
        f"{shared}. On halves of the texts, two circuits of base share {written(row['self_base'])}, two of tuned {written(row['self_tuned'])}, and "
        f"base and tuned {written(row['across'])}: {verdict} (the smaller of the first two less the third is {written(row['change'], sign=True)}, in 95 % "
        f"of halvings {interval(row['change_low'], row['change_high'], sign=True)})."
    )


def _size(tables: Tables) -> float:
    """Return the share of its edges that the first model's circuit has."""
    edges = tables.get("circuit_edges")
    own = None if edges is None else edges.loc[edges["model"] == edges["model"].iloc[0], "in_circuit"].astype(bool)
    return float(own.mean()) if own is not None and own.any() else _USUAL


def _shift_finding(tables: Tables) -> str:
    shift = tables.get("circuit_shift")
    if shift is None:
        return ""
    top = strongest(shift, "shift", 1).iloc[0]
    return (
        f"The score of {label(top['edge'])} shifted most, from {written(top['base'], sign=True)} to {written(top['tuned'], sign=True)} "
        f"({written(top['shift'], sign=True)} {interval(top['low'], top['high'], sign=True)}); {written(int((shift['q'] < Q_SIGNIFICANT).sum()))} of "
        f"{written(len(shift))} edges shifted at q < {Q_SIGNIFICANT}."
    )


def _gain_finding(tables: Tables) -> str:
    gain = tables.get("circuit_gain")
    rows = None if gain is None else gain[(gain["kind"] == "tuned") & gain["share"].notna()]
    if rows is None or rows.empty:
        return ""
    # half of the gain is a size to remember; where no size reaches it, the largest is told
    half = rows[rows["share"] >= 0.5].sort_values("edges")
    row = half.iloc[0] if len(half) else rows.sort_values("edges").iloc[-1]
    ends = "" if pd.isna(row["low"]) or pd.isna(row["high"]) else f" ({percent(row['low'])} to {percent(row['high'])})"
    return (
        f"{written(int(row['edges']))} edges of the tuned model ({percent(row['fraction'], digits=2)}), put into the base model, carry "
        f"{percent(row['share'])} of the gain{ends}{_texts(row)}."
    )


def _texts(row: Row | pd.Series) -> str:
    n = row.get("n")
    return "" if n is None or pd.isna(n) else f" (n = {written(int(n))} texts)"


SECTION = Section(
    id="circuit-change",
    heading="What changed in the circuit",
    intro=(
        "The circuits of both models on the same texts. Two circuits of one and the same model differ too when the texts are resampled; a change counts "
        "only beyond that."
    ),
    tables={"circuit_overlap": OVERLAP, "circuit_shift": SHIFT, "circuit_gain": GAIN},
    figures=_figures,
    views=_views,
    findings=_findings,
)
