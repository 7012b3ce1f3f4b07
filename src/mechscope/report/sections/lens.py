"""Lenses: what the residual stream predicts layer by layer, and what fine-tuning moved to earlier or later layers.

Base and tuned are told apart by colour, the logit lens and the tuned lens by solid and dashed lines. Bands are 95 % intervals over texts.
"""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT, head_heatmap
from mechscope.report.marks.lens_grid import lens_grids
from mechscope.report.marks.place_curves import place_curves
from mechscope.report.marks.tables import Shown, Table, strongest
from mechscope.report.section import Column, Panel, Section, Tables, number, table
from mechscope.report.shared import by_model, each_model, few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, label, name_of, percent
from mechscope.report.theme import number as written

MEASURES = {
    "log_probability": ("Log-probability of the next token", "log-probability (nats)", "Of the token that the text really has next."),
    "kl": ("Distance from the final prediction", "KL(final || lens), nats", "Zero: the layer already predicts what the model will."),
    "entropy": ("Entropy by layer", "entropy (nats)", "How undecided the lens is."),
    "agreement": ("Agreement with the final prediction", "share of positions", "How often the lens's likeliest token is the model's."),
    "reciprocal_rank": ("Rank of the next token", "mean of 1 / rank", "1: the next token is always the likeliest."),
}
SITES = {
    "residual": "residual stream",
    "attention_output": "attention output",
    "mixer_output": "mixer output",
    "mlp_output": "MLP output",
    "head_output": "head output",
}
_TOP = 40
# a lens names the prediction where it agrees with the model's own likeliest token in so many positions
_HALF = 0.5

_TEXT, _LENS = "id of the text", "logit, or tuned (through a trained map to the last layer)"
_MODEL = "base, tuned or model"
_PLACE = {
    "site": "what is read: residual, attention_output, mixer_output (of layers that do not attend), mlp_output, head_output",
    "layer": "its layer, −1 for the embedding",
    "head": "its head, −1 where there is none",
    "component": "its name: embed, resid3 (after block 3), a3, a3.h5, mixer3, m3",
}
_ROWS = "positions that count: all, or those that predict the target (the summary or the answer)"


def _compared(meaning: str) -> dict[str, Column]:
    return {
        "base": number(f"{meaning}, base model", "nats"),
        "tuned": number("the same of the tuned model", "nats"),
        "change": number("tuned − base, paired by text; q over all places", "nats", "se", "low", "high", "p", "q"),
    }


_CHANGES = {
    "log_probability": "mean log-probability of the next token",
    "entropy": "mean entropy of the lens's prediction",
    "kl": "mean KL(final ‖ lens)",
}

TABLES = {
    "lens_tokens": table(
        "One row per text of the grid and position.",
        text=_TEXT,
        position="position, from 0",
        token="token there",
        target="token that comes next; empty at the end",
        segment="part of the text: document, summary, or text (neither)",
    ),
    "lens_grid": table(
        "One row per model, lens, text, place and position.",
        {"top_": Column("the likeliest tokens: top_1, top_2, …"), "p_": Column("their probabilities: p_1, p_2, …", "share")},
        model=_MODEL,
        lens=_LENS,
        text=_TEXT,
        **_PLACE,
        position="position, from 0",
        token="token there",
        target="token that comes next; none at an end without answers",
        rank="rank of that token among all, 1 for the likeliest",
        probability=number("its probability", "share"),
        entropy=number("entropy of the lens's prediction", "nats"),
        kl=number("KL(final ‖ lens)", "nats"),
    ),
    "lens_summary": table(
        "One row per model, lens and place: means over a text's positions first, over texts then.",
        model=_MODEL,
        lens=_LENS,
        **_PLACE,
        rows=_ROWS,
        n="texts",
        log_probability=number("log-probability of the next token", "nats", "se", "low", "high"),
        reciprocal_rank=number("1 / rank of the next token", "", "se", "low", "high"),
        agreement=number("positions whose likeliest token is the model's own", "share", "se", "low", "high"),
        entropy=number("entropy of the lens's prediction", "nats", "se", "low", "high"),
        kl=number("KL(final ‖ lens)", "nats", "se", "low", "high"),
    ),
    "lens_change": table(
        "One row per lens and place; of a base and a tuned model.",
        lens=_LENS,
        **_PLACE,
        rows=_ROWS,
        n="texts",
        **{f"{name}_{end}": column for name, meaning in _CHANGES.items() for end, column in _compared(meaning).items()},
    ),
    "lens_training": table(
        "One row per model, training step of the tuned lens, and place.",
        model=_MODEL,
        step="training step",
        component=_PLACE["component"],
        kl=number("KL(final ‖ lens) on the step's tokens, before the step", "nats"),
        converged="whether the map's training converged, by one rule for all that is trained (methods.md); the same in all rows of a place",
        late_share=number("change of the loss in the last quarter of the training, of its whole change; below 0: it rose", "share"),
        unconverged="why the training does not count as converged; empty where it does",
    ),
}


