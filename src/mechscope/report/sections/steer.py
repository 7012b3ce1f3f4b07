"""Steering: what a direction does to a metric at several strengths, what it costs on neutral text, and what the model then writes."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.intervals import response_curves
from mechscope.report.marks.tables import Shown, Table, View, strongest
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, label
from mechscope.report.theme import number as written

STEER = table(
    "One row per direction, strength and set of texts.",
    direction="what the direction is the difference of, or the latent that writes it; random: one of equal length",
    draw="which random direction, −1 for the direction itself",
    strength="how many times it was added, at every token",
    texts="pairs, or neutral: texts that steering should leave alone",
    metric="the metric; of neutral texts loss, nats per token",
    n="texts",
    value=number("mean metric of the steered run", "of the metric"),
    mean=number("its mean difference from the unsteered run", "of the metric", "se", "low", "high", bare=True),
)
STEER_TEXTS = table(
    "One row per direction and strength.",
    direction="what the direction is the difference of, or the latent that writes it; random: one of equal length",
    draw="0 for the random direction, −1 for the direction itself",
    strength="how many times it was added, at every token; 0 is the model itself",
    text="the text that was continued",
    continuation="what the model wrote, greedily",
)


def _figures(tables: Tables) -> list[Figure]:
    if "steer" not in tables:
        return []
    drawn = []
    for texts, own in tables["steer"].groupby("texts", sort=False):
        rows = own.assign(
            control=own["draw"] >= 0,
            series=["the direction" if draw < 0 else "random directions" for draw in own["draw"]],
            line=own["draw"],
        )
        neutral = texts == "neutral"
        drawn.append(
            response_curves(
                rows.drop(columns="value").rename(columns={"mean": "value"}),
                name=f"steer-{texts}",
                title="What it costs on neutral text" if neutral else "What it does",
                axis="change of loss, nats per token" if neutral else f"change of {own['metric'].iloc[0]}",
                caption="Band: 95\u202f% interval over texts, of the direction. Dashed: random directions of equal length, one line each.",
                x=("strength", "strength"),
            )
        )
    return drawn


def _name(draw: int) -> str:
    return "the direction" if draw < 0 else f"random {draw}"


def _named(steer: pd.DataFrame) -> str:
    return f"The direction: {label(steer.loc[steer['draw'] < 0, 'direction'].iloc[0])}."


def _by_strength(steer: pd.DataFrame) -> View:
    """Return a row per direction and strength, what it does beside what it costs."""
    at = ["draw", "strength"]
    neutral = steer[steer["texts"] == "neutral"].set_index(at).add_prefix("cost_")
    rows = steer[steer["texts"] == "pairs"].join(neutral, on=at)
    rows = rows.assign(direction=[_name(draw) for draw in rows["draw"]])
    view = Table(rows).words("direction", "direction").numbers("strength", "strength")
    view = view.numbers("mean", f"change of {rows['metric'].iloc[0]}", ends=("low", "high"), sign=True).numbers("n", "pairs")
    view = view.numbers("cost_mean", "change of loss, neutral", ends=("cost_low", "cost_high"), sign=True)
    return view.numbers("cost_n", "neutral texts").view()


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "steer" in tables:
        shown.append(Shown("By strength", _by_strength(tables["steer"]), words=_named(tables["steer"]), terminal=True))
    if "steer_texts" in tables:
        view = (
            Table(tables["steer_texts"])
            .words("direction", "direction")
            .numbers("strength", "strength")
            .texts("continuation", "continuation")
        )
        shown.append(Shown("What the model writes", view.view(), words=f"After: {label(tables['steer_texts']['text'].iloc[0])}"))
    return shown


def _strongest(steer: pd.DataFrame) -> tuple[pd.Series, pd.Series, pd.DataFrame]:
    """Return the strength that changes the pairs' metric most, its cost on neutral text, and what random directions do at that strength."""
    own = steer[(steer["draw"] < 0) & (steer["texts"] == "pairs")]
    top = strongest(own, "mean", 1).iloc[0]
    there = steer[steer["strength"] == top["strength"]]
    cost = there[(there["draw"] < 0) & (there["texts"] == "neutral")].iloc[0]
    return top, cost, there[(there["draw"] >= 0) & (there["texts"] == "pairs")]


def _findings(tables: Tables) -> list[Finding]:
    if "steer" not in tables:
        return []
    top, cost, controls = _strongest(tables["steer"])
    count = Derived("steer", (("strength", "==", top["strength"]), ("draw", ">=", 0), ("texts", "==", "pairs")))
    text = (
        f"Added {written(top['strength'])} times, the direction changes {top['metric']} by {written(top['mean'], sign=True)} "
        f"{interval(top['low'], top['high'], sign=True)}, and the loss of neutral text by {written(cost['mean'], sign=True)} "
        f"{interval(cost['low'], cost['high'], sign=True)} nats per token (over {written(int(cost['n']))} texts)"
    )
    if len(controls):
        low, high = controls["mean"].min(), controls["mean"].max()
        beyond = top["low"] > high or top["high"] < low
        text += (
            f"; {count.written(tables)} random directions of equal length change {top['metric']} by {written(low, sign=True)} to {written(high, sign=True)}: "
            f"the direction's interval {'lies beyond' if beyond else 'does not lie beyond'} all of them"
        )
    note = f"{written(cost['mean'], sign=True)} nats on neutral text"
    return [
        Finding(
            text,
            n=top["n"],
            rows=(top, cost, *(row for _, row in controls.iterrows())),
            derived=(count,),
            effect=abs(float(top["mean"])),
            card=Card(written(top["mean"], sign=True), f"on {top['metric']} at strength {written(top['strength'])}", note),
            table="steer",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "The strength of the finding is the one with the largest change; one that costs much on neutral text breaks the model rather than steering it."
        ),
        *few_texts(tables, "steer"),
    ]


SECTION = Section(
    id="steer",
    heading="Steering",
    intro=(
        "A direction, the difference of the mean activations on two sets of texts (Marks & Tegmark 2023; Panickssery et al. 2023), or what a "
        "latent of a dictionary writes, is added to the activations "
        "at every token (Turner et al. 2023). What it does is measured on texts that it was not taken from, what it costs by the loss of neutral text. "
        "Random directions of equal length are the control: a push of that size moves much of anything. Each change is the steered run minus the unsteered "
        "one on the same text, the mean over texts with a 95\u202f% interval."
    ),
    tables={"steer": STEER, "steer_texts": STEER_TEXTS},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
