"""What carries the gain: layers and heads exchanged between the two models, the selected heads ablated, change beside importance."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from mechscope.report.marks.curves import layer_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import head_heatmap
from mechscope.report.marks.tables import Cell, Shown, Table, View, value, words
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import THIS_PAIR, WITHHELD, chosen_heads, chosen_layers, counted_in, layers_in_words, withheld_shares
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, percent
from mechscope.report.theme import number as written

_INTO = {"into_base": "carried alone", "into_tuned": "lost without"}
_TOOLTIP = {
    "normalised": "share of the gain",
    "normalised_low": "95\u202f% from",
    "normalised_high": "to",
    "effect": "change of loss, nats per token",
    "low": "95\u202f% from",
    "high": "to",
    "n": "documents",
}

# what every table of interventions says of a place and of what changing it does
_PLACE: dict[str, Column | str] = {
    "component": "what was changed",
    "site": "layer, attention_output, mixer_output, mlp_output, z (a head's output), embedding, unembedding; set where several were changed together",
    "layer": "its layer, −1 where there is none",
    "head": "its head, −1 where there is none",
    "feature": "its neuron, −1 where there is none",
    "positions": "the tokens at which it was changed",
    "metric": "the metric: loss on the summary",
    "n": "documents",
    "value": number("mean metric of the changed model", "nats per token"),
    "effect": number("its mean difference from the unchanged model", "nats per token", "se", "low", "high", "p", "q", bare=True),
}
CROSS_MODEL = table(
    "One row per exchanged part, way of exchange and direction.",
    **_PLACE,
    normalised=number("share of the whole gain that is carried (into_base) or lost (into_tuned)", "share", "low", "high"),
    withheld=WITHHELD,
    by="activations or weights: what was exchanged",
    into="into_base: the tuned part in the base model; into_tuned: the base part in the tuned model",
)
ABLATION = table(
    "One row per set of heads that was ablated in the tuned model.",
    **_PLACE,
    kind="selected, or random: as many heads in each layer",
    p_random=number("selected set only: share of random sets, itself counted, whose ablation costs at least as much", "share"),
    p_less=number("the same, at most as much", "share"),
    more=number("selected set only: its effect minus the random sets' mean effect", "nats per token", "low", "high", optional=True),
    withheld="selected set only: why nothing is said of what it matters for; empty where it is",
)
LAYER_SETS = table(
    "One row per set of layers whose tuned activations were put into the base model.",
    component="the layers",
    selected="whether it is the selected set",
    gain=number("loss that is gained", "nats per token"),
    share=number("the same as a share of the whole gain", "share"),
    n="documents",
    withheld=WITHHELD,
    more=number("selected set only: how much more it carries than the mean of the others", "share", "low", "high"),
    p_random=number("selected set only: share of sets, itself counted, that carry at least as much", "share"),
    p_less=number("the same, at most as much", "share"),
)
IMPORTANCE = table(
    "One row per level, way of exchange and direction.",
    level="layer or head",
    by="activations or weights: what was exchanged",
    into="into_base or into_tuned, as in `cross_model`",
    rho=number("Spearman correlation over parts of attention KL and share of the gain", "", "low", "high", "p", bare=True),
    n="parts",
)


def _figures(tables: Tables) -> list[Figure]:
    cross = tables.get("cross_model")
    if cross is None:
        return []
    # where there is no gain there are no shares to draw
    cross = cross[cross["normalised"].notna()]
    drawn = [
        _by_layer(
            part,
            chosen_layers(tables),
            name=f"gain-by-layer-{by}",
            title=f"Who carries the gain: {by} of whole layers",
            caption=f"A layer's {by} exchanged between the models, as a share of the whole change in loss: tuned into base (carried alone) and base "
            "into tuned (lost without). Shares need not add up to one.",
        )
        for by in ("activations", "weights")
        if len(part := cross[(cross["by"] == by) & (cross["site"] == "layer")])
    ]
    for into, gain in _INTO.items():
        part = cross[(cross["by"] == "activations") & (cross["site"] == "z") & (cross["into"] == into)]
        if len(part):
            drawn.append(
                head_heatmap(
                    part.drop(columns="positions"),
                    "normalised",
                    name=f"gain-by-head-{into.replace('_', '-')}",
                    title=f"Heads: gain {gain}",
                    legend="share of the gain (orange: for it)",
                    caption=counted_in("Each head's output (z) exchanged between the models on the same documents.", part, "documents"),
                    scale="change",
                    selected=chosen_heads(tables),
                    tooltip=_TOOLTIP,
                )
            )
    return drawn


def _by_layer(part: pd.DataFrame, layers: Sequence[int], *, name: str, title: str, caption: str) -> Figure:
    wide = part[["layer", "n"]].drop_duplicates("layer").sort_values("layer")
    for into in _INTO:
        own = part[part["into"] == into].set_index("layer")
        for end in ("", "_low", "_high"):
            wide[f"{into}{end}"] = wide["layer"].map(own[f"normalised{end}"])
    caption = counted_in(caption, part, "documents")
    return layer_curves(
        wide, _INTO, name=name, title=title, axis="share of the gain", caption=caption, selected=layers, zero=True, share=True
    )


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "ablation" in tables:
        shown.append(Shown("Ablating the selected heads", _ablation(tables["ablation"])))
    if "importance" in tables:
        shown.append(Shown("Does what changed most matter most?", _importance(tables["importance"])))
    return shown


def _ablation(ablation: pd.DataFrame) -> View:
    """Return what ablating the selected heads costs beside random sets."""
    rows = [
        (
            words("selected heads"),
            value(row["effect"], note=interval(row["low"], row["high"], sign=True), sign=True),
            Cell(written(row["p_random"]), str(row.get("withheld") or "")),
        )
        for row in ablation[ablation["kind"] == "selected"].to_dict("records")
    ]
    random = ablation.loc[ablation["kind"] == "random", "effect"]
    if len(random):
        low, high = random.quantile([0.025, 0.975])
        rows.append(
            (
                words(f"{len(random)} random sets, same layers"),
                value(random.mean(), note=f"95\u202f% of them {interval(low, high, sign=True)}", sign=True),
                Cell(""),
            )
        )
    return View(("ablated in the tuned model", "cost, nats per token", "p against random"), tuple(rows))


def _importance(importance: pd.DataFrame) -> View:
    """Return the rank correlations of change and importance."""
    named = importance.assign(part=[f"{row.level}s, {row.by}, {_INTO.get(str(row.into), row.into)}" for row in importance.itertuples()])
    view = Table(named).words("part", "attention KL against the gain")
    return view.numbers("rho", "rank correlation", ends=("low", "high"), sign=True).numbers("p", "p").numbers("n", "parts").view()


def _findings(tables: Tables) -> list[Finding]:
    """Say what the selected layers carry together beside other sets of as many layers."""
    sets = tables.get("layer_sets")
    if sets is None or not sets["selected"].any():
        return []
    row = sets[sets["selected"]].iloc[0]
    places = layers_in_words(row["component"])
    if row.get("withheld"):
        text = f"What the selected {places} carry of the gain"
        card = Card("withheld", f"what {places} carry of the gain", str(row["withheld"]))
        return [Finding(text, n=row["n"], unit="documents", rows=(row,), withheld=str(row["withheld"]), table="layer_sets", card=card)]
    others = (("selected", "==", False), ("share", ">", float("-inf")))
    count, least, most = Derived("layer_sets", others), *(Derived("layer_sets", others, "share", how) for how in ("min", "max"))
    beside = ""
    if count.of(tables):
        beside = f"; {count.written(tables)} other sets of as many layers carry {percent(least.of(tables))} to {percent(most.of(tables))}"
    if pd.notna(row.get("more")):
        # in points of the gain: "12 % more" would read as a ratio
        ends = interval(100 * row["more_low"], 100 * row["more_high"], sign=True)
        beside += f" (selected minus their mean: {written(100 * row['more'], sign=True)} points {ends})".replace(" )", ")")
    elif not count.of(tables):
        beside = "; without other sets of as many layers beside them, this does not say that they carry more than any others"
    return [
        Finding(
            f"Together the selected {places} carry {percent(row['share'])} of the gain{beside}",
            n=row["n"],
            unit="documents",
            rows=(row,),
            derived=(count, least, most) if count.of(tables) else (count,),
            effect=abs(float(row["share"])),
            card=Card(percent(row["share"]), f"of the gain is carried by {places}", beside.removeprefix("; "))
            if count.of(tables)
            else None,
            table="layer_sets",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [*withheld_shares(tables, "cross_model"), THIS_PAIR]


SECTION = Section(
    id="matters",
    heading="What carries the gain",
    intro=(
        "A difference is a correlation. Here parts of one model are put into the other, on the same documents, and the loss on the summary is read: "
        "100\u202f% is the whole gain of fine-tuning."
    ),
    unit="documents",
    tables={"cross_model": CROSS_MODEL, "ablation": ABLATION, "layer_sets": LAYER_SETS, "importance": IMPORTANCE},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="gain",
    adds="mechscope study summarization --base BASE --tuned TUNED --data DATA --out NEW_RUN",
)