def _panels(tables: Tables) -> list[Panel]:
    held = lens_grids(tables)
    if held is None:
        return []
    return [Panel("lens_grid", {"name": "lens-grid", "dropped": held["dropped"]}, held, scripts=("reading.js",))]


def _figures(tables: Tables) -> list[Figure]:
    """Draw curves of the residual stream, of what attention and MLPs write, a map per model of what heads write, and a map of its change."""
    summary, drawn = tables.get("lens_summary"), list[Figure]()
    if summary is not None:
        residual = summary[summary["site"] == "residual"]
        series, dash = ("model", "lens") if residual["model"].nunique() > 1 else ("lens", None)
        for measure, (title, axis, caption) in MEASURES.items():
            if residual[measure].notna().any():
                name = f"lens-{measure.replace('_', '-')}"
                drawn.append(_curves(residual, measure, name=name, title=title, axis=axis, caption=caption, series=series, dash=dash))
        blocks = _first_lens(summary[summary["site"].isin(["attention_output", "mixer_output", "mlp_output"])])
        if blocks["log_probability"].notna().any():
            title = "What attention and MLPs write, read by the lens"
            caption = "Each block's own output, read alone: what it says about the next token."
            axis = "log-probability (nats)"
            drawn.append(
                _curves(
                    blocks, "log_probability", name="lens-written", title=title, axis=axis, caption=caption, series="site", dash="model"
                )
            )
        drawn += _heads(summary)
    return drawn + _changed_heads(tables.get("lens_change"))


def _curves(rows: pd.DataFrame, measure: str, *, name: str, title: str, axis: str, caption: str, series: str, dash: str | None) -> Figure:
    rows = rows.sort_values("layer", kind="stable")
    points = pd.DataFrame(
        {
            "place": [_place(layer) for layer in rows["layer"]],
            "series": [_named(series, value) for value in rows[series]],
            "dash": [_named(dash, value) for value in rows[dash]] if dash else "",
            "value": rows[measure].astype(float),
            "low": rows[f"{measure}_low"].astype(float),
            "high": rows[f"{measure}_high"].astype(float),
            "n": rows["n"],
        }
    )
    words = {"series": series, "dash": dash or ""}
    return place_curves(points, name=name, title=title, axis=axis, caption=caption, words=words, share=measure == "agreement")


def _place(layer: object) -> str:
    return "embed" if int(str(layer)) < 0 else str(layer)


def _named(column: str | None, value: object) -> str:
    if column == "site":
        return SITES.get(str(value), name_of(value))
    return f"{name_of(value)} lens" if column == "lens" else name_of(value)


