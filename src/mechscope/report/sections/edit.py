"""Edits of facts: whether they took, what else they changed, and what becomes of them one after another; beside controls."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.intervals import interval_plot, response_curves
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import few_edits
from mechscope.report.statements import Card, Caveat, Finding
from mechscope.report.theme import interval, percent
from mechscope.report.theme import number as written

_EDIT, _IDENTITY = "the edit", "C = identity"
_ARM = {
    "arm": Column(
        "the edit; or a control: C = identity (all directions of keys count alike), random layer, other subject (written at another's key)"
    ),
    "method": Column("rome, memit, alphaedit or finetune"),
    "layers": Column("the layers that were edited"),
}
_SHARES = ("efficacy", "paraphrase", "neighbourhood")
TABLES = {
    "edits": table(
        "One row per edit, made alone in the unedited model, and arm.",
        **_ARM,
        id="the edit",
        subject="whom it is about",
        new="what shall follow the prompt",
        true="what followed before, where known",
        efficacy=number("whether the new target is likelier than the true one (1 or 0)"),
        top=number("whether every token of the new target is the likeliest (1 or 0)"),
        paraphrase=number("the share of other prompts for the fact behind which the new target is likelier", "share"),
        neighbourhood=number("the share of prompts about others behind which the true target is likelier", "share"),
        difference=number("probability of the new target less that of the true one (geometric mean over tokens)", "share"),
        neighbour_difference=number("of neighbours, probability of the true target less that of the new one", "share"),
        **{f"{name}_before": number(f"{name} before the edit") for name in ("efficacy", "top", "paraphrase", "neighbourhood")},
        difference_before=number("difference before the edit", "share"),
        neighbour_difference_before=number("neighbour_difference before the edit", "share"),
        kl=number("KL divergence of what follows neighbours' prompts, before to after the edit", "nats"),
        loss=number("change of the loss of ordinary text", "nats per token"),
        size=number("length of the change, as a share of the weight's: the largest of the layers", "share"),
        search=number("what was left of the loss that was searched", "nats"),
        edited="whether the edit took: the new target is likelier than the true one, or where that is not known the likeliest",
    ),
    "edit_measures": table(
        "One row per arm and measure: the mean over edits.",
        **_ARM,
        measure="efficacy, top, paraphrase, neighbourhood (shares), score (harmonic mean of efficacy, paraphrase and neighbourhood), difference, "
        "neighbour_difference (probabilities), kl (nats), loss (nats per token), size (share)",
        n="edits",
        before=number("before the edits, where it can be"),
        value=number("after them", "", "low", "high", bare=True),
        withheld="why there is no number, or no interval",
    ),
    "edit_sequence": table(
        "One row per number of edits made one upon the other.",
        method=_ARM["method"],
        layers=_ARM["layers"],
        edits=number("edits so far"),
        first=number("whether the first edit still holds (1 or 0)"),
        efficacy=number("share of the edits so far that hold", "share", "low", "high"),
        paraphrase=number("share of their other prompts", "share", "low", "high"),
        neighbourhood=number("share of their neighbours that are as before", "share", "low", "high"),
        loss=number("change of the loss of ordinary text", "nats per token"),
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    figures = []
    if (rows := tables.get("edit_measures")) is not None:
        shares = rows[rows["measure"].isin([*_SHARES, "score"]) & rows["value"].notna()]
        points = shares.assign(row=[f"{measure}, {arm}" for measure, arm in zip(shares["measure"], shares["arm"], strict=True)])
        points = points.sort_values(
            "measure", key=lambda names: names.map({name: at for at, name in enumerate((*_SHARES, "score"))}), kind="stable"
        )
        if len(points):
            figures.append(
                interval_plot(
                    points[["row", "value", "low", "high", "n"]],
                    name="edit-measures",
                    title="What edits did, beside controls",
                    caption="Shares, the mean over edits with its 95\u202f% interval; each edit is made alone.",
                    axis="share",
                )
            )
    if (rows := tables.get("edit_sequence")) is not None and len(rows) > 1:
        parts = [
            rows.assign(
                series=name, line=name, value=rows[name], low=rows[f"{name}_low"], high=rows[f"{name}_high"], n=rows["edits"], control=False
            )
            for name in _SHARES
            if rows[name].notna().any()
        ]
        if parts:
            figures.append(
                response_curves(
                    pd.concat(parts, ignore_index=True)[["series", "line", "edits", "value", "low", "high", "n", "control"]],
                    name="edit-sequence",
                    title="Edits one upon the other",
                    caption="Of all edits so far; the band is the 95\u202f% interval over them.",
                    x=("edits", "edits made"),
                    axis="share",
                )
            )
    return figures


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if (rows := tables.get("edit_measures")) is not None:
        view = Table(rows).words("arm", "arm").words("layers", "layers").words("measure", "measure").numbers("before", "before")
        view = view.numbers("value", "after", ends=("low", "high")).numbers("n", "edits")
        shown.append(Shown("What edits did", view.view(), table="edit_measures", terminal=True))
    if (rows := tables.get("edit_sequence")) is not None:
        view = Table(rows).numbers("edits", "edits made").numbers("first", "first holds")
        for name in _SHARES:
            view = view.numbers(name, name, ends=(f"{name}_low", f"{name}_high"))
        shown.append(
            Shown("One upon the other", view.numbers("loss", "loss, nats", sign=True).view(), table="edit_sequence", terminal=True)
        )
    if (rows := tables.get("edits")) is not None:
        view = (
            Table(rows)
            .words("arm", "arm")
            .words("subject", "subject")
            .words("true", "before")
            .words("new", "asked for")
            .words("edited", "took")
        )
        view = view.numbers("paraphrase", "paraphrase").numbers("neighbourhood", "neighbours kept").numbers("kl", "KL, nats")
        view = view.numbers("loss", "loss, nats", sign=True).numbers("size", "size")
        shown.append(Shown("Edit by edit", view.view(), table="edits", folded=True))
    return shown


def _findings(tables: Tables) -> list[Finding]:
    return [*_took(tables), *_last(tables)]


def _row(rows: pd.DataFrame, arm: str, measure: str) -> pd.Series | None:
    found = rows[(rows["arm"] == arm) & (rows["measure"] == measure) & rows["value"].notna()]
    return found.iloc[0] if len(found) else None


def _said(row: pd.Series) -> str:
    return f"{percent(row['value'])} {interval(100 * row['low'], 100 * row['high'])}".strip()


def _took(tables: Tables) -> list[Finding]:
    """Say whether edits took, and what it cost, beside controls; or that the model is not edited."""
    rows = tables.get("edit_measures")
    own = None if rows is None else _row(rows, _EDIT, "efficacy")
    measure = "efficacy"
    if rows is not None and own is None:
        own, measure = _row(rows, _EDIT, "top"), "top"
    if rows is None or own is None:
        return []
    where = f"{own['method']} in layer {own['layers']}"
    asked = "makes the new target likelier than the true one" if measure == "efficacy" else "makes the new target the likeliest"
    quoted, parts = [own], []
    for name, said in (
        ("paraphrase", "behind other prompts for the fact {}"),
        ("neighbourhood", "{} of the prompts about others are as before"),
    ):
        if (row := _row(rows, _EDIT, name)) is not None:
            parts.append(said.format(_said(row)))
            quoted.append(row)
    if (row := _row(rows, _EDIT, "loss")) is not None:
        parts.append(f"the loss of ordinary text changes by {written(row['value'], sign=True)} nats per token")
        quoted.append(row)
    beside, on = [], 0
    for arm in dict.fromkeys(rows["arm"]):
        if arm == _EDIT or (row := _row(rows, arm, measure)) is None:
            continue
        kept = _row(rows, arm, "neighbourhood")
        beside.append(
            f"{arm} {percent(row['value'])}" + (f" with {percent(kept['value'])} of neighbours as before" if kept is not None else "")
        )
        quoted += [row] if kept is None else [row, kept]
        on = int(row["n"])
    control = f"; controls on {on} of the edits: {', '.join(beside)}" if beside else "; without a control"
    rest = f"; {', '.join(parts)}" if parts else ""
    if own["value"] < 0.5:
        head = f"The model is mostly not edited: {where} {asked} in {_said(own)} of the edits"
    else:
        head = f"{where} {asked} in {_said(own)} of the edits (before them {percent(own['before'])})"
    card = Card(percent(own["value"]), "of the edits took", where)
    return [
        Finding(
            head + rest + control,
            n=own["n"],
            unit="edits",
            rows=tuple(quoted),
            effect=float(own["value"]),
            card=card,
            table="edit_measures",
        )
    ]


def _last(tables: Tables) -> list[Finding]:
    """Say what became of the first edit, and of all, after the last of a sequence."""
    rows = tables.get("edit_sequence")
    if rows is None or rows["efficacy"].isna().all():
        return []
    last = rows.iloc[-1]
    held = "still holds" if last["first"] == 1 else "no longer holds"
    kept = f" and {percent(last['neighbourhood'])} of their neighbours are as before" if pd.notna(last["neighbourhood"]) else ""
    text = (
        f"After {int(last['edits'])} edits one upon the other the first {held}; {percent(last['efficacy'])} of them hold{kept}, and the loss of ordinary text "
        f"has changed by {written(last['loss'], sign=True)} nats per token"
    )
    return [Finding(text, n=last["edits"], unit="edits", rows=(last,), effect=float(1 - last["efficacy"]), table="edit_sequence")]


def _caveats(tables: Tables) -> list[Caveat]:
    caveats = [
        Caveat("An edit changes what is said behind prompts like these. Whether what follows from the fact changes too is not measured."),
    ]
    rows = tables.get("edit_measures")
    if rows is not None:
        found = _row(rows, _EDIT, "efficacy")
        if found is not None and found["before"] > 0.5:
            caveats.append(
                Caveat("Most new targets were the likelier ones before any edit, so that efficacy says little.", weakens="edit_measures")
            )
        caveats += few_edits(tables, "edit_measures")
    return caveats


SECTION = Section(
    id="edit",
    heading="Edited facts",
    intro=(
        "An edit changes the last map of an MLP, so that what the subject's last token looks up there becomes another answer (Meng et al. 2022; memit and "
        "alphaedit share that out among layers). Each edit is made alone in the unedited model and measured on its prompt, on other prompts for the same fact "
        "and on prompts about others. Controls: C = identity, where every direction of keys counts alike; a random layer; another subject's key."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    unit="edits",
)
