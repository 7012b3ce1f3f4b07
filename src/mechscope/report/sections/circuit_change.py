"""What changed in a circuit: how much the circuits of two models share beside their own noise, which edges' scores shifted, and which carry the gain."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.series import Series, curves, long
from mechscope.report.marks.tables import Cell, Row, Shown, Table, strongest
from mechscope.report.section import Section, Tables, number, optional, table
from mechscope.report.shared import WITHHELD
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
    exchanged=number(
        "the same with the two models' scores exchanged at random within texts, mean; its band of 95 % over exchanges",
        "Jaccard index",
        "low",
        "high",
        optional=True,
    ),
    change=optional(
        "exchanged − jaccard: what the models share less than if it did not matter which one a text's scores are of", "Jaccard index"
    ),
    p=optional("share of the exchanges in which the two circuits share at most as much, the models as they are among them"),
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
    random_sets=optional("random sets of that size"),
    withheld=WITHHELD,
    p_random=optional("tuned only: share of sets, the chosen one counted, that carry at least as much", "share"),
    p_less=optional("the same, at most as much", "share"),
)


def _figures(tables: Tables) -> list[Figure]:
    drawn = {"circuit_overlap": _overlap, "circuit_shift": _shift, "circuit_gain": _gain}
    return [figure for name, draw in drawn.items() if name in tables for figure in draw(tables[name])]


def _overlap(overlap: pd.DataFrame) -> list[Figure]:
    series = [
        Series("base and tuned", "jaccard"),
        Series("models exchanged", "exchanged", "exchanged_"),
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
            caption="Two circuits of noisy scores differ though nothing changed. With the models' scores exchanged at random within texts they differ by "
            "that noise alone: where base and tuned share less, their circuits differ. Bands: 95 % of exchanges, of random circuits.",
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
        f"{written(row['jaccard'])}{_texts(row)}; random circuits of the same layers {chance}"
    )
    if any(pd.isna(row.get(column)) for column in ("exchanged", "exchanged_low", "exchanged_high", "change", "p")):
        return f"{shared}."
    differ = row["p"] <= Q_SIGNIFICANT and row["change"] > 0
    verdict = "the two models' circuits differ" if differ else "no difference between the two models' circuits was shown"
    return (
        f"{shared}. With the two models' scores exchanged at random within texts they share {written(row['exchanged'])} "
        f"{interval(row['exchanged_low'], row['exchanged_high'])}: {verdict} ({written(row['change'], sign=True)}, p = {written(row['p'])})."
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
    if gain is None:
        return ""
    rows = gain[(gain["kind"] == "tuned") & gain["share"].notna()]
    if rows.empty:
        reasons = gain["withheld"][gain["withheld"].fillna("") != ""] if "withheld" in gain else pd.Series(dtype=str)
        return "" if reasons.empty else f"How much of the gain tuned edges carry is withheld: {reasons.iloc[0]}."
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
        "The circuits of both models on the same texts. Circuits of noisy scores differ though nothing changed, so what base and tuned share stands beside "
        "what they share when it is drawn by lot in every text which model's scores are whose (a permutation test; the unit is the text). It is about these "
        "two models: what another training would change is not known from them."
    ),
    tables={"circuit_overlap": OVERLAP, "circuit_shift": SHIFT, "circuit_gain": GAIN},
    figures=_figures,
    views=_views,
    findings=_findings,
)
