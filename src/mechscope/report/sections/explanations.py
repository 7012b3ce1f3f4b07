"""Explanations: what latents, neurons and heads stand for, in words, and how well the words tell where they are active."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.intervals import interval_plot
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, number, optional, table
from mechscope.report.shared import WITHHELD
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, name_of, percent
from mechscope.report.theme import number as written

_KIND = "latents, neurons or heads"
_EXPLAINER = "who explains and judges: baseline (n-grams), local:MODEL or endpoint:MODEL"
_SCORER = "detection, fuzzing (balanced accuracy), simulation (Pearson's correlation), intruder (share right)"
_CONTROL = "empty; or shuffled explanations: its windows judged by the explanation of another unit, of the same dictionary"
_DICTIONARY = "of a latent: the dictionary that it belongs to; empty for neurons and heads"
# missing in tables of runs that explained one dictionary at a place
_OF = optional(_DICTIONARY)
_UNREADABLE = number("answers that could not be read, which count as wrong", "share")
# questions that are shown whole
_QUESTIONS = 6

TABLES = {
    "explanations": table(
        "One row per unit: a latent, neuron or head.",
        dictionary=_DICTIONARY,
        component="the unit: resid6.f12, m3.n1024, a3.h5",
        kind=_KIND,
        explainer=_EXPLAINER,
        explanation="what it stands for",
        active=number("tokens in which it is active", "tokens"),
        density=number("the same as a share of all that were read", "share"),
        train="windows in which it is active that it was explained from",
        test="held-out windows in which it is active that the explanation was judged on",
        strongest="the tokens of its largest activations in the windows that explain it, a list, each once",
        texts="texts, of which one half explains and the other judges",
    ),
    "explanation_scores": table(
        "One row per unit, scorer and control.",
        dictionary=_OF,
        component="the unit",
        kind=_KIND,
        explainer=_EXPLAINER,
        scorer=_SCORER,
        control=_CONTROL,
        n="answers that were asked for",
        score=number("the score, of the scorer's kind", "share or correlation"),
        low=number("its interval (95\u202f%) over windows, lower end; none of a simulation", "share"),
        high=number("its interval, upper end", "share"),
        chance=number("what guessing scores", "share or correlation"),
        unreadable=_UNREADABLE,
        withheld=WITHHELD,
    ),
    "explanation_summary": table(
        "One row per dictionary or kind of unit, scorer and control.",
        dictionary=_OF,
        kind=_KIND,
        explainer=_EXPLAINER,
        scorer=_SCORER,
        control=_CONTROL,
        n="units",
        score=number("mean score over units", "share or correlation", "low", "high", bare=True),
        chance=number("what guessing scores", "share or correlation"),
        unreadable=_UNREADABLE,
        withheld=WITHHELD,
    ),
    "explanation_questions": table(
        "One row per question that a language model was sent.",
        dictionary=_OF,
        component="the unit",
        control=_CONTROL,
        purpose="what it was asked for",
        text="what was sent",
        answer="what came back",
    ),
}


def _dictionaries(rows: pd.DataFrame) -> int:
    return int(rows.loc[rows["kind"] == "latents", "dictionary"].nunique()) if "dictionary" in rows else 0


def _units(rows: pd.DataFrame) -> list[str]:
    """Return what each row is of: latents, neurons or heads, and of which dictionary where there are several."""
    several = _dictionaries(rows) > 1
    return [
        f"{row['kind']} of {row['dictionary']}" if several and row["dictionary"] else str(row["kind"]) for row in rows.to_dict("records")
    ]


def _count(scores: pd.DataFrame) -> int:
    return len(scores[[name for name in ("dictionary", "component") if name in scores]].drop_duplicates())


def _figures(tables: Tables) -> list[Figure]:
    summary = tables.get("explanation_summary")
    if summary is None or not summary["score"].notna().any():
        return []
    summary = summary.assign(units=_units(summary))
    several = summary["units"].nunique() > 1
    rows = [
        row["scorer"] + (f" of {row['units']}" if several else "") + (", shuffled" if row["control"] else "")
        for row in summary.to_dict("records")
    ]
    drawn = summary.assign(row=rows, value=summary["score"].astype(float)).sort_values(["scorer", "units", "control"], kind="stable")
    drawn = drawn[drawn["value"].notna()]
    least, most = int(drawn["n"].min()), int(drawn["n"].max())
    counted = written(most) if least == most else f"{written(least)} to {written(most)}"
    return [
        interval_plot(
            drawn,
            name="explanation-scores",
            title="How well explanations tell where units are active",
            caption=(
                "Mean over units with its 95\u202f% interval; shuffled: each unit's windows judged by another unit's explanation. Guessing scores 0.5 in "
                f"detection and fuzzing, 0 in simulation, 0.2 with intruders. n = {counted} {'units' if several else drawn['kind'].iloc[0]}."
            ),
            axis="score",
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    shown = []
    summary, explained, scores = (tables.get(name) for name in ("explanation_summary", "explanations", "explanation_scores"))
    if summary is not None:
        summary = summary.assign(units=_units(summary))
        view = Table(summary).words("scorer", "scorer", strong=lambda row: not row["control"])
        if summary["units"].nunique() > 1:
            view = view.words("units", "of")
        view = view.mapped("control", "explanations", lambda control: str(control) or "their own").words("explainer", "explainer")
        view = view.shares("score", "mean score", ends=("low", "high")).numbers("chance", "chance").numbers("unreadable", "unreadable")
        shown.append(Shown("Scores of explanations", view.numbers("n", "units").view(), terminal=True, table="explanation_summary"))
    if explained is not None:
        listed = explained
        if scores is not None:
            of = ["dictionary", "component"] if "dictionary" in scores else ["component"]
            own = scores[scores["control"] == ""].pivot(index=of, columns="scorer", values="score")
            listed = explained.merge(own, left_on=of, right_index=True, how="left")
        view = Table(listed)
        if _dictionaries(explained) > 1:
            view = view.words("dictionary", "dictionary")
        view = (
            view.words("component", "unit")
            .texts("explanation", "stands for")
            .token_lists("strongest", "strongest at")
            .numbers("density", "density")
        )
        for scorer in ("detection", "fuzzing", "simulation", "intruder"):
            view = view.numbers(scorer, scorer)
        shown.append(Shown("What they stand for", view.view(), table="explanations"))
    if (questions := tables.get("explanation_questions")) is not None:
        view = Table(questions.drop_duplicates("purpose").head(_QUESTIONS)).words("component", "unit").words("purpose", "asked for")
        words = "The first question of each kind, whole; the table has all."
        view = view.texts("text", "sent").texts("answer", "answered")
        shown.append(Shown("What the language model was sent", view.view(), words, folded=True, table="explanation_questions"))
    return shown


def _findings(tables: Tables) -> list[Finding]:
    summary, found = tables.get("explanation_summary"), list[Finding]()
    if summary is None:
        return found
    for (kind, scorer), own in summary.groupby([_units(summary), summary["scorer"]], sort=False):
        rows = [each for _, each in own.iterrows()]
        row = rows[0]
        # a language model is shown no explanation where it looks for an intruder
        unexplained = scorer == "intruder" and row["explainer"] != "baseline"
        judge = name_of(row["explainer"])
        about = f"windows of {kind} told from an intruder by {judge}" if unexplained else f"explanations of {kind} by {judge}"
        if np.isnan(row["score"]):
            found.append(
                Finding(
                    f"how well {about} do in {scorer}" if not unexplained else f"{about}",
                    n=None,
                    rows=(row,),
                    withheld=str(row["withheld"]),
                    table="explanation_summary",
                )
            )
            continue
        said = (
            f"{judge} tells windows of {kind} from an intruder, no explanation shown, with a score of {_score(row)}"
            if unexplained
            else f"{about[0].upper()}{about[1:]} score {_score(row)} in {scorer} on held-out windows"
        )
        beside = "".join(f"; shuffled among the {kind}, {_score(each)}" for each in rows[1:] if not np.isnan(each["score"]))
        lost = f", {percent(row['unreadable'])} of the answers unreadable" if row["unreadable"] > 0 else ""
        found.append(
            Finding(
                f"{said} (chance {written(row['chance'])}{lost}){beside}",
                n=row["n"],
                unit=str(row["kind"]),
                rows=tuple(rows),
                # what guessing leaves to be had is had to this part
                effect=float((row["score"] - row["chance"]) / (1 - row["chance"])),
                card=Card(written(row["score"]), f"{scorer} score of explanations", f"chance {written(row['chance'])}")
                if scorer == "detection"
                else None,
                table="explanation_summary",
            )
        )
    return found


def _score(row: pd.Series) -> str:
    return f"{written(row['score'])} {interval(row['low'], row['high'])}".strip()


def _caveats(tables: Tables) -> list[Caveat]:
    found, scores = [], tables.get("explanation_scores")
    if scores is not None and (scores["withheld"] != "").any():
        without = scores[(scores["withheld"] != "") & (scores["control"] == "")]
        units = _count(without)
        if units:
            found.append(
                Caveat(
                    f"{written(units)} of {written(_count(scores))} units have no scores (the first: {without['withheld'].iloc[0]}): "
                    "the means are of the others.",
                    weakens="explanation_summary",
                    withheld=True,
                )
            )
    if scores is not None:
        lost = Derived("explanation_scores", (("unreadable", ">", 0),))
        count = lost.of(tables)
        if count:
            found.append(
                Caveat(
                    "Answers that could not be read count as wrong: such a score tells of the form of the answers too.",
                    "explanation_summary",
                )
            )
    explained = tables.get("explanations")
    summary = tables.get("explanation_summary")
    if summary is not None and (summary["control"] != "").any():
        found.append(
            Caveat(
                "Where units are alike, the explanation of another one tells where they are active too, and shuffled ones score above chance.",
                "explanation_summary",
            )
        )
    if explained is not None:
        found.append(
            Caveat(
                "A score is of explanation and judge together: an explanation that is right and badly judged scores low. "
                "The baseline knows tokens alone: it says nothing of what stands farther back than its n-grams.",
                weakens="explanation_summary",
            )
        )
        if set(explained["kind"]) & {"neurons", "heads"}:
            found.append(
                Caveat(
                    "Neurons and heads are hardly ever silent: here one is active in the tokens where it is largest, heads by the norm of what they write.",
                    weakens="explanations",
                )
            )
    return found


SECTION = Section(
    id="explanations",
    heading="Explanations",
    intro=(
        "What a unit stands for is said from windows of one half of the texts and judged on windows of the other: does it tell in which windows the unit is "
        "active (detection), whether the marked tokens are those in which it is (fuzzing), how active it is in every token (simulation), and which of five "
        "windows is the one without it (intruder; a language model looks for it without an explanation)? "
        "Beside it stands what the explanation of another unit scores on the same windows."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    unit="units",
)
