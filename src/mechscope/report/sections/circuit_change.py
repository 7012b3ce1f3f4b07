"""What changed in a circuit: how much the circuits of two models share beside their own noise, which edges' scores shifted, and which carry the gain."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.series import Series, curves, long
from mechscope.report.marks.tables import Cell, Row, Shown, Table, strongest
from mechscope.report.section import Section, Tables, number, optional, table
from mechscope.report.shared import WITHHELD, counted_in, few_texts, withheld_shares
from mechscope.report.statements import Caveat, Derived, Finding
from mechscope.report.theme import interval, label, percent
from mechscope.report.theme import number as written
from mechscope.report.verdicts import rank_verdict

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
    null=number("the same of layer-matched random circuits, mean; its band of 95\u202f% over draws", "Jaccard index", "low", "high"),
    null_p=optional("share of the draws that share at least as many, the observed one among them"),
    exchanged=number(
        "the same with the two models' scores exchanged at random within texts, mean; its band of 95\u202f% over exchanges",
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
    return [figure for name, draw in drawn.items() if name in tables for figure in draw(tables)]


def _overlap(tables: Tables) -> list[Figure]:
    overlap = tables["circuit_overlap"]
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
            "that noise alone: where base and tuned share less, their circuits differ. Bands: 95\u202f% of exchanges, of random circuits.",
        )
    ]


def _shift(tables: Tables) -> list[Figure]:
    shift = tables["circuit_shift"]
    layers = int(shift[["sender_layer", "receiver_layer"]].max().max())
    named = {-1: "embed", layers: "logits"} if (shift["receiver"] == "logits").any() else {-1: "embed"}
    cells = shift.assign(size=shift["shift"].abs()).groupby(["sender_layer", "receiver_layer"], as_index=False)
    means = cells.agg(mean=("size", "mean"), largest=("size", "max"), edges=("size", "size"))
    for side in ("sender", "receiver"):
        means[side] = [named.get(int(layer), str(int(layer))) for layer in means[f"{side}_layer"]]
    order = [named.get(layer, str(layer)) for layer in range(-1, layers + 1)]
    title, numbers = "Where edges' scores shifted", Numbers()
    scale = alt.Scale(type="sqrt", interpolate="rgb", domain=[0, float(means["mean"].max()) or 1e-6])
    legend = alt.Legend(title="mean |shift|, √ scale", direction="horizontal", gradientLength=230, gradientThickness=10, tickCount=5)
    chart = (
        alt.Chart(numbers.add(means, ["sender", "receiver", "mean", "largest", "edges"]))
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
                alt.Tooltip("edges:Q", title="edges", format=","),
            ],
        )
        .properties(height=max(160, min(26, 560 // (layers + 2)) * (layers + 1)))
    )
    caption = counted_in("Mean over all edges between two layers of |score in tuned − score in base|.", tables.get("circuit_edges", shift))
    return [Figure(name="circuit-shift", title=title, caption=caption, spec=definition(chart, numbers, description=title), width=480)]


def _gain(tables: Tables) -> list[Figure]:
    gain = tables["circuit_gain"]
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
        caption=counted_in(
            "Share of the change by fine-tuning that appears when these edges of the tuned model are put into the base model. 1: the whole gain.",
            gain,
        ),
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


def _findings(tables: Tables) -> list[Finding]:
    return [*_overlap_finding(tables), *_shift_finding(tables), *_gain_finding(tables)]


def _overlap_finding(tables: Tables) -> list[Finding]:
    overlap = tables.get("circuit_overlap")
    rows = None if overlap is None else overlap[overlap["what"] == "edges"]
    if rows is None or rows.empty:
        return []
    row = rows.iloc[int((rows["fraction"] - _size(tables)).abs().to_numpy().argmin())]
    chance = f"{written(row['null'])} {interval(row['null_low'], row['null_high'])}".strip()
    size = f"with {percent(row['fraction'], digits=2)} of the edges each"
    shared = f"a Jaccard index of {written(row['jaccard'])} {size}; random circuits with as many edges in every layer share {chance}"
    if any(pd.isna(row.get(column)) for column in ("exchanged", "exchanged_low", "exchanged_high", "change", "p")):
        text = f"The circuits of base and tuned share {shared}; what the two models share by noise alone was not measured"
        return [Finding(text, n=row.get("n"), rows=(row,), folded=True, table="circuit_overlap")]
    differ = row["p"] <= Q_SIGNIFICANT and row["change"] > 0
    verdict = "The circuits of base and tuned differ" if differ else "No difference between the circuits of base and tuned was shown"
    exchanged = f"{written(row['exchanged'])} {interval(row['exchanged_low'], row['exchanged_high'])}"
    return [
        Finding(
            f"{verdict}: they share {shared}, and the same two circuits share {exchanged} with the models' scores exchanged at random within texts "
            f"({written(row['change'], sign=True)}, p = {written(row['p'])})",
            n=row.get("n"),
            rows=(row,),
            effect=float(row["change"]) if differ else 0.0,
            folded=not differ,
            table="circuit_overlap",
        )
    ]


def _size(tables: Tables) -> float:
    """Return the share of its edges that the first model's circuit has."""
    edges = tables.get("circuit_edges")
    own = None if edges is None else edges.loc[edges["model"] == edges["model"].iloc[0], "in_circuit"].astype(bool)
    return float(own.mean()) if own is not None and own.any() else _USUAL


