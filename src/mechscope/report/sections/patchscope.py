"""Patchscope: what a model goes on with when a text's hidden state stands in another prompt, layer by layer."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.curves import layer_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import estimated, few_texts
from mechscope.report.statements import Card, Caveat, Finding
from mechscope.report.theme import percent

_STATES = {"text": "the text's state", "random": "a random vector of equal length"}
_MEASURES = {
    "predicts": (
        "The source model's own next token comes next",
        "Share of texts after whose patched state the likeliest token is the source model's own.",
    ),
    "repeats": (
        "The inspected token is repeated",
        "Share of texts after whose patched state the inspected token is among those generated.",
    ),
}
_TOP = 60
# as the lens: a layer names the prediction where it does in so many texts
_HALF = 0.5

_STATE = "what was patched in: text (the text's hidden state), or random (a random vector of the same length, the control)"
TABLES = {
    "patchscope": table(
        "One row per text, state and source layer.",
        text="id of the text",
        position="the token whose state was taken, from 0",
        token="what stands there",
        predicted="the source model's own likeliest next token there",
        state=_STATE,
        source_layer="the block behind which the state was taken",
        target_layer="the block behind which it was put into the prompt",
        top_ids="the likeliest next tokens of the prompt: ids, likeliest first",
        top_tokens="the same as text",
        probabilities=number("their probabilities", "share"),
        generated_ids="what was generated from the prompt, greedily: ids",
        generated="the same as text",
        predicts="whether the likeliest token is `predicted`",
        repeats="whether `token` is among what was generated, spaces aside",
    ),
    "patchscope_summary": table(
        "One row per state and layer: shares of texts.",
        state=_STATE,
        layer="the block behind which the state was taken",
        target_layer="the block behind which it was put into the prompt",
        n="texts",
        predicts=number("texts whose likeliest token is the source model's own next token; Wilson's interval", "share", "low", "high"),
        predicts_other=number(
            "the same with another text's: how often a text's state is followed by the prediction of another, over all pairs", "share"
        ),
        repeats=number("texts whose inspected token is repeated in what is generated; Wilson's interval", "share", "low", "high"),
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    summary = tables.get("patchscope_summary")
    if summary is None:
        return []
    drawn = []
    for measure, (title, caption) in _MEASURES.items():
        layers = summary[["layer", "n"]].drop_duplicates("layer").sort_values("layer", kind="stable")
        series = {}
        for state, words in _STATES.items():
            own = summary[summary["state"] == state].drop_duplicates("layer").set_index("layer")
            if len(own):
                series[state] = words
                for end in ("", "_low", "_high"):
                    layers[f"{state}{end}"] = layers["layer"].map(own[f"{measure}{end}"])
            if state == "text" and measure == "predicts" and own["predicts_other"].notna().any():
                series["other"] = "another text's next token"
                layers["other"] = layers["layer"].map(own["predicts_other"])
        drawn.append(
            layer_curves(
                layers,
                series,
                name=f"patchscope-{measure}",
                title=title,
                axis="share of texts",
                caption=f"{caption} Band: Wilson's 95\u202f% interval.",
                share=True,
                counted_in="texts",
            )
        )
    return drawn


def _views(tables: Tables) -> list[Shown]:
    scoped = tables.get("patchscope")
    if scoped is None:
        return []
    own = scoped[scoped["state"] == "text"].head(_TOP)
    view = Table(own).words("text", "text").tokens("token", "inspected token").tokens("predicted", "its model's next token")
    view = (
        view.numbers("source_layer", "from layer").numbers("target_layer", "into layer").token_lists("top_tokens", "likeliest next", most=4)
    )
    return [Shown("What comes after the patched state", view.texts("generated", "generated").view(), terminal=True)]


def _first(tables: Tables) -> tuple[pd.Series, pd.Series | None] | None:
    """Return the first layer whose states are followed by the source model's own next token in half of the texts, else the last, and its control."""
    summary = tables.get("patchscope_summary")
    if summary is None:
        return None
    own, control = (summary[summary["state"] == state].sort_values("layer", kind="stable") for state in ("text", "random"))
    reached = own[own["predicts"] >= _HALF]
    row = reached.iloc[0] if len(reached) else own.iloc[-1]
    beside = control[(control["layer"] == row["layer"]) & (control["target_layer"] == row["target_layer"])]
    return row, beside.iloc[0] if len(beside) else None


def _findings(tables: Tables) -> list[Finding]:
    first = _first(tables)
    if first is None:
        return []
    summary = tables["patchscope_summary"]
    row, control = first
    chosen = (
        "is the first that the source model's own next token follows in half of the texts"
        if row["predicts"] >= _HALF
        else ("and those before it are followed by the source model's own next token in less than half of the texts")
    )
    controls = [] if control is None else [f"after a random vector of equal length in {estimated(control, 'predicts', share=True)}"]
    if pd.notna(row["predicts_other"]):
        controls.append(f"another text's next token follows it in {percent(row['predicts_other'])}")
    beside = "".join(f"; {words}" for words in controls)
    most = summary[summary["state"] == "text"].nlargest(1, "repeats").iloc[0]
    repeated = (
        f"The inspected token itself is repeated most from block {int(most['layer'])}, in {estimated(most, 'repeats', share=True)}"
        if most["repeats"] > 0
        else "The inspected token itself is repeated from none"
    )
    return [
        Finding(
            f"Put into the prompt, the state behind block {int(row['layer'])} {chosen}: there it follows in {estimated(row, 'predicts', share=True)}{beside}. "
            f"{repeated}",
            n=row["n"],
            rows=(row, most, *([] if control is None else [control])),
            effect=float(row["predicts"]),
            card=Card(percent(row["predicts"]), "of texts whose next token a patched prompt names", f"from block {int(row['layer'])}"),
            table="patchscope_summary",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "What the model says depends on the prompt and on the layer that is patched: that it does not name something is no proof that the state lacks it."
        ),
        Caveat(
            "Behind the last block and at the prompt's last token nothing is computed after the patch: that is the logit lens, which always gives the model's "
            "own "
            "prediction."
        ),
        *few_texts(tables, "patchscope_summary"),
    ]


SECTION = Section(
    id="patchscope",
    heading="Patchscope",
    intro=(
        "The hidden state of a token, behind one block at a time, takes the place of a token's state in an inspection prompt, and the model goes on from there "
        "(Ghandeharioun et al. 2024, “Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language Models”). With the paper's "
        "identity prompt it is judged by whether it goes on with what the source model itself predicts at that token. There are two controls: a "
        "random vector of the same length in the state's place, which is what the prompt brings about alone, and how often a text's state is followed by "
        "another text's token, which is what texts have in common."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