def _heads(summary: pd.DataFrame) -> list[Figure]:
    heads = _first_lens(summary[summary["site"] == "head_output"])
    if heads["agreement"].isna().all():
        return []
    tooltip = {"agreement": "agreement, share", "log_probability": "log-probability, nats", "entropy": "entropy, nats", "n": "texts"}
    return [
        head_heatmap(
            own, "agreement", name=f"lens-heads{end or '-1'}", title=f"Heads that say what the model will{whose}",
            legend="share of positions, √ scale", tooltip=tooltip,
            caption="How often the likeliest token of the head's own output is the model's final one.",
        )
        for end, whose, own in each_model(heads, ": ")
    ]  # fmt: skip


def _changed_heads(change: pd.DataFrame | None) -> list[Figure]:
    heads = None if change is None else _first_lens(change[change["site"] == "head_output"])
    if heads is None or heads.empty:
        return []
    columns = {
        "base": "base, nats",
        "tuned": "tuned, nats",
        "change": "change, nats",
        "change_low": "95\u202f% from",
        "change_high": "to",
        "change_q": "q",
    }
    return [
        head_heatmap(
            heads, "log_probability_change", name="lens-heads-change", title="What heads' outputs say about the next token: change",
            legend="log-probability, tuned − base, nats", caption="Each head's own output, read alone.", scale="change",
            tooltip={f"log_probability_{end}": words for end, words in columns.items()}, significance="log_probability_change_q",
        )
    ]  # fmt: skip


