"""Roles of heads: a small map of all heads per role, what changed in them, and the heads that have each role.

Scores of different roles have different scales, so the maps are coloured by how far a score lies on the way from its null (what a head without the
role would score on the same texts) to the largest score the role allows; the numbers themselves are told on hovering and in the tables. A dot marks
heads that have the role; in the maps of change an outline marks what is significant.
"""

from __future__ import annotations

import math

import altair as alt
import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.head_maps import head_maps
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT, diverging, gradient
from mechscope.report.marks.tables import Cell, Row, Shown, Table, strongest
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import by_model, each_model, role_in_words
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, percent
from mechscope.report.theme import number as written

HEADS_SHOWN = 3
"""Heads that the table names per role and model."""

_TOP = 20

_MODEL, _ROLE = "base, tuned or model", "the role, such as previous-token"
_HEAD = {"layer": "its layer", "head": "its head", "component": "the head, such as a3.h5"}
_N = "texts that say something of the head; of roles read off weights, sampled tokens"

TABLES = {
    "head_roles": table(
        "One row per model, role and head.",
        model=_MODEL,
        role=_ROLE,
        **_HEAD,
        n=_N,
        score=number("mean score", "of the role", "low", "high", bare=True),
        null=number("what chance gives on the same texts", "of the role"),
        excess=number("score − null", "of the role", "low", "high"),
        threshold=number(
            "excess that heads of this model must exceed for the role: what its heads reach when turned at random, or the least worth the name; "
            "none for roles that are only scored",
            "of the role",
        ),
        q="q: expected share of false ones among the model's heads with at least this excess, as many turned heads as reach it; none for roles that "
        "are only scored",
        has_role=f"whether q is at most {Q_SIGNIFICANT}, the excess is worth the name and its interval lies above zero",
    ),
    "role_definitions": table(
        "One row per role.",
        role=_ROLE,
        definition="what is measured, on what",
        source="the paper it comes from",
        low=number("least score there can be; none where it has no bound", "of the role"),
        high=number("largest score there can be; none where it has no bound", "of the role"),
        null="what a head without the role scores, and how that is computed",
        least=number("smallest excess over the null that is worth the name; none for roles that are only scored", "of the role"),
    ),
    "head_role_changes": table(
        "One row per role and head, and one per role for the mean over all heads (component all); of a base and a tuned model.",
        role=_ROLE,
        layer="its layer, −1 for all heads",
        head="its head, −1 for all heads",
        component="the head, or all",
        n=_N,
        base=number("mean score in the base model", "of the role"),
        tuned=number("mean score in the tuned model", "of the role"),
        change=number("tuned − base, paired by text", "of the role", "low", "high", bare=True),
        p="p: that the change is zero, two-sided",
        q="q: p after Benjamini–Hochberg over the heads of the role; of the means over all heads, over the roles",
        gained=f"whether only the tuned model's head has the role, and its score rose at q < {Q_SIGNIFICANT}",
        lost=f"whether only the base model's head has the role, and its score fell at q < {Q_SIGNIFICANT}",
    ),
    "head_cards": table(
        "One row per model and chosen head.",
        model=_MODEL,
        component="the head, such as a3.h5",
        layer="its layer",
        role="the roles it has, with their scores; empty where it has none",
        attends_to="tokens it attends to most where the summary is written, with their mean share of attention",
        top_tokens="tokens whose logits it raises most there by direct logit attribution, with the mean in logits",
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    """Draw the maps of roles of every model, and those of change."""
    roles, changes, drawn = tables.get("head_roles"), tables.get("head_role_changes"), list[Figure]()
    if roles is not None:
        shown = roles.assign(strength=_strengths(roles, tables.get("role_definitions")))
        for end, whose, own in each_model(shown, ": "):
            drawn.append(_scores(own, name=f"roles{end}", title=f"Which heads have which role{whose}"))
    if changes is not None and (changes["head"] >= 0).any():
        drawn.append(_changes(changes[changes["head"] >= 0]))
    return drawn


def _strengths(roles: pd.DataFrame, definitions: pd.DataFrame | None) -> np.ndarray:
    """Return the share of the way from null to the role's largest score, 0 to 1."""
    largest = roles.groupby("role")["score"].max()
    if definitions is not None:
        stated = definitions.drop_duplicates("role").set_index("role")["high"].astype(float).reindex(largest.index)
        largest = stated.where(np.isfinite(stated), largest)
    null = roles["null"].astype(float).fillna(0.0).to_numpy()
    room = roles["role"].map(largest).to_numpy(dtype=float) - null
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(room > 0, (roles["score"].to_numpy(dtype=float) - null) / room, np.nan)
    return np.asarray(np.clip(share, 0.0, 1.0))


def _scores(roles: pd.DataFrame, *, name: str, title: str) -> Figure:
    caption = (
        "Layers down, heads across. A score at or below its null has the ground's colour; no colour: there is nothing above the null. "
        "A dot marks heads that have the role."
    )
    return head_maps(
        roles, "strength", name=name, title=title, caption=caption, mark="has_role", dot=True,
        scale=alt.Scale(type="sqrt", domain=[0, 1], clamp=True, interpolate="rgb"),
        legend=gradient("from null to the largest score, √ scale", share=True),
        tooltip={"score": "score", "low": "95\u202f% from", "high": "to", "null": "null", "excess": "score − null", "q": "q", "n": "texts"},
    )  # fmt: skip


def _changes(changes: pd.DataFrame) -> Figure:
    scale, words = diverging(changes["change"])
    return head_maps(
        changes.assign(surely=changes["q"] < Q_SIGNIFICANT), "change", name="roles-change", title="Which roles fine-tuning strengthened",
        caption=f"Tuned minus base, in each role's own score. Outlined: q < {Q_SIGNIFICANT} (Benjamini–Hochberg).{words}",
        scale=scale, legend=gradient("change of the score"), mark="surely", dot=False,
        tooltip={"base": "base", "tuned": "tuned", "change": "change", "low": "95\u202f% from", "high": "to", "q": "q", "n": "texts"},
    )  # fmt: skip


def _views(tables: Tables) -> list[Shown]:
    """Show the change of every role's mean over heads, the heads that changed most, the first heads of every role, the definitions, chosen heads."""
    changes, roles, definitions = (tables.get(name) for name in ("head_role_changes", "head_roles", "role_definitions"))
    shown = [] if changes is None else _change_views(changes)
    if roles is not None:
        shown += _role_views(roles, first=not shown)
    if definitions is not None:
        rows = Table(definitions).mapped("role", "role").texts("definition", "definition").cells("high", "range", _range)
        rows = rows.texts("null", "null").numbers("least", "least excess").texts("source", "source")
        shown.append(Shown("What each role means", rows.view(), folded=True))
    if "head_cards" in tables:
        shown.append(_card_view(tables["head_cards"]))
    return shown


def _role_views(roles: pd.DataFrame, *, first: bool) -> list[Shown]:
    """Return the strongest heads of every model; `first` for a run whose terminal shows them."""
    shown = []
    for _, whose, own in each_model(roles):
        ranked = own.sort_values("score", ascending=False, kind="stable").groupby("role", sort=False).head(HEADS_SHOWN)
        ranked = _in_order(ranked, "role", own["role"])
        rows = Table(ranked).mapped("role", "role").words("component", "head", strong=lambda row: bool(row["has_role"]))
        rows = rows.numbers("score", "score", ends=("low", "high")).numbers("null", "null")
        rows = rows.numbers("excess", "score − null", ends=("excess_low", "excess_high"), sign=True)
        rows = rows.numbers("threshold", "needed").numbers("q", "q", digits=2)
        words = (
            f"The {HEADS_SHOWN} heads with the highest score in each role; bold: has the role. Needed: the excess that this model's heads must exceed, "
            "which is what they reach when they are turned at random."
        )
        shown.append(Shown(f"Heads of each role{whose}", rows.numbers("n", "texts").view(), words, folded=True))
    if first:
        having = strongest(roles[roles["has_role"]], "score", _TOP)
        rows = Table(having).mapped("role", "role").words("component", "head").numbers("score", "score", ends=("low", "high"))
        rows = rows.numbers("null", "null").numbers("n", "texts")
        words = f"The {len(having)} highest scores of heads that have the role."
        shown.insert(0, Shown("Heads with a role", rows.view(), words, terminal=True))
    return shown


def _in_order(rows: pd.DataFrame, column: str, names: pd.Series) -> pd.DataFrame:
    """Sort rows by the order in which their names first stand."""
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return rows.sort_values(column, key=lambda values: values.map(order), kind="stable")


def _range(row: Row) -> Cell:
    low, high = float(row["low"]), float(row["high"])
    return Cell("any number" if math.isnan(low) and math.isnan(high) else f"{written(low)} to {written(high)}")


def _card_view(cards: pd.DataFrame) -> Shown:
    """Show the chosen heads one by one, base and tuned below each other."""
    cards = _in_order(cards, "component", cards["component"])
    rows = Table(cards).words("component", "head", strong=lambda row: True)
    if cards["model"].nunique() > 1:
        rows = rows.mapped("model", "model")
    rows = rows.texts("role", "role").texts("attends_to", "attends to").texts("top_tokens", "raises")
    return Shown("The chosen heads, one by one", rows.view(), "What each attends to and what it writes while a summary is read.")


def _change_views(changes: pd.DataFrame) -> list[Shown]:
    whole, heads = changes[changes["component"] == "all"], changes[changes["component"] != "all"]
    shown = []
    if len(whole):
        view = _change_table(Table(whole.sort_values("change", ascending=False, kind="stable"))).view()
        words = "Mean score over all heads, before and after fine-tuning; bold: significant."
        shown.append(Shown("How much of each role the model has", view, words, terminal=True))
    if len(heads):
        view = _change_table(Table(strongest(heads, "change", _TOP, q="q")).words("component", "head")).cells("gained", "", _turn).view()
        surely = int((heads["q"] < Q_SIGNIFICANT).sum())
        words = f"{surely} of {len(heads)} heads and roles changed at q < {Q_SIGNIFICANT}; the largest changes come first."
        shown.append(Shown("Heads whose role changed", view, words, terminal=whole.empty))
    return shown


def _change_table(rows: Table) -> Table:
    rows = rows.mapped("role", "role").numbers("base", "base").numbers("tuned", "tuned")
    return rows.numbers("change", "change", ends=("low", "high"), sign=True, bold="q").numbers("q", "q", digits=2).numbers("n", "texts")


def _turn(row: Row) -> Cell:
    return Cell("gained" if row["gained"] else "lost" if row["lost"] else "")


def _texts(rows: pd.DataFrame) -> str:
    least, most = int(rows["n"].min()), int(rows["n"].max())
    return f"n = {written(least)}{f' to {written(most)}' if most > least else ''} texts per role"


def _findings(tables: Tables) -> list[Finding]:
    roles, changes, found = tables.get("head_roles"), tables.get("head_role_changes"), list[Finding]()
    models = [] if roles is None else by_model(roles)
    for whose, own in models:
        found.append(_role_finding(tables, whose, own, card=whose == models[-1][0]))
    return found if changes is None else [*found, _change_finding(tables, changes)]


def _role_finding(tables: Tables, whose: str, roles: pd.DataFrame, *, card: bool) -> Finding:
    """Say how many heads of a model have a role, and which roles most often."""
    here = (("model", "==", roles["model"].iloc[0]),)
    having, every = (
        Derived("head_roles", (*here, ("has_role", "==", True)), "component", "distinct"),
        Derived("head_roles", here, "component", "distinct"),
    )
    often = roles.loc[roles["has_role"], "role"].value_counts(sort=True).head(4)
    counts = [Derived("head_roles", (*here, ("has_role", "==", True), ("role", "==", role))) for role in often.index]
    named = [f"{role_in_words(role)} ({count.written(tables)})" for role, count in zip(often.index, counts, strict=True)]
    most = f": most often {', '.join(named)}" if len(named) > 1 else f": {named[0]}" if named else ""
    share = f"{having.written(tables)} of {every.written(tables)}"
    return Finding(
        f"In {whose} {share} heads have at least one role ({percent(Q_SIGNIFICANT)} of those named are expected to be false){most}",
        n=roles["n"].max(),
        derived=(having, every, *counts),
        effect=having.of(tables) / max(every.of(tables), 1),
        card=Card(share, f"heads of {whose} with a role") if card else None,
        table="head_roles",
    )


def _change_finding(tables: Tables, changes: pd.DataFrame) -> Finding:
    """Say which roles' mean over heads changed, and how many heads' scores."""
    heads, name, single = changes[changes["component"] != "all"], "head_role_changes", ""
    whole = changes[(changes["component"] == "all") & (changes["q"] < Q_SIGNIFICANT)]
    whole = whole.sort_values("change", key=abs, ascending=False, kind="stable").head(3)
    told = [
        f"{role_in_words(row['role'])} {'rose' if row['change'] > 0 else 'fell'} ({written(row['change'], sign=True)} "
        f"{interval(row['low'], row['high'], sign=True)})"
        for _, row in whole.iterrows()
    ]
    mean = f"Mean over heads, {', '.join(told)}" if told else "No role's mean over heads changed significantly"
    of_heads = (("component", "!=", "all"),)
    surely, every = Derived(name, (*of_heads, ("q", "<", Q_SIGNIFICANT))), Derived(name, of_heads)
    gained, lost = (Derived(name, (*of_heads, (column, "==", True))) for column in ("gained", "lost"))
    if len(heads):
        single = f"; {surely.written(tables)} of {every.written(tables)} single heads' scores changed at q < {Q_SIGNIFICANT}"
        single += f"; roles gained: {gained.written(tables)}, lost: {lost.written(tables)}"
    note = f"roles gained: {gained.written(tables)}, lost: {lost.written(tables)}"
    return Finding(
        f"{mean}{single}",
        n=changes["n"].max(),
        rows=tuple(row for _, row in whole.iterrows()),
        derived=(surely, every, gained, lost),
        effect=surely.of(tables) / max(every.of(tables), 1),
        folded=not told and not surely.of(tables),
        card=Card(surely.written(tables), f"scores of {every.written(tables)} changed (q < {Q_SIGNIFICANT})", note) if len(heads) else None,
        table=name,
    )


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "A role is what a head does on the texts made to elicit it. A head can have several roles, and do something else on other texts."
        )
    ]


SECTION = Section(
    id="roles",
    heading="Roles of heads",
    intro=(
        "What each head does on texts made to elicit it. A score stands beside its null, what a head without the role would score on the same texts. A "
        "head has a role where the excess of its score is worth the name and more than this model's heads reach when their queries and values are turned "
        f"at random, so that of the heads named {percent(Q_SIGNIFICANT)} are expected to be false; in a model of random weights any head is named for a role "
        f"with a probability of {percent(Q_SIGNIFICANT)} at most. Roles without a least excess are only scored."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="parts",
)
