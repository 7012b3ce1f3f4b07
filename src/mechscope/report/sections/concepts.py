"""Concepts: how well few latents of a dictionary stand for what is known of texts, beside controls that learned nothing."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mechscope.report.marks.tables import Cell, Row, Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import few_texts
from mechscope.report.statements import Caveat, Finding
from mechscope.report.theme import interval, percent

_WHOLE = "probe of the activations"
_ABSORBED = ("absorption, full", "absorption, fraction")

TABLES = {
    "dictionary_concepts": table(
        "One row per dictionary, control, score and concept, on labelled texts that were not learned from.",
        dictionary="its name",
        control="empty for the dictionary itself; what learned nothing otherwise",
        score="sparse probing and probe of the activations (balanced accuracy), SCR, TPP, absorption (full, fraction)",
        concept="kind=fire; an attribute for the mean over its classes; kind despite day for SCR; fact where, first letter m for absorption",
        count=number("latents that the probe reads, that are taken out, or that are the concept's main ones"),
        n="texts",
        value=number("the score", "share", "low", "high", bare=True),
        withheld="why it is not given; empty where it is",
        note="what must be known to read it; empty where nothing",
    ),
}


def _views(tables: Tables) -> list[Shown]:
    scored = tables["dictionary_concepts"]
    brief = _main_rows(scored)
    shown = []
    if not brief.empty:
        shown.append(Shown("What few latents tell, beside controls", _view(brief).view(), terminal=True, table="dictionary_concepts"))
    absorbed = scored[scored["score"].isin(_ABSORBED)]
    if not absorbed.empty:
        words = "Tokens of a concept in which none of the latents that stand for it speaks, as a more particular one does: lower is better."
        shown.append(Shown("Absorption", _view(absorbed).view(), words, folded=True, table="dictionary_concepts"))
    shown.append(Shown("All scores of concepts", _view(scored).texts("note", "note").view(), folded=True, table="dictionary_concepts"))
    return shown


def _view(rows: pd.DataFrame) -> Table:
    view = Table(rows).words("dictionary", "dictionary", strong=lambda row: not row["control"]).cells("control", "which is", _which)
    view = view.words("score", "score").words("concept", "concept").numbers("count", "latents")
    return view.shares("value", "value", ends=("low", "high")).numbers("n", "texts")


def _which(row: Row) -> Cell:
    return Cell(str(row["control"]) or "itself")


def _main_rows(scored: pd.DataFrame) -> pd.DataFrame:
    """Return of every attribute the probe on one latent and the most latents taken out: means over classes where there are several."""
    probes = scored[(scored["score"] == "sparse probing") & (scored["count"] == 1)]
    attributes = {str(concept).partition("=")[0] for concept in probes["concept"]}
    with_mean = set(probes["concept"]) & attributes
    main = probes[[("=" not in str(concept)) or str(concept).partition("=")[0] not in with_mean for concept in probes["concept"]]]
    removed = scored[scored["score"].isin(["SCR", "TPP"])]
    return pd.concat([main, removed[removed["count"] == removed["count"].max()]])


def _findings(tables: Tables) -> list[Finding]:
    scored = tables["dictionary_concepts"]
    rows = _main_rows(scored)
    found = []
    for (name, score, concept), own in rows.groupby(["dictionary", "score", "concept"], sort=False):
        found.append(_finding(str(name), str(score), str(concept), own, scored))
    return found


def _finding(name: str, score: str, concept: str, own: pd.DataFrame, scored: pd.DataFrame) -> Finding:
    row = own[own["control"] == ""].iloc[0]
    count = int(row["count"])
    said = {
        "sparse probing": f"One latent of dictionary {name} tells {concept} with a balanced accuracy of",
        "TPP": f"Taking out {count} latents of dictionary {name} for each class of {concept} costs its own probe more than those of others by",
        "SCR": f"Taking out {count} latents of dictionary {name} removes, of what a bias costs a probe of {concept},",
    }[score]
    if row["withheld"]:
        return Finding(said.rpartition(" ")[0], n=row["n"], rows=(row,), withheld=str(row["withheld"]), table="dictionary_concepts")
    others = [each for _, each in own[own["control"] != ""].iterrows() if not each["withheld"]]
    beside = [f"{each['control']} {_share(each)}" for each in others]
    quoted: list[Any] = [row, *others]
    if score == "sparse probing":
        whole = scored[
            (scored["score"] == _WHOLE) & (scored["concept"] == concept) & (scored["dictionary"] == name) & (scored["control"] == "")
        ]
        if len(whole) and not whole.iloc[0]["withheld"]:
            beside.append(f"all of the activations {_share(whole.iloc[0])}")
            quoted.append(whole.iloc[0])
    return Finding(
        f"{said} {_share(row)}" + (f"; {', '.join(beside)}" if beside else ""),
        n=row["n"],
        rows=tuple(quoted),
        effect=float(row["value"]),
        table="dictionary_concepts",
    )


def _share(row: Any) -> str:
    return f"{percent(row['value'])} {interval(100 * row['low'], 100 * row['high'])}".strip()


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        *few_texts(tables, "dictionary_concepts"),
        Caveat(
            "A class that few latents tell is one that they have; one that they do not tell may be spread over many, or be no direction at all. "
            "Chance is 50\u202f%.",
            weakens="dictionary_concepts",
        ),
    ]


SECTION = Section(
    id="concepts",
    heading="What latents stand for",
    intro=(
        "Of these texts something is known: classes of whole texts, and tokens that stand for a concept. Sparse probing: the balanced accuracy of a probe "
        "that reads the few latents whose class means differ most, of means over a text's tokens. TPP: taking out a class's latents should cost its own "
        "probe and no other. SCR: taking out the latents of an attribute that went with another where a probe was trained should give back what the bias "
        "cost. Absorption: the concept is there and its latents are silent."
    ),
    tables=TABLES,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