def _first_lens(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one lens, the first: a map has one number per head."""
    return rows[rows["lens"] == rows["lens"].iloc[0]] if len(rows) else rows


def _views(tables: Tables) -> list[Shown]:
    """Show what each layer predicts, and what changed, the surest first."""
    shown = []
    if "lens_summary" in tables:
        summary = tables["lens_summary"]
        rows = Table(summary[summary["site"] == "residual"]).mapped("model", "model").mapped("lens", "lens").words("component", "place")
        rows = rows.numbers("log_probability", "log-probability of the next token", ends=("log_probability_low", "log_probability_high"))
        rows = rows.numbers("agreement", "agrees with the model", ends=("agreement_low", "agreement_high"))
        rows = rows.numbers("kl", "KL to the model, nats", ends=("kl_low", "kl_high")).numbers("n", "texts")
        first = "lens_change" not in tables
        shown.append(Shown("Layers in numbers", rows.view(), "Means over texts.", folded=True, terminal=first))
    if "lens_change" in tables:
        shown.append(_changed(tables["lens_change"]))
    return shown


def _changed(change: pd.DataFrame) -> Shown:
    top = strongest(change, "log_probability_change", _TOP, q="log_probability_change_q")
    rows = Table(top).words("component", "at", strong=lambda row: row["log_probability_change_q"] < Q_SIGNIFICANT)
    if change["lens"].nunique() > 1:
        rows = rows.mapped("lens", "lens")
    rows = rows.mapped("site", "what is read", lambda value: SITES.get(str(value), name_of(value)))
    rows = rows.numbers("log_probability_base", "log-probability, base").numbers("log_probability_tuned", "tuned")
    rows = rows.numbers("log_probability_change", "change", ends=("log_probability_change_low", "log_probability_change_high"), sign=True)
    rows = rows.numbers("log_probability_change_q", "q", digits=2)
    rows = rows.numbers("entropy_change", "entropy change", ends=("entropy_change_low", "entropy_change_high"), sign=True)
    rows = rows.numbers("kl_change", "KL change", ends=("kl_change_low", "kl_change_high"), sign=True).numbers("n", "texts")
    words = f"The {len(top)} of {len(change)} places whose log-probability of the next token changed most; bold: q < {Q_SIGNIFICANT}."
    return Shown("Where the lens's prediction changed", rows.view(), words, terminal=True)


def _first_halves(tables: Tables) -> list[tuple[str, pd.Series, int]]:
    """Return of every model the first place whose logit lens agrees with the final prediction in half of the positions, and its last layer."""
    summary = tables.get("lens_summary")
    if summary is None:
        return []
    lenses = list(dict.fromkeys(summary["lens"]))
    rows = summary[(summary["site"] == "residual") & (summary["lens"] == ("logit" if "logit" in lenses else lenses[0]))]
    first = []
    for whose, own in by_model(rows):
        own = own.sort_values("layer", kind="stable")
        reached = own[own["agreement"] >= _HALF]
        if len(reached):
            first.append((whose, reached.iloc[0], int(own["layer"].max())))
    return first


def _findings(tables: Tables) -> list[Finding]:
    found = [
        Finding(
            f"In {whose} the {row['lens']} lens first names the final prediction in at least half of the positions at {label(row['component'])} "
            f"({percent(row['agreement'])} [{percent(row['agreement_low'])}, {percent(row['agreement_high'])}] there; the last layer is {last})",
            n=row["n"],
            rows=(row,),
            derived=(Derived("lens_summary", (("site", "==", "residual"), ("model", "==", row["model"])), "layer", "max"),),
            effect=float(row["agreement"]),
            card=Card(
                label(row["component"]), f"already names the prediction of {whose}", f"in half of the positions, by the {row['lens']} lens"
            ),
            table="lens_summary",
        )
        for whose, row, last in _first_halves(tables)
    ]
    change = tables.get("lens_change")
    rows = None if change is None else _first_lens(change[(change["site"] == "residual") & change["log_probability_change"].notna()])
    return found if rows is None or rows.empty else [*found, _change_finding(tables, rows)]


def _change_finding(tables: Tables, rows: pd.DataFrame) -> Finding:
    """Say where the lens's log-probability of the next token changed most with fine-tuning, where it did surely."""
    here = (("site", "==", "residual"), ("lens", "==", rows["lens"].iloc[0]), ("log_probability_change", ">", float("-inf")))
    every, surely = Derived("lens_change", here), Derived("lens_change", (*here, ("log_probability_change_q", "<", Q_SIGNIFICANT)))
    n, changed = rows["n"].max(), rows[rows["log_probability_change_q"] < Q_SIGNIFICANT]
    if changed.empty:
        text = (
            f"At none of {every.written(tables)} places of the residual stream did the lens's log-probability of the next token change significantly "
            f"(q < {Q_SIGNIFICANT})"
        )
        return Finding(text, n=n, derived=(every,), folded=True, table="lens_change")
    top = strongest(changed, "log_probability_change", 1).iloc[0]
    verb = "rose" if top["log_probability_change"] > 0 else "fell"
    ends = interval(top["log_probability_change_low"], top["log_probability_change_high"], sign=True)
    return Finding(
        f"With fine-tuning the lens's log-probability of the next token {verb} most at {label(top['component'])} ({SITES['residual']}): "
        f"{written(top['log_probability_change'], sign=True)} nats {ends}; it changed significantly at {surely.written(tables)} of {every.written(tables)} "
        "places, embedding included",
        n=n,
        rows=(top,),
        derived=(every, surely),
        effect=abs(float(top["log_probability_change"])),
        table="lens_change",
    )


def _caveats(tables: Tables) -> list[Caveat]:
    caveats = few_texts(tables, "lens_summary", "lens_change")
    if any(name in tables for name in ("lens_summary", "lens_grid")):
        caveats.append(
            Caveat(
                "A lens shows what a direction of the residual stream means to the last layer. Early layers may hold the same in other directions: the logit "
                "lens then reads nothing where something is. The tuned lens corrects this, but what it says was learned and may not be what the model uses."
            )
        )
    return caveats


SECTION = Section(
    id="lens",
    heading="What each layer predicts",
    intro=(
        "What the model would predict if it stopped at a layer: the residual stream read by the final norm and the unembedding (logit lens), or first "
        "carried to the last layer by a trained affine map (tuned lens)."
    ),
    tables=TABLES,
    panels=_panels,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="parts",
)
