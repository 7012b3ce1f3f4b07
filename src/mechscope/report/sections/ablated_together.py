"""Components taken out together: what that does to the metric, beside random sets with as many heads in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.intervals import interval_plot
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import counted_in, effect_columns, estimated, few_texts, sized
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, label
from mechscope.report.theme import number as written

_RANDOM = (("kind", "==", "random"),)
# rank among random sets below which a set stands out, one-sided
_RARE = 0.025
# components that a sentence names
_NAMED = 6

TOGETHER = table(
    "One row per set of components that was taken out together, the selected one first.",
    **effect_columns(component="the set", site="set", positions="all"),
    kind="selected, or random: as many heads in each layer",
    p_random=number("selected set only: share of sets, itself counted, whose effect is at least as large", "share"),
    p_less=number("the same, at most as large", "share"),
    more=number(
        "selected set only: its effect minus the random sets' mean effect; the interval is over texts", "of the metric", "low", "high"
    ),
    withheld="empty: nothing is withheld here",
)


def _lines(tables: Tables) -> pd.DataFrame:
    """Return the selected set, the random ones as one line (mean, 95 % of them) and the difference: `row`, `value`, `low`, `high`, `n`, `over`."""
    sets = tables["ablated_together"]
    top, random = sets.iloc[0], sets.loc[sets["kind"] == "random", "effect"]
    lines: list[Mapping[str, Any]] = [
        {"row": "selected set", "value": top["effect"], "low": top["low"], "high": top["high"], "over": f"{int(top['n'])} texts"}
    ]
    if len(random):
        low, high = random.quantile([0.025, 0.975])
        lines.append({"row": "random sets, mean", "value": random.mean(), "low": low, "high": high, "over": f"{len(random)} sets"})
        more = {"row": "selected minus that mean", "value": top["more"], "low": top["more_low"], "high": top["more_high"]}
        lines.append({**more, "over": f"{int(top['n'])} texts"})
    return pd.DataFrame(lines).assign(n=int(top["n"]))


def _figures(tables: Tables) -> list[Figure]:
    sets = tables["ablated_together"]
    return [
        interval_plot(
            _lines(tables),
            name="ablated-together",
            title="Taken out together",
            axis=f"change of {sets['metric'].iloc[0]}",
            caption=counted_in(
                "Mean over texts of the changed run minus the unchanged one. Rule: 95\u202f% interval over texts; of random sets, where 95\u202f% of them lie.",
                sets,
            ),
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    view = Table(_lines(tables)).words("row", "taken out").numbers("value", "change", ends=("low", "high"), sign=True).words("over", "over")
    return [Shown("Taken out together", view.view(), terminal=True)]


def _written(component: str) -> str:
    """Return a set for reading; of a large one the first components and how many more there are."""
    parts = component.split(",")
    return label(component) if len(parts) <= _NAMED else f"{', '.join(map(label, parts[:3]))} and {len(parts) - 3} more components"


def _findings(tables: Tables) -> list[Finding]:
    sets = tables["ablated_together"]
    top = sets.iloc[0]
    count, mean = Derived("ablated_together", _RANDOM), Derived("ablated_together", _RANDOM, "effect", "mean")
    derived: tuple[Derived, ...] = (count,)
    beside = "; no random sets of heads are like it, so this does not say that it matters more than others"
    if count.of(tables):
        name, words = ("p_random", "as large an effect") if top["effect"] >= mean.of(tables) else ("p_less", "as small an effect")
        rank = f"the share of sets with at least {words}, this one counted, is {written(top[name])}"
        apart = "stands out from them" if top[name] < _RARE else "does not stand out from them"
        beside = (
            f", {count.written(tables)} random sets with as many heads in each layer by {written(mean.of(tables), sign=True)} on average; it {apart}: {rank}"
            f" (selected minus their mean: {estimated(top, 'more', sign=True)})"
        )
        derived = (count, mean)
    size = f"{written(top['effect'], sign=True)} {interval(top['low'], top['high'], sign=True)}".rstrip()
    return [
        Finding(
            f"Taking out {_written(top['component'])} together changes {top['metric']} by {size} to {written(top['value'])}{beside}",
            n=top["n"],
            rows=(top,),
            derived=derived,
            effect=sized(top),
            card=Card(size.partition(" ")[0], f"on {top['metric']} without the selected set", _written(top["component"])),
            table="ablated_together",
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "Random sets lie in the same layers and may hold heads that do the same: the difference is then smaller than what such heads do together."
        ),
        *few_texts(tables, "ablated_together"),
    ]


SECTION = Section(
    id="ablated-together",
    heading="Components taken out together",
    intro=(
        "All named components are replaced at once, at every token, and the metric is read beside the unchanged run. The control are random sets with as many "
        "heads in each layer, replaced in the same way: the rank of the named set among them is exact where it is one more draw of them."
    ),
    tables={"ablated_together": TOGETHER},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
