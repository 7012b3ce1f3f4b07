"""Neurons: when each fires, which tokens it promotes, and what fine-tuning changed in that."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.tables import Cell, Shown, Table, token
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import by_model, each_model, few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, label, percent
from mechscope.report.theme import number as written

TOP_ROWS = 60
"""Neurons shown per model, and four times as many contexts."""

_MODEL = "base, tuned or model"
_NEURON = {"layer": "its layer", "neuron": "its number in the layer", "component": "the neuron, such as m3.n1024"}


def _changed_columns(name: str, meaning: str, unit: str) -> dict[str, Column]:
    return {
        f"{name}_base": number(f"{meaning}, base model", unit),
        f"{name}_tuned": number("the same of the tuned model", unit),
        f"{name}_change": number("tuned − base, paired by text; q over all neurons", unit, "se", "low", "high", "p", "q"),
    }


TABLES = {
    "neurons": table(
        "One row per model and neuron.",
        model=_MODEL,
        **_NEURON,
        n="texts",
        n_tokens="tokens of all texts",
        mean=number("mean activation: means of texts, over texts", "", "se", "low", "high"),
        active=number("tokens where it is active: means of texts, over texts", "share", "se", "low", "high"),
        sd=number("standard deviation of its activation over tokens"),
        minimum=number("smallest activation"),
        maximum=number("largest activation"),
        active_tokens="tokens where it is active",
        dead="whether it is active nowhere",
        active_bound=number("upper 95\u202f% bound of a dead neuron's rate, as if tokens were independent; none for others", "share"),
        position_r2=number("part of its variance that the position explains (R²)", "share"),
        position_r2_chance=number("what that is by chance", "share"),
        positional="whether the position explains most of it once chance is taken off",
        contexts="how many of its strongest contexts are kept",
        token_purity=number("part of those contexts on their commonest token; none below two", "share"),
        token_id="id of that token, −1 for none",
        token_bound="whether all its contexts, as many as are kept of any neuron and at least two, are on one token",
        reads="tokens it reads most, of neurons that are written out; empty for others",
        promotes="tokens it promotes most",
        suppresses="tokens it suppresses most",
    ),
    "neuron_contexts": table(
        "One row per model, written-out neuron and context, the strongest first.",
        model=_MODEL,
        **_NEURON,
        place="1 for the strongest",
        activation=number("its activation there"),
        text="id of the text",
        position="position, from 0",
        token="token it fires on",
        context="that token, marked, and those before it",
        next="token that follows; none at the end of a text",
        promoted="tokens that this activation promotes most, a list",
        agrees="whether the token that follows is the first of them; none at the end",
        token_id="id of the token it fires on",
        next_id="id of the token that follows, −1 at the end",
    ),
    "neuron_changes": table(
        "One row per neuron; of a base and a tuned model.",
        **_NEURON,
        n="texts",
        **_changed_columns("mean", "mean activation", ""),
        **_changed_columns("active", "tokens where it is active", "share"),
        mean_change_sd=number(
            "change of the mean activation in units of its spread over tokens; none where it varies in neither model", "SD"
        ),
        rank="rank by the size of that, 1 for the most changed",
        dead_base="whether it is active nowhere in the base model",
        dead_tuned="the same of the tuned model",
        contexts_overlap=number("Jaccard index of the two models' strongest contexts; none where neither has any"),
    ),
}


def _views(tables: Tables) -> list[Shown]:
    """Show the neurons that changed most, those written out or with the largest activations, and the contexts that make neurons fire."""
    shown: list[Shown] = []
    if "neuron_changes" in tables:
        shown.append(_changed(tables["neuron_changes"]))
    for _, whose, own in each_model(tables["neurons"]) if "neurons" in tables else []:
        shown.append(_neurons(own, whose))
    for _, whose, own in each_model(tables["neuron_contexts"]) if "neuron_contexts" in tables else []:
        rows = Table(own.head(4 * TOP_ROWS)).words("component", "neuron").numbers("activation", "activation").tokens("token", "at")
        rows = rows.texts("context", "context").tokens("next", "next token")
        rows = rows.cells("promoted", "promotes there", lambda row: Cell(_listed(row["promoted"])))
        said = "The strongest activations, with the token after each and the tokens that the neuron promotes there."
        shown.append(Shown(f"Where neurons fire most{whose}", rows.view(), said, folded=True))
    return shown


def _neurons(own: pd.DataFrame, whose: str) -> Shown:
    # those with words come first: they are the ones the run chose to write out
    order = own.assign(out=own["promotes"].fillna("").astype(bool)).sort_values(["out", "maximum"], ascending=False, kind="stable")
    top = order.head(TOP_ROWS)
    rows = Table(top).words("component", "neuron").numbers("maximum", "largest activation")
    rows = rows.numbers("mean", "mean", ends=("mean_low", "mean_high"))
    rows = rows.cells("active", "active", lambda row: Cell(percent(row["active"], digits=1), sort=_sortable(row["active"])))
    rows = rows.numbers("position_r2", "by position (R²)").numbers("token_purity", "one token (purity)")
    rows = rows.texts("reads", "reads").texts("promotes", "promotes").texts("suppresses", "suppresses")
    said = (
        f"{len(top)} of {written(len(own))} neurons: those written out, then the largest activations. "
        f"{written(int(own['dead'].sum()))} never fired on these texts."
    )
    return Shown(f"Neurons{whose}", rows.view(), said)


def _changed(changes: pd.DataFrame) -> Shown:
    top = changes.sort_values("rank", kind="stable").head(TOP_ROWS)
    rows = Table(top).words("component", "neuron").numbers("mean_base", "mean activation, base").numbers("mean_tuned", "tuned")
    rows = rows.numbers("mean_change", "change", ends=("mean_change_low", "mean_change_high"), sign=True, bold="mean_change_q")
    rows = rows.numbers("mean_change_q", "q", digits=2).numbers("mean_change_sd", "in SD over tokens", sign=True)
    rows = rows.numbers("contexts_overlap", "contexts shared (Jaccard)")
    said = f"The {len(top)} of {written(len(changes))} neurons whose mean activation changed most, in units of its spread over tokens; bold: significant."
    return Shown("Neurons that fine-tuning changed", rows.view(), said)


def _listed(tokens: object) -> str:
    """Return a list of tokens (a list or an array in the table) as text."""
    return ", ".join(token(each) for each in tokens) if hasattr(tokens, "__iter__") and not isinstance(tokens, str) else token(tokens)


def _sortable(share: float) -> float | None:
    return None if pd.isna(share) else float(share)


def _findings(tables: Tables) -> list[Finding]:
    found, changes = list[Finding](), tables.get("neuron_changes")
    if changes is not None:
        top = changes.sort_values("rank", kind="stable").iloc[0]
        surely, every = Derived("neuron_changes", (("mean_change_q", "<", Q_SIGNIFICANT),)), Derived("neuron_changes")
        ends = interval(top["mean_change_low"], top["mean_change_high"], sign=True)
        found.append(
            Finding(
                f"Fine-tuning changed the mean activation of {surely.written(tables)} of {every.written(tables)} neurons (q < {Q_SIGNIFICANT}); "
                "relative to its "
                f"spread over tokens, most of {label(top['component'])} ({written(top['mean_change'], sign=True)} {ends}, "
                f"{written(top['mean_change_sd'], sign=True)} SD)",
                n=top["n"],
                rows=(top,),
                derived=(surely, every),
                effect=surely.of(tables) / max(every.of(tables), 1),
                folded=not surely.of(tables),
                table="neuron_changes",
            )
        )
    if "neurons" in tables:
        whose, own = by_model(tables["neurons"])[-1]
        here = (("model", "==", own["model"].iloc[0]),)
        dead, every = Derived("neurons", (*here, ("dead", "==", True))), Derived("neurons", here)
        share = percent(dead.of(tables) / max(every.of(tables), 1), digits=1)
        found.append(
            Finding(
                f"{dead.written(tables)} of {every.written(tables)} neurons of {whose} ({share}) never fire on these texts",
                n=own["n"].max(),
                derived=(dead, every, Derived("neurons", here, "dead", "mean")),
                effect=dead.of(tables) / max(every.of(tables), 1),
                card=Card(share, f"of the neurons of {whose} never fire", f"of {every.written(tables)} on these texts"),
                table="neurons",
            )
        )
    return found


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        *few_texts(tables, "neurons", "neuron_changes"),
        Caveat(
            "What a neuron reads and promotes is read off its weights through the vocabulary, which leaves out norms and the layers between: it says what the "
            "neuron could do, not what it does."
        ),
    ]


SECTION = Section(
    id="neurons",
    heading="Neurons",
    intro="The MLPs as memories: when each neuron fires and which tokens it promotes.",
    tables=TABLES,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="parts",
)
