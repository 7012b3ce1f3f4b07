"""Waterfalls: the parts of a sum, one after the other, ending at the total.

A bar's interval belongs to its own length and is drawn at its end.
"""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT

_WAYS = ("raises", "lowers", "total")
_COLOURS = ("#0072B2", "#D55E00", "#8C8C8C")


def walk(steps: pd.DataFrame, first: float = 0.0) -> pd.DataFrame:
    """Return every step with the place it starts and ends at, its interval moved there, and after them the total.

    Args:
        steps: `part` and `effect`, in order, and where they are known `low`, `high` and `q`.
        first: Where the first step starts.
    """
    end = first + steps["effect"].astype(float).cumsum()
    start = end - steps["effect"]
    nothing = pd.Series(np.nan, index=steps.index)
    low, high = (start + steps.get(column, nothing).astype(float) for column in ("low", "high"))
    way = ["raises" if effect >= 0 else "lowers" for effect in steps["effect"]]
    columns = {"start": start, "end": end, "low": low, "high": high, "way": way, "q": steps.get("q", nothing)}
    walked = pd.DataFrame({"part": steps["part"], "effect": steps["effect"], **columns})
    last = float(end.iloc[-1]) if len(end) else first
    return pd.concat([walked, pd.DataFrame([total("total", last)])], ignore_index=True)


def total(part: str, effect: float) -> dict[str, object]:
    """Return the row of a bar from zero to a total."""
    return {"part": part, "effect": effect, "start": 0.0, "end": effect, "way": "total"}


def waterfall(steps: pd.DataFrame, *, name: str, title: str, caption: str, domain: tuple[float, float], wide: bool = False) -> Figure:
    """Draw the steps of a walk, downwards.

    Args:
        steps: As `walk` returns them.
        name: The figure's name.
        title: Its title.
        caption: How to read it; what is dotted is added.
        domain: Ends of the axis.
        wide: Whether it has a row of the page to itself.
    """
    numbers, order = Numbers(), list(steps["part"])
    told = [
        alt.Tooltip("part:N"),
        alt.Tooltip("effect:Q", title="effect, logits", format="+.4~g"),
        alt.Tooltip("end:Q", title="sum so far", format="+.4~g"),
    ]
    rows = numbers.add(steps, ["part", "effect", "start", "end", "low", "high", "way", "q"])
    base = alt.Chart(rows).encode(y=alt.Y("part:N", sort=order, title=None, axis=alt.Axis(grid=False)), tooltip=told)
    scale, axis = alt.Scale(domain=list(domain), nice=False), alt.Axis(tickCount=6, grid=True)
    across = alt.X("start:Q", title="sum of the parts, logits", scale=scale, axis=axis)
    colour = alt.Color("way:N", scale=alt.Scale(domain=list(_WAYS), range=list(_COLOURS)), legend=alt.Legend(title=None))
    zero = alt.Chart(numbers.add(pd.DataFrame({"zero": [0]}), ["zero"])).mark_rule(style="zero", color="#8C8C8C").encode(x=alt.X("zero:Q"))
    bars = base.mark_bar(height={"band": 0.68}).encode(x=across, x2="end:Q", color=colour)
    marks = [*([zero] if domain[0] <= 0 <= domain[1] else []), bars]
    if steps["low"].notna().any():
        ends = base.mark_rule(strokeWidth=1.4, color="#7a8590")
        marks.append(ends.encode(x=alt.X("low:Q", title="sum of the parts, logits"), x2="high:Q"))
    if (steps["q"] < Q_SIGNIFICANT).any():
        dots = base.mark_point(filled=True, size=22, fill="#ffffff", stroke="#20262d", strokeWidth=0.7, opacity=1).encode(x=alt.X("end:Q"))
        marks.append(dots.transform_filter(f"datum.q !== null && datum.q < {Q_SIGNIFICANT}"))
        caption += f" A dot marks q < {Q_SIGNIFICANT}."
    chart = alt.layer(*marks).properties(height=17 * len(order))
    spec = definition(chart, numbers, description=title)
    return Figure(name=name, title=title, caption=caption, spec=spec, wide=wide, width=620 if wide else 460)
