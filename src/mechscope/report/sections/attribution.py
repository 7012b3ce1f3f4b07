"""Direct logit attribution: the metric as a sum over what every part of the model wrote, as waterfalls.

Base and tuned stand beside each other with the same parts in the same order on the same axis. A third figure walks from the base model's total to
the tuned model's, over what fine-tuning changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.tables import Shown, Table, strongest
from mechscope.report.marks.waterfall import total, walk, waterfall
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import by_model, each_model, few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, label, name_of
from mechscope.report.theme import number as written

PARTS = 18
"""Components that a waterfall shows by name; all others are one bar."""

_TOP = 40

_PART = {
    "component": "the part, such as embed, a3.h5, a3 bias, m3",
    "kind": "embedding, position, head, attention bias, mixer (of a layer that does not attend), mlp, mlp bias, constant, cap (of the logits), residual "
    "(rounding)",
    "layer": "its layer, −1 where there is none",
    "head": "its head, −1 where there is none",
}
_TEST = {
    "p": "p: that it is zero, two-sided; none for constant, cap and residual",
    "q": "q: p after Benjamini–Hochberg over the model's parts",
    "n": "texts",
}

TABLES = {
    "logit_attribution": table(
        "One row per model and part.",
        model="base, tuned or model",
        **_PART,
        effect=number("its direct contribution to the metric, mean over texts", "logits", "low", "high", bare=True),
        **_TEST,
    ),
    "logit_attribution_change": table(
        "One row per part; of a base and a tuned model.",
        **_PART,
        base=number("contribution in the base model, mean over texts", "logits"),
        tuned=number("contribution in the tuned model", "logits"),
        change=number("tuned − base, paired by text", "logits", "low", "high", bare=True),
        **_TEST,
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    """Draw a waterfall of the strongest components and one by layer for every model, and one of the change."""
    effects, change = tables.get("logit_attribution"), tables.get("logit_attribution_change")
    drawn: list[Figure] = []
    if effects is not None:
        names, by = _largest(effects), list(effects.groupby("model", sort=False))
        drawn += _of_models({model: _strongest(own, names) for model, own in by}, "components")
        drawn += _of_models({model: _layers(own) for model, own in by}, "layers")
    if change is not None:
        drawn.append(_changed(change))
    return drawn


def _of_models(steps: Mapping[object, pd.DataFrame], by: str) -> list[Figure]:
    placed = {model: walk(own) for model, own in steps.items()}
    ends = pd.concat([own[["start", "end", "low", "high"]] for own in placed.values()])
    low, high = float(np.nanmin(ends.to_numpy())), float(np.nanmax(ends.to_numpy()))
    room, drawn = 0.03 * (high - low or 1.0), []
    caption = {
        "components": "The strongest components of all models, then all others together. Rule: 95\u202f% over texts.",
        "layers": "Embedding, then each layer's attention (all heads and bias) and MLP, in the order of the residual stream.",
    }[by]
    for i, (model, own) in enumerate(placed.items()):
        whose = f": {name_of(model)}" if len(placed) > 1 else ""
        title = f"{'Strongest contributions' if by == 'components' else 'Contributions by layer'}{whose}"
        name = f"attribution-{by}" + (f"-{i + 1}" if len(placed) > 1 else "")
        drawn.append(waterfall(own, name=name, title=title, caption=caption, domain=(low - room, high + room)))
    return drawn


def _largest(effects: pd.DataFrame) -> list[str]:
    """Return the components with the largest mean effect in any model, largest first."""
    largest = effects.assign(size=effects["effect"].abs()).groupby("component", sort=False)["size"].max()
    return list(largest.sort_values(ascending=False, kind="stable").head(PARTS).index)


def _strongest(effects: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Return the named components in order, then the sum of all others."""
    own = effects.drop_duplicates("component").set_index("component")
    own = own.reindex([name for name in names if name in own.index]).reset_index()
    return _steps(own, effects[~effects["component"].isin(names)], "effect")


def _steps(own: pd.DataFrame, rest: pd.DataFrame, effect: str) -> pd.DataFrame:
    """Return components as steps of a walk, and after them the sum of the rest, whose interval cannot be told from its parts'."""
    steps = own[["low", "high", "q"]].assign(part=[label(name) for name in own["component"]], effect=own[effect])
    if rest.empty:
        return steps.reset_index(drop=True)
    return pd.concat([steps, pd.DataFrame({"part": [f"{len(rest)} others"], "effect": [rest[effect].sum()]})], ignore_index=True)


def _layers(effects: pd.DataFrame) -> pd.DataFrame:
    """Return sums in the order of the residual stream; a sum's interval cannot be told from its parts'."""
    outside, sums = effects[effects["layer"] < 0], []
    for kind in ("embedding", "position"):
        if (outside["kind"] == kind).any():
            sums.append((kind, outside.loc[outside["kind"] == kind, "effect"].sum()))
    for layer, own in effects[effects["layer"] >= 0].groupby("layer", sort=True):
        attention, mixer = own["kind"].isin(["head", "attention bias"]), own["kind"] == "mixer"
        by_part = ((f"attention {layer}", attention), (f"mixer {layer}", mixer), (f"MLP {layer}", ~attention & ~mixer))
        for words, part in ((words, own[chosen]) for words, chosen in by_part):
            if len(part):
                sums.append((words, part["effect"].sum()))
    rest = outside[~outside["kind"].isin(["embedding", "position"])]
    if len(rest):
        sums.append(("constant", rest["effect"].sum()))
    return pd.DataFrame(sums, columns=["part", "effect"])


