"""What was found of circuits, in sentences and a few large numbers, and what a reader must keep in mind.

As in `summary`, every sentence carries its number and its interval, and says "more" or "less" only where the interval allows it.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from mechscope.report.circuit_slider import Picture
from mechscope.report.heatmaps import Q_SIGNIFICANT
from mechscope.report.summary import Card
from mechscope.report.theme import interval, label, model_name, name_of, number, percent

Tables = Mapping[str, pd.DataFrame]

# The size two circuits are compared at in the summary, where neither's own size is known: 1 % of the edges.
_USUAL = 0.01


def only_circuits(tables: Tables) -> bool:
    """Return whether a run is about circuits and nothing else."""
    return all(name.startswith("circuit_") for name in tables)


def circuit_title(model: str | None, base: str | None) -> str:
    """Return the title of the page of a run about circuits, of one model or of a base and what was made of it."""
    if model or not base:
        return f"The circuit of {model_name(model)}" if model else "Circuits"
    return f"The circuits of {model_name(base)} before and after fine-tuning"


def circuit_sentences(tables: Tables, drawn: list[Picture]) -> list[str]:
    """Return the findings, one sentence or two each; nothing is said about tables that are absent."""
    found = [_circuit(picture) for picture in _ends(drawn)]
    return [sentence for sentence in (*found, _overlap(tables, drawn), _shift(tables), _gain(tables)) if sentence]


def circuit_cards(drawn: list[Picture]) -> list[Card]:
    """Return the large numbers of the first and the last model: the size of the circuit and its faithfulness."""
    found = []
    for picture in _ends(drawn):
        whose = f", {name_of(picture.model)}" if len(drawn) > 1 else ""
        share = percent(len(picture.circuit) / len(picture.edges), digits=2)
        found.append(Card(number(len(picture.circuit)), f"edges in the circuit{whose}", f"{share} of {number(len(picture.edges))}"))
        if picture.chosen is not None:
            beside = f"random circuits of that size: {picture.faithfulness_words()[1]}"
            note = f"{interval(picture.chosen['low'], picture.chosen['high'])}; {beside}".removeprefix("; ")
            found.append(Card(number(picture.chosen["value"]), f"faithfulness{whose}", note))
    return found


def circuit_caveats(tables: Tables) -> list[str]:
    """Return what a reader must keep in mind of circuits; nothing without any."""
    if not any(name.startswith("circuit_") for name in tables):
        return []
    found = [
        "An edge's score says what changes when that edge alone is changed. Edges that stand in for one another (redundant or backup heads) can have "
        "small scores and still matter together: completeness tests for them.",
        "A circuit is of a task's texts and a metric. On other texts the same model may use other edges.",
        "Faithfulness is a ratio: it can lie above 1 or below 0, and where the metric hardly differs between the two runs it says little.",
    ]
    edges = tables.get("circuit_edges")
    texts = int(edges["n"].max()) if edges is not None and "n" in edges and edges["n"].notna().any() else 0
    if 0 < texts < 30:
        found.insert(0, f"Only {texts} texts were scored; intervals from fewer than 30 are rough.")
    return found


def _ends(drawn: list[Picture]) -> list[Picture]:
    """Return the first and the last model: base and tuned, whatever lies between them."""
    return [drawn[0], drawn[-1]] if len(drawn) > 1 else drawn


def _circuit(picture: Picture) -> str:
    faithful, random = picture.faithfulness_words()
    sentence = picture.size_words().replace("The chosen circuit:", f"{picture.title}:")
    return (
        f"{sentence}."
        if picture.chosen is None
        else f"{sentence}. Its faithfulness is {faithful}; that of random circuits of its size is {random}."
    )


def _overlap(tables: Tables, drawn: list[Picture]) -> str:
    overlap = tables.get("circuit_overlap")
    rows = None if overlap is None else overlap[overlap["what"] == "edges"]
    if rows is None or rows.empty:
        return ""
    size = len(drawn[0].circuit) / len(drawn[0].edges) if drawn and len(drawn[0].circuit) else _USUAL
    row = rows.iloc[int((rows["fraction"] - size).abs().to_numpy().argmin())]
    shared = (
        f"With {percent(row['fraction'], digits=2)} of the edges each, the circuits of base and tuned share a Jaccard index of "
        f"{number(row['jaccard'])}; chance gives {number(row['null'])}"
    )
    if pd.isna(row.get("change_low")):
        return f"{shared}."
    verdict = "fine-tuning changed the circuit more than noise does" if row["change_low"] > 0 else "no change beyond noise was shown"
    return (
        f"{shared}. Found on halves of the texts, two circuits of base share {number(row['self_base'])}, two of tuned {number(row['self_tuned'])}, and "
        f"base and tuned {number(row['across'])}: {verdict} (the smaller of the first two less the third is {number(row['change'], sign=True)}, in 95 % "
        f"of halvings {interval(row['change_low'], row['change_high'], sign=True)})."
    )


def _shift(tables: Tables) -> str:
    shift = tables.get("circuit_shift")
    if shift is None:
        return ""
    top = shift.iloc[int(shift["shift"].abs().to_numpy().argmax())]
    return (
        f"The score of {label(top['edge'])} shifted most, from {number(top['base'], sign=True)} to {number(top['tuned'], sign=True)} "
        f"({number(top['shift'], sign=True)} {interval(top['low'], top['high'], sign=True)}); {number(int((shift['q'] < Q_SIGNIFICANT).sum()))} of "
        f"{number(len(shift))} edges shifted at q < {Q_SIGNIFICANT}."
    )


def _gain(tables: Tables) -> str:
    gain = tables.get("circuit_gain")
    rows = None if gain is None else gain[(gain["kind"] == "tuned") & gain["share"].notna()]
    if rows is None or rows.empty:
        return ""
    # half of the gain is a size to remember; where no size reaches it, the largest is told
    half = rows[rows["share"] >= 0.5].sort_values("edges")
    row = half.iloc[0] if len(half) else rows.sort_values("edges").iloc[-1]
    return (
        f"{number(int(row['edges']))} edges of the tuned model ({percent(row['fraction'], digits=2)}), put into the base model, carry "
        f"{percent(row['share'])} of the gain ({percent(row['low'])} to {percent(row['high'])})."
    )
