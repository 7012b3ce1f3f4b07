"""Direct logit attribution as waterfalls: the parts of a sum, one after the other, ending at the total.

Base and tuned stand beside each other with the same parts in the same order on the same axis. A third figure walks from the base model's total to
the tuned model's, over what fine-tuning changed. A bar's interval belongs to its own length and is drawn at its end.
"""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import numpy as np
import pandas as pd

from mechscope.report.figure import Figure, Numbers, definition
from mechscope.report.heatmaps import Q_SIGNIFICANT
from mechscope.report.tabled import Shown, Table, strongest
from mechscope.report.theme import label, name_of

PARTS = 18
"""Components that a waterfall shows by name; all others are one bar."""

_TOP = 40
_OUTSIDE = {"embedding": "embedding", "position": "position", "constant": "constant"}
_WAYS = ("raises", "lowers", "total")
_COLOURS = ("#0072B2", "#D55E00", "#8C8C8C")


def attribution_figures(tables: Mapping[str, pd.DataFrame]) -> list[Figure]:
    """Return a waterfall of the strongest components and one by layer for every model, and one of the change."""
    table, change = tables.get("logit_attribution"), tables.get("logit_attribution_change")
    drawn: list[Figure] = []
    if table is not None:
        drawn += _of_models(
            table, {model: _strongest(own, _names(table)) for model, own in table.groupby("model", sort=False)}, "components"
        )
        drawn += _of_models(table, {model: _layers(own) for model, own in table.groupby("model", sort=False)}, "layers")
    if change is not None:
        drawn.append(_changed(change))
    return drawn


def _of_models(table: pd.DataFrame, steps: Mapping[object, pd.DataFrame], by: str) -> list[Figure]:
    placed = {model: _walk(own) for model, own in steps.items()}
    ends = pd.concat([own[["start", "end", "low", "high"]] for own in placed.values()])
    low, high = float(np.nanmin(ends.to_numpy())), float(np.nanmax(ends.to_numpy()))
    room, drawn = 0.03 * (high - low or 1.0), []
    caption = {
        "components": "The strongest components of all models, then all others together. Rule: 95 % over texts.",
        "layers": "Embedding, then each layer's attention (all heads and bias) and MLP, in the order of the residual stream.",
    }[by]
    for i, (model, own) in enumerate(placed.items()):
        whose = f": {name_of(model)}" if len(placed) > 1 else ""
        title = f"{'Strongest contributions' if by == 'components' else 'Contributions by layer'}{whose}"
        name = f"attribution-{by}" + (f"-{i + 1}" if len(placed) > 1 else "")
        drawn.append(_waterfall(own, name=name, title=title, caption=caption, domain=(low - room, high + room)))
    return drawn


def _names(table: pd.DataFrame) -> list[str]:
    """Return the components with the largest mean effect in any model, largest first."""
    largest = table.assign(size=table["effect"].abs()).groupby("component", sort=False)["size"].max()
    return list(largest.sort_values(ascending=False, kind="stable").head(PARTS).index)