def _changed(change: pd.DataFrame) -> Figure:
    """Draw the way from the base model's total to the tuned model's."""
    base = float(change["base"].sum())
    own = strongest(change, "change", PARTS)
    walked = walk(_steps(own, change.drop(index=own.index), "change"), base)
    walked.loc[walked.index[-1], "part"] = "tuned, total"
    walked = pd.concat([pd.DataFrame([total("base, total", base)]), walked], ignore_index=True)
    # the totals may be far from zero and the changes small: the axis shows the way, and the totals' bars are cut
    way = walked.iloc[1:-1][["start", "end", "low", "high"]].to_numpy()
    low, high = min(base, float(np.nanmin(way))), max(base, float(np.nanmax(way)))
    room = 0.25 * (high - low) or 1e-3
    low, high = (0.0, high + room) if low >= 0 and low < 2 * (high - low) else (low - room, high + room)
    walked["start"] = walked["start"].clip(low, high)
    caption = f"From the base model's metric to the tuned model's; the {len(own)} largest changes by name. Rule: 95\u202f% over texts."
    return waterfall(walked, name="attribution-change", title="What moved the metric", caption=caption, domain=(low, high), wide=True)


def _views(tables: Tables) -> list[Shown]:
    """Show the components whose contribution changed most, and the strongest of every model."""
    change, effects = tables.get("logit_attribution_change"), tables.get("logit_attribution")
    shown = []
    if change is not None:
        top = Table(strongest(change, "change", _TOP, q="q")).words("component", "component").numbers("base", "base", sign=True)
        top = top.numbers("tuned", "tuned", sign=True).numbers("change", "change", ends=("low", "high"), sign=True, bold="q")
        top = top.numbers("q", "q", digits=2).numbers("n", "texts")
        words = "In logits; those significant after Benjamini–Hochberg come first, in bold."
        shown.append(Shown("Changed contributions", top.view(), words))
    for _, whose, own in [] if effects is None else each_model(effects):
        top = Table(strongest(own, "effect", _TOP)).words("component", "component").mapped("kind", "kind")
        top = top.numbers("effect", "effect, logits", ends=("low", "high"), sign=True, bold="q")
        top = top.numbers("q", "q", digits=2).numbers("n", "texts")
        shown.append(Shown(f"The strongest contributions{whose}", top.view(), folded=True))
    return shown


def _findings(tables: Tables) -> list[Finding]:
    effects, change, found = tables.get("logit_attribution"), tables.get("logit_attribution_change"), list[Finding]()
    models = [] if effects is None else by_model(effects)
    for whose, own in models:
        top = strongest(own, "effect", 1).iloc[0]
        whole = Derived("logit_attribution", (("model", "==", top["model"]),), "effect", "sum")
        total = written(whole.of(tables), sign=True)
        found.append(
            Finding(
                f"In {whose} the metric (an answer's logit, or two answers' difference) is {total} logits; its largest direct part, "
                f"{_with_interval(top, 'effect')}, comes from {label(top['component'])}",
                n=top["n"],
                rows=(top,),
                derived=(whole,),
                effect=abs(float(top["effect"])),
                card=Card(
                    label(top["component"]), f"largest direct part in {whose}", f"{written(top['effect'], sign=True)} of {total} logits"
                )
                if whose == models[-1][0]
                else None,
                table="logit_attribution",
            )
        )
    return found if change is None else [*found, _change_finding(tables, change)]


def _change_finding(tables: Tables, change: pd.DataFrame) -> Finding:
    top, name = strongest(change, "change", 1).iloc[0], "logit_attribution_change"
    whole, surely, every = Derived(name, (), "change", "sum"), Derived(name, (("q", "<", Q_SIGNIFICANT),)), Derived(name)
    return Finding(
        f"Fine-tuning moved the metric by {written(whole.of(tables), sign=True)} logits; the direct part of {label(top['component'])} moved most "
        f"({_with_interval(top, 'change')}); {surely.written(tables)} of {every.written(tables)} components changed at q < {Q_SIGNIFICANT}",
        n=top["n"],
        rows=(top,),
        derived=(whole, surely, every),
        effect=abs(float(top["change"])),
        folded=not surely.of(tables),
        table=name,
    )


def _with_interval(row: pd.Series, column: str) -> str:
    return f"{written(row[column], sign=True)} {interval(row['low'], row['high'], sign=True)}".strip()


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        *few_texts(tables, "logit_attribution"),
        Caveat(
            "Direct attribution counts what a part writes straight to the logits, not what later parts make of it, and holds the final norm's scale fixed."
        ),
    ]


SECTION = Section(
    id="attribution",
    heading="Direct logit attribution",
    intro=(
        "Direct logit attribution: the metric (the answer's logit, or its lead over the wrong answer's) as an exact sum over what the embedding, every head "
        "and every MLP wrote to the residual stream, the final norm held at its own scale. It counts direct paths only, not what later parts made of a "
        "contribution."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="parts",
)
