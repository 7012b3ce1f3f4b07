"""Attribution by position: what every part of the model adds to each prediction of a text."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import grid_heatmap
from mechscope.report.marks.tables import Shown, Table, strongest, token
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import estimated, few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label
from mechscope.report.theme import number as written

# parts, positions and texts that are drawn, and rows of a table
_PARTS, _POSITIONS, _TEXTS, _TOP = 24, 60, 3, 40

_PART = {
    "component": "the part, such as embed, a3.h5, a3 bias, m3",
    "kind": "embedding, position, head, attention bias, mixer (of a layer that does not attend), mlp, mlp bias, constant, cap (of the logits), residual "
    "(rounding)",
    "layer": "its layer, −1 where there is none",
    "head": "its head, −1 where there is none",
}
TABLES = {
    "attribute_positions": table(
        "One row per text, position that is read, and part.",
        text="id of the text",
        position="position of the token whose next token is predicted, from 0",
        token="what stands there",
        **_PART,
        effect=number("its direct contribution to that one prediction", "logits"),
    ),
    "attribute_positions_summary": table(
        "One row per part: means over a text's positions first, over texts then.",
        **_PART,
        n="texts",
        effect=number("its direct contribution", "logits", "low", "high"),
        largest=number("positions at which no part contributes more", "share", "low", "high"),
        metric="target-logit (the next token's logit over the vocabulary's mean) or logit-diff",
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    """Draw the parts that contribute most by the positions of the first texts."""
    effects = tables.get("attribute_positions")
    if effects is None:
        return []
    drawn = []
    for number_of, (text, own) in enumerate(effects.groupby("text", sort=False)):
        if number_of == _TEXTS:
            break
        sizes = own.assign(size=own["effect"].abs()).groupby("component", sort=False)["size"].mean()
        parts = sizes.nlargest(_PARTS).index
        kept = sorted(own["position"].unique())[-_POSITIONS:]
        cells = own[own["component"].isin(parts) & own["position"].isin(kept)]
        cells = cells.assign(
            at=[f"{at} {token(what)}" for at, what in zip(cells["position"], cells["token"], strict=True)],
            order=pd.Categorical(cells["component"], categories=list(parts), ordered=True),
        ).sort_values(["order", "position"], kind="stable")
        drawn.append(
            grid_heatmap(
                cells.drop(columns="order"),
                "effect",
                across=("at", "token whose next token is predicted"),
                down=("component", "part"),
                name=f"attribute-positions-{number_of + 1}",
                title=f"Contributions to each prediction of “{label(text)}”",
                legend="direct contribution, logits",
                caption=f"The {len(parts)} parts with the largest mean magnitude, largest first.",
                tooltip={"effect": "logits"},
            )
        )
    return drawn


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if (summary := tables.get("attribute_positions_summary")) is not None:
        view = Table(strongest(summary, "effect", _TOP)).words("component", "part")
        view = view.numbers("effect", "mean effect, logits", ends=("effect_low", "effect_high"), sign=True)
        view = view.numbers("largest", "share of positions where it is largest", ends=("largest_low", "largest_high")).numbers("n", "texts")
        shown.append(Shown("Parts by their mean contribution", view.view(), terminal=True))
    if (effects := tables.get("attribute_positions")) is not None:
        view = Table(strongest(effects, "effect", _TOP)).words("text", "text").numbers("position", "position").tokens("token", "token")
        view = view.words("component", "part").numbers("effect", "effect, logits", sign=True)
        shown.append(Shown("The largest single contributions", view.view(), folded=True))
    return shown


def _findings(tables: Tables) -> list[Finding]:
    summary = tables.get("attribute_positions_summary")
    if summary is None:
        return []
    top, most = strongest(summary, "effect", 1).iloc[0], summary.nlargest(1, "largest").iloc[0]
    whole = Derived("attribute_positions_summary", (), "effect", "sum")
    return [
        Finding(
            f"Over all positions {label(top['component'])} has the largest mean contribution to the metric ({label(top['metric'])}): "
            f"{estimated(top, 'effect', sign=True)} of {written(whole.of(tables), sign=True)} logits in all. "
            f"{label(most['component'])} is the largest part at {estimated(most, 'largest', share=True)} of the positions",
            n=top["n"],
            rows=(top, most),
            derived=(whole,),
            effect=abs(float(top["effect"])),
            card=Card(label(top["component"]), "adds most to predictions", f"{written(top['effect'], sign=True)} logits on average"),
            table="attribute_positions_summary",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "Direct attribution counts what a part writes straight to the logits, not what later parts make of it, and holds the final norm's scale fixed."
        ),
        Caveat("The part with the largest mean was chosen on these texts."),
        *few_texts(tables, "attribute_positions_summary"),
    ]


SECTION = Section(
    id="attribute-positions",
    heading="Attribution by position",
    intro=(
        "Each prediction of a text as an exact sum over what the embedding, every head and every MLP wrote at its token, the final norm held at its own scale "
        "(direct logit attribution; Elhage et al. 2021, “A Mathematical Framework for Transformer Circuits”). There is no control: the sum is the model's own "
        "logit, with rounding as a part of its own."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