def _strongest(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Return the named components in order, then the sum of all others."""
    own = table.drop_duplicates("component").set_index("component")
    own = own.reindex([name for name in names if name in own.index]).reset_index()
    return _steps(own, table[~table["component"].isin(names)], "effect")


def _steps(own: pd.DataFrame, rest: pd.DataFrame, effect: str) -> pd.DataFrame:
    """Return components as steps of a walk, and after them the sum of the rest, whose interval cannot be told from its parts'."""
    found = {"part": [label(name) for name in own["component"]], "effect": own[effect]}
    steps = pd.DataFrame({**found, **{name: own.get(name) for name in ("low", "high", "q")}})
    if rest.empty:
        return steps.reset_index(drop=True)
    return pd.concat([steps, pd.DataFrame({"part": [f"{len(rest)} others"], "effect": [rest[effect].sum()]})], ignore_index=True)


def _layers(table: pd.DataFrame) -> pd.DataFrame:
    """Return sums in the order of the residual stream; a sum's interval cannot be told from its parts'."""
    outside, found = table[table["layer"] < 0], []
    for kind, words in _OUTSIDE.items():
        if kind != "constant" and (outside["kind"] == kind).any():
            found.append((words, outside.loc[outside["kind"] == kind, "effect"].sum()))
    for layer, own in table[table["layer"] >= 0].groupby("layer", sort=True):
        attention = own["kind"].isin(["head", "attention bias"])
        for words, part in ((f"attention {layer}", own[attention]), (f"MLP {layer}", own[~attention])):
            if len(part):
                found.append((words, part["effect"].sum()))
    rest = outside[~outside["kind"].isin(["embedding", "position"])]
    if len(rest):
        found.append(("constant", rest["effect"].sum()))
    return pd.DataFrame(found, columns=["part", "effect"])


def _walk(steps: pd.DataFrame, first: float = 0.0) -> pd.DataFrame:
    """Return every step with the place it starts and ends at, its interval moved there, and the total."""
    end = first + steps["effect"].astype(float).cumsum()
    start = end - steps["effect"]
    nothing = pd.Series(np.nan, index=steps.index)
    low, high = (start + steps.get(column, nothing).astype(float) for column in ("low", "high"))
    way = ["raises" if effect >= 0 else "lowers" for effect in steps["effect"]]
    walked = pd.DataFrame(
        {
            "part": steps["part"],
            "effect": steps["effect"],
            "start": start,
            "end": end,
            "low": low,
            "high": high,
            "way": way,
            "q": steps.get("q", nothing),
        }
    )
    last = float(end.iloc[-1]) if len(end) else first
    return pd.concat(
        [walked, pd.DataFrame([{"part": "total", "effect": last, "start": 0.0, "end": last, "way": "total"}])], ignore_index=True
    )


def _waterfall(steps: pd.DataFrame, *, name: str, title: str, caption: str, domain: tuple[float, float], wide: bool = False) -> Figure:
    numbers, order = Numbers(), list(steps["part"])
    told = [
        alt.Tooltip("part:N"),
        alt.Tooltip("effect:Q", title="effect, logits", format="+.4~g"),
        alt.Tooltip("end:Q", title="sum so far", format="+.4~g"),
    ]
    rows = numbers.add(steps, ["part", "effect", "start", "end", "low", "high", "way", "q"])
    base = alt.Chart(rows).encode(y=alt.Y("part:N", sort=order, title=None, axis=alt.Axis(grid=False)), tooltip=told)
    across = alt.X(
        "start:Q", title="sum of the parts, logits", scale=alt.Scale(domain=list(domain), nice=False), axis=alt.Axis(tickCount=6, grid=True)
    )
    colour = alt.Color("way:N", scale=alt.Scale(domain=list(_WAYS), range=list(_COLOURS)), legend=alt.Legend(title=None))
    zero = alt.Chart(numbers.add(pd.DataFrame({"zero": [0]}), ["zero"])).mark_rule(style="zero", color="#8C8C8C").encode(x=alt.X("zero:Q"))
    marks = [
        *([zero] if domain[0] <= 0 <= domain[1] else []),
        base.mark_bar(height={"band": 0.68}).encode(x=across, x2="end:Q", color=colour),
    ]
    if steps["low"].notna().any():
        marks.append(
            base.mark_rule(strokeWidth=1.4, color="#7a8590").encode(x=alt.X("low:Q", title="sum of the parts, logits"), x2="high:Q")
        )
    if (steps["q"] < Q_SIGNIFICANT).any():
        dots = base.mark_point(filled=True, size=22, fill="#ffffff", stroke="#20262d", strokeWidth=0.7, opacity=1).encode(x=alt.X("end:Q"))
        marks.append(dots.transform_filter(f"datum.q !== null && datum.q < {Q_SIGNIFICANT}"))
        caption += f" A dot marks q < {Q_SIGNIFICANT}."
    chart = alt.layer(*marks).properties(height=17 * len(order))
    return Figure(
        name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title), wide=wide, width=620 if wide else 460
    )


def _changed(change: pd.DataFrame) -> Figure:
    """Draw the way from the base model's total to the tuned model's."""
    base = float(change["base"].sum())
    own = strongest(change, "change", PARTS)
    walked = _walk(_steps(own, change.drop(index=own.index), "change"), base)
    walked.loc[walked.index[-1], "part"] = "tuned, total"
    first = pd.DataFrame([{"part": "base, total", "effect": base, "start": 0.0, "end": base, "way": "total"}])
    walked = pd.concat([first, walked], ignore_index=True)
    # the totals may be far from zero and the changes small: the axis shows the way, and the totals' bars are cut
    way = walked.iloc[1:-1][["start", "end", "low", "high"]].to_numpy()
    low, high = min(base, float(np.nanmin(way))), max(base, float(np.nanmax(way)))
    room = 0.25 * (high - low) or 1e-3
    low, high = (0.0, high + room) if low >= 0 and low < 2 * (high - low) else (low - room, high + room)
    walked["start"] = walked["start"].clip(low, high)
    caption = f"From the base model's metric to the tuned model's; the {len(own)} largest changes by name. Rule: 95 % over texts."
    return _waterfall(walked, name="attribution-change", title="What moved the metric", caption=caption, domain=(low, high), wide=True)


def attribution_views(tables: Mapping[str, pd.DataFrame]) -> list[Shown]:
    """Return the components whose contribution changed most, or without a pair the strongest, as a table."""
    change, table = tables.get("logit_attribution_change"), tables.get("logit_attribution")
    found = []
    if change is not None:
        top = Table(strongest(change, "change", _TOP, q="q")).words("component", "component").numbers("base", "base", sign=True)
        top = (
            top.numbers("tuned", "tuned", sign=True)
            .numbers("change", "change", ends=("low", "high"), sign=True, bold="q")
            .numbers("q", "q", digits=2)
        )
        found.append(
            Shown("Changed contributions", top.view(), "In logits; those significant after Benjamini–Hochberg come first, in bold.")
        )
    if table is not None:
        for model, own in table.groupby("model", sort=False):
            top = Table(strongest(own, "effect", _TOP)).words("component", "component").mapped("kind", "kind")
            top = (
                top.numbers("effect", "effect, logits", ends=("low", "high"), sign=True, bold="q")
                .numbers("q", "q", digits=2)
                .numbers("n", "texts")
            )
            whose = f", {name_of(model)}" if table["model"].nunique() > 1 else ""
            found.append(Shown(f"The strongest contributions{whose}", top.view(), folded=True))
    return found