def _shift_finding(tables: Tables) -> list[Finding]:
    shift = tables.get("circuit_shift")
    if shift is None:
        return []
    top = strongest(shift, "shift", 1).iloc[0]
    surely, every = Derived("circuit_shift", (("q", "<", Q_SIGNIFICANT),)), Derived("circuit_shift")
    return [
        Finding(
            f"{surely.written(tables)} of {every.written(tables)} edges' scores shifted at q < {Q_SIGNIFICANT}; that of {label(top['edge'])} "
            "shifted most, from "
            f"{written(top['base'], sign=True)} to {written(top['tuned'], sign=True)} ({written(top['shift'], sign=True)} "
            f"{interval(top['low'], top['high'], sign=True)})",
            n=_texts_scored(tables),
            rows=(top,),
            derived=(surely, every),
            effect=surely.of(tables) / max(every.of(tables), 1),
            folded=not surely.of(tables),
            table="circuit_shift",
        )
    ]


def _texts_scored(tables: Tables) -> float | None:
    edges = tables.get("circuit_edges")
    return None if edges is None or "n" not in edges or edges["n"].isna().all() else edges["n"].max()


def _gain_finding(tables: Tables) -> list[Finding]:
    """Say which part of the gain some tuned edges carry: with random sets beside them a headline, without any a detail."""
    gain = tables.get("circuit_gain")
    if gain is None:
        return []
    whole = "how much of the gain of fine-tuning the tuned model's edges carry"
    rows = gain[(gain["kind"] == "tuned") & gain["share"].notna()]
    if rows.empty:
        reasons = gain["withheld"][gain["withheld"].fillna("") != ""] if "withheld" in gain else pd.Series(dtype=str)
        if reasons.empty:
            return []
        n = gain["n"].max() if "n" in gain else None
        return [Finding(whole, n=n, withheld=str(reasons.iloc[0]), table="circuit_gain", question="gain")]
    beside = gain[(gain["kind"] == "random") & gain["share"].notna() & (gain["fraction"] < 1)]
    if len(beside):
        # the size with most random sets beside it, of these the smallest that carries half: where a rank among them can decide
        most = beside["random_sets"].max() if "random_sets" in beside else float("nan")
        judged = beside[beside["random_sets"] == most] if pd.notna(most) else beside
        rows = rows[rows["edges"].isin(judged["edges"])] if rows["edges"].isin(judged["edges"]).any() else rows
    half = rows[rows["share"] >= 0.5].sort_values("edges")
    row = half.iloc[0] if len(half) else rows.sort_values("edges").iloc[-1]
    ends = "" if pd.isna(row["low"]) or pd.isna(row["high"]) else f" ({percent(row['low'])} to {percent(row['high'])})"
    text = (
        f"{written(int(row['edges']))} edges of the tuned model ({percent(row['fraction'], digits=2)}), put into the base model, carry {percent(row['share'])} "
        f"of the gain{ends}"
    )
    n = row.get("n")
    if beside.empty:
        text += "; no random edges were put in beside them, so this does not say that they carry more than any others"
        return [Finding(text, n=n, rows=(row,), folded=True, table="circuit_gain", question="gain")]
    other, more = beside[beside["edges"] == row["edges"]].iloc[0], row.get("p_random")
    sets = "" if pd.isna(other.get("random_sets")) else f", mean of {written(int(other['random_sets']))} sets"
    text += f"; as many random edges carry {percent(other['share'])}{sets}"
    ranked = pd.notna(more) and pd.notna(row.get("p_less"))
    surely = ranked and rank_verdict(row) == "more"
    if ranked:
        text += (
            f"; {percent(more, digits=2)} of all sets, itself counted, carry at least as much{'' if surely else ': not shown to be more'}"
        )
    share = abs(float(row["share"]))
    return [Finding(text, n=n, rows=(row, other), effect=share, folded=not surely, table="circuit_gain", question="gain")]


def _caveats(tables: Tables) -> list[Caveat]:
    gain = tables.get("circuit_gain")
    alone = gain is not None and not (gain["kind"] == "random").any()
    said = "Tuned edges were put in without as many random ones beside them: that some edges carry a share of the gain does not say that others would not."
    few = few_texts(tables, *(name for name in ("circuit_overlap", "circuit_gain") if name in tables and "n" in tables[name]))
    return [*few, *withheld_shares(tables, "circuit_gain"), *([Caveat(said, "circuit_gain")] if alone else [])]


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
    caveats=_caveats,
    question="circuit",
)
