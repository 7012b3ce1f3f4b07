"""Positions: how much heads look for a key by its distance, from the weights alone."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import grid_heatmap, head_heatmap
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label, percent
from mechscope.report.theme import number as written

_HEADS = 30
# a head that has its highest score at one offset for so many queries is called positional
_MOST = 0.5

POSITIONS = table(
    "One row per head and offset.",
    layer="the head's layer",
    head="its number",
    component="its name, a3.h5",
    space="learned (positions have vectors of their own) or rotary (positions turn queries and keys)",
    offset="distance from query to key, in tokens; 0 is the query's own position",
    score=number("score before softmax: mean over queries with that many keys behind them, or over all pairs of tokens", "of the softmax"),
    share=number("queries that score the key at this offset highest of all they can see; none in rotary families", "share"),
    chance=number("the same for a query that picks a key at random; none in rotary families", "share"),
)


def _learned(positions: pd.DataFrame) -> bool:
    return bool((positions["space"] == "learned").all())


def _contrast(positions: pd.DataFrame) -> pd.DataFrame:
    """Add what tells offsets of a head apart: the share of queries, or in rotary families the score over the head's mean score."""
    if _learned(positions):
        return positions.assign(strength=positions["share"])
    return positions.assign(strength=positions["score"] - positions.groupby("component")["score"].transform("mean"))


def _strongest(positions: pd.DataFrame) -> pd.DataFrame:
    """Return each head's strongest offset, the heads in order of its strength."""
    positions = _contrast(positions)
    return positions.loc[positions.groupby("component", sort=False)["strength"].idxmax()].sort_values(
        "strength", ascending=False, kind="stable"
    )


def _figures(tables: Tables) -> list[Figure]:
    positions, learned = _contrast(tables["positions"]), _learned(tables["positions"])
    legend = "share of queries, √ scale" if learned else "score over the head's mean"
    drawn = [
        head_heatmap(
            own,
            "strength",
            name=f"positions-offset-{offset}",
            title=f"Heads that look {words}",
            legend=legend,
            caption="From the weights alone: "
            + (
                "queries that score the key at this offset highest."
                if learned
                else "the average query's score for the average key at this offset."
            ),
            scale="magnitude" if learned else "change",
            tooltip={"score": "score", "strength": legend},
        )
        for offset, words in ((0, "at their own position"), (1, "at the token before"))
        if len(own := positions[positions["offset"] == offset])
    ]
    heads = list(_strongest(tables["positions"])["component"].head(_HEADS))
    cells = positions[positions["component"].isin(heads)]
    cells = cells.assign(order=cells["component"].map({name: at for at, name in enumerate(heads)}), at=cells["offset"].astype(str))
    cells = cells.sort_values(["order", "offset"], kind="stable").drop(columns="order")
    drawn.append(
        grid_heatmap(
            cells,
            "strength",
            across=("at", "offset, tokens back"),
            down=("component", "head"),
            name="positions-offsets",
            title="The heads that attend most by distance",
            legend=legend,
            caption=f"The {len(heads)} heads with the strongest offset.",
            scale="magnitude" if learned else "change",
            tooltip={"score": "score", "strength": legend},
        )
    )
    return drawn


def _views(tables: Tables) -> list[Shown]:
    view = Table(_strongest(tables["positions"]).head(40)).words("component", "head").numbers("offset", "strongest offset")
    if _learned(tables["positions"]):
        view = view.numbers("share", "share of queries").numbers("chance", "chance", digits=2)
    else:
        view = view.numbers("strength", "score over its mean", sign=True)
    return [Shown("Heads by their strongest offset", view.numbers("score", "score", sign=True).view(), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    """Say which head prefers one distance most; it is read off the weights, so there is no n."""
    positions = tables["positions"]
    heads, top = Derived("positions", (), "component", "distinct"), _strongest(positions).iloc[0]
    where = (
        "its own position" if top["offset"] == 0 else "the token before" if top["offset"] == 1 else f"the token {int(top['offset'])} back"
    )
    words = f"attends most by distance: {int(top['offset'])} back"
    if not _learned(positions):
        offsets = Derived("positions", (), "offset", "distinct")
        mean = Derived("positions", (("component", "==", top["component"]),), "score", "mean")
        return [
            Finding(
                f"Of {heads.written(tables)} heads {label(top['component'])} prefers one distance most: at {where} the average query scores the average key "
                f"{written(top['score'], sign=True)}, over {offsets.written(tables)} offsets {written(mean.of(tables), sign=True)} on average. There are no "
                "texts behind this: it is read off the weights",
                rows=(top.drop("strength"),),
                derived=(heads, offsets, mean),
                effect=abs(float(top["strength"])),
                card=Card(
                    label(top["component"]),
                    words,
                    f"{written(top['score'], sign=True)} against {written(mean.of(tables), sign=True)} on average",
                ),
                table="positions",
            )
        ]
    last, before = Derived("positions", (), "offset", "max"), Derived("positions", (("offset", "==", 1), ("share", ">=", _MOST)))
    return [
        Finding(
            f"By its positions alone {label(top['component'])} scores {where} highest for {percent(top['share'])} of all queries, the most of "
            f"{heads.written(tables)} heads and offsets 0–{int(last.of(tables))}; a query that picks at random would do so in "
            f"{percent(top['chance'], digits=1)}. {before.written(tables)} of {heads.written(tables)} heads score the token before highest for half of the "
            "queries or more. There are no texts behind this: it is read off the weights",
            rows=(top.drop("strength"),),
            derived=(heads, last, before),
            effect=float(top["share"]),
            card=Card(label(top["component"]), words, f"{percent(top['share'])} of queries, from the weights alone"),
            table="positions",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "Weights alone: what stands at the positions is left out, and positions are read as if nothing had been added to them by earlier layers."
        ),
        Caveat(
            "This does not find previous-token heads: of GPT-2's 144 heads the known ones rank 80th and 100th here. Which heads attend to the token before, "
            "mechscope roles measures on texts."
        ),
    ]


SECTION = Section(
    id="positions",
    heading="Attention by position",
    intro=(
        "How much a query looks for a key by where it stands, from the weights alone, as if no block before had written anything. Learned positions go through "
        "a head's QK circuit, W_pos W_QK W_posᵀ (Elhage et al. 2021, “A Mathematical Framework for Transformer Circuits”); in rotary families an "
        "average query scores an average key at each offset. A query that picks one of the keys it can see at random is the control."
    ),
    unit="",
    tables={"positions": POSITIONS},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
