"""A job over a series: what changed when, beside what the same texts and a null allow, and whether the steps are what they should be."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd

from mechscope.report.marks.courses import courses
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT, grid_heatmap
from mechscope.report.marks.tables import Cell, Row, Shown, Table, value
from mechscope.report.section import NO_SAMPLE, Section, Tables, number, table
from mechscope.report.shared import estimated
from mechscope.report.statements import Caveat, Derived, Finding, sample
from mechscope.report.theme import name_of
from mechscope.report.theme import number as written

FEWEST_STEPS = 8
"""Steps below which no change point is tested, as `mechscope.stats.change_points` has it."""
_PANELS, _HEADS, _SAID, _ALIKE = 12, 40, 6, 0.99
_HEAD = re.compile(r"a\d+\.h\d+")

_CURVE = {
    "table": "the job's table",
    "quantity": "its column",
}
TABLES = {
    "series_steps": table(
        "One row per step.",
        step="the step",
        fingerprint="hash of its weights as they act",
        repeats="the first step before it with the same weights; none where there is none",
        moved=number("distance of its weights from those of the step before, estimated from the same random entries of each", "‖θ − θ′‖"),
        away=number("the same from the first step", "‖θ − θ′‖"),
        size=number("norm of its weights, estimated so", "‖θ‖"),
        jumps="whether it lies far from both neighbours while these lie close to each other, as misplaced weights do",
        source="where it is",
    ),
    "series_values": table(
        "One row per step and curve: every number of the job's tables.",
        step="the step",
        **_CURVE,
        unit="its unit",
        curve="what tells the table's rows apart, in words",
        component="its component; empty where the table has none",
        value=number("the number", "of the quantity", "low", "high", bare=True),
        n="observations",
    ),
    "series_changes": table(
        "One row per curve.",
        **_CURVE,
        meaning="what the column means",
        curve="what tells the table's rows apart, in words",
        unit="its unit",
        component="its component; empty where the table has none",
        steps="steps at which it has a number",
        n="observations of a step, the fewest",
        first=number("the number at the first step", "of the quantity", "low", "high"),
        last=number("at the last", "of the quantity", "low", "high"),
        change=number("last − first", "of the quantity"),
        largest=number("the largest change between neighbouring steps", "of the quantity"),
        from_step="the step before it",
        to_step="the step behind it",
        before=number("the number before it", "of the quantity", "low", "high"),
        after=number("the number behind it", "of the quantity", "low", "high"),
        apart="whether the intervals before and behind it do not overlap",
        jump=number("jump of two parallel lines at the change point; the next columns are of it", "of the quantity"),
        jump_step="first step behind the change point; none where fewer than 8 steps or missing numbers",
        jump_step_low="earliest step that its interval (95\u202f%) holds",
        jump_step_high="latest",
        bic=number("BIC of one line less that of two", "log likelihood × 2"),
        jump_p="p: share of null curves (neighbouring steps correlate by .7) that gain as much from a jump",
        jump_q="q: p after Benjamini–Hochberg over all curves",
        found="whether q is at most .05 and BIC prefers two lines",
    ),
}


def _ranked(changes: pd.DataFrame) -> pd.DataFrame:
    """Return the curves, those with a change point first, then those whose intervals are apart, by size beside the largest number of their quantity."""
    most = (
        changes[["first", "last", "before", "after"]]
        .abs()
        .max(axis=1)
        .groupby([changes["table"], changes["quantity"]], sort=False)
        .transform("max")
    )
    size = changes["largest"].abs() / most.clip(lower=1e-300)
    order = pd.DataFrame({"found": ~changes["found"].astype(bool), "apart": ~changes["apart"].astype(bool), "size": -size})
    return changes.loc[order.sort_values(["found", "apart", "size"], kind="stable").index]


def _telling(tables: Tables, count: int) -> pd.DataFrame:
    """Return the curves that are shown: the most certain changes; of one row's numbers that go alike (a score and its excess) the first."""
    values, changes = tables["series_values"], _ranked(tables["series_changes"].reset_index(drop=True))
    keys = ["table", "quantity", "curve"]
    courses_of = {key: own.set_index("step")["value"] for key, own in values.groupby(keys, sort=False)}
    kept: list[int] = []
    changes = changes.reset_index(drop=True)
    for index, (_, row) in enumerate(changes.iterrows()):
        own = courses_of.get(tuple(row[keys]))
        others = [
            courses_of[tuple(changes.loc[other, keys])]
            for other in kept
            if (changes.loc[other, ["table", "curve"]] == row[["table", "curve"]]).all()
        ]
        if own is not None and not any(_alike(own, other) for other in others):
            kept.append(index)
        if len(kept) == count:
            break
    return changes.loc[kept]


def _alike(one: pd.Series, other: pd.Series) -> bool:
    both = pd.concat([one, other], axis=1).dropna().to_numpy()
    if len(both) < 3:
        return False
    centred = both - both.mean(axis=0)
    norms = np.linalg.norm(centred, axis=0)
    return bool(norms.min() > 0 and abs(centred[:, 0] @ centred[:, 1]) > _ALIKE * norms[0] * norms[1])


def _named(row: pd.Series) -> str:
    return f"{row['curve']} · {name_of(row['quantity'])}" if row["curve"] else f"{name_of(row['quantity'])} · {row['table']}"


def _figures(tables: Tables) -> list[Figure]:
    drawn: list[Figure] = []
    if {"series_values", "series_changes"} <= tables.keys():
        values, chosen = tables["series_values"], _telling(tables, _PANELS)
        keys = ["table", "quantity", "curve"]
        marked = chosen[keys].assign(
            panel=[_named(row) for _, row in chosen.iterrows()],
            at=chosen["jump_step"].where(chosen["found"].astype(bool)).astype(float),
            place=range(len(chosen)),
        )
        points = values.merge(marked, on=keys).sort_values(["place", "step"], kind="stable")
        if len(points):
            caption = (
                "The curves that changed most surely between neighbouring steps, each on its own scale; steps on a logarithmic axis. Bands: 95\u202f% over the "
                f"job's observations. Dashed: a change point (q < {Q_SIGNIFICANT})."
            )
            drawn.append(courses(points, name="dynamics-curves", title="What changed when", caption=_counted(caption, points)))
        drawn += _maps(values, chosen)
    if "series_steps" in tables and len(tables["series_steps"]) > 1:
        steps = tables["series_steps"]
        parts = [
            steps[["step"]].assign(panel=words, value=steps[column], place=place) for place, (column, words) in enumerate(_MOVES.items())
        ]
        moved = pd.concat(parts, ignore_index=True).dropna(subset=["value"]).assign(low=np.nan, high=np.nan, unit="‖θ − θ′‖", at=np.nan)
        caption = f"How far the weights of each step lie from the step before and from the first. {NO_SAMPLE}"
        drawn.append(courses(moved, name="dynamics-weights", title="How far the weights moved", caption=caption))
    return drawn


_MOVES = {"moved": "from the step before", "away": "from the first step"}


def _counted(caption: str, points: pd.DataFrame) -> str:
    counts = points["n"].dropna()
    return f"{caption} {sample(list(counts), 'texts')}." if len(counts) else f"{caption} {NO_SAMPLE}"


def _maps(values: pd.DataFrame, chosen: pd.DataFrame) -> list[Figure]:
    """Draw the heads by the steps, for the quantity in which a head changed most surely."""
    heads = chosen[[bool(_HEAD.fullmatch(str(component))) for component in chosen["component"]]]
    if heads.empty:
        return []
    row = heads.iloc[0]
    of = str(row["curve"]).replace(str(row["component"]), "").strip(", ")
    own = values[(values["table"] == row["table"]) & (values["quantity"] == row["quantity"])]
    own = own[[str(curve).replace(str(part), "").strip(", ") == of for curve, part in zip(own["curve"], own["component"], strict=True)]]
    ranges = own.groupby("component", sort=False)["value"].agg(lambda column: column.max() - column.min())
    most = set(ranges.sort_values(ascending=False, kind="stable").head(_HEADS).index)
    own = own[own["component"].isin(most)].assign(
        place=[[int(part) for part in re.findall(r"\d+", name)] for name in own["component"] if name in most]
    )
    own = own.sort_values(["place", "step"], kind="stable", key=lambda column: column.map(tuple) if column.name == "place" else column)
    own = own.assign(at=[f"{step:,}" for step in own["step"]])
    columns = own.drop_duplicates("step").sort_values("step")["at"]
    own["at"] = pd.Categorical(own["at"], categories=list(columns), ordered=True)
    own = pd.concat([own[own["at"] == name] for name in columns]).assign(at=lambda table: table["at"].astype(str))
    said = f"{name_of(row['quantity'])}{f' ({of})' if of else ''}"
    left = f" The {_HEADS} heads that moved most." if len(ranges) > len(most) else ""
    return [
        grid_heatmap(
            own.sort_values("place", kind="stable", key=lambda column: column.map(tuple)),
            "value",
            across=("at", "step"),
            down=("component", "head"),
            name="dynamics-heads",
            title=f"Heads over steps: {said}",
            legend=f"{said}, {row['unit']}",
            caption=_counted(f"Heads down, steps across.{left}", own),
            scale="change" if own["value"].min() < 0 else "magnitude",
            tooltip={"value": "value", "low": "95\u202f% from", "high": "to"},
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "series_changes" in tables:
        rows = _ranked(tables["series_changes"].reset_index(drop=True)).head(40)
        view = Table(rows).words("curve", "of").mapped("quantity", "quantity").words("table", "table")
        view = view.numbers("first", "first step", ends=("first_low", "first_high")).numbers(
            "last", "last step", ends=("last_low", "last_high")
        )
        view = view.numbers("largest", "largest change", sign=True)
        for column, heading in (("from_step", "from step"), ("to_step", "to step"), ("jump_step", "change point")):
            view = view.cells(column, heading, _whole(column))
        view = view.numbers("jump_q", "q", digits=2).cells("n", "n", _whole("n"))
        shown.append(Shown("What changed when", view.view(), "The most certain changes first.", table="series_changes", terminal=True))
    if "series_steps" in tables:
        view = (
            Table(tables["series_steps"]).numbers("step", "step").numbers("moved", "from the step before").numbers("away", "from the first")
        )
        view = view.words("fingerprint", "weights").words("source", "source")
        shown.append(Shown("The steps", view.view(), table="series_steps", folded=True))
    return shown


def _whole(column: str) -> Callable[[Row], Cell]:
    """Return a cell of a whole number; an en dash for none."""
    return lambda row: value(None if pd.isna(row[column]) else int(row[column]))


def _findings(tables: Tables) -> list[Finding]:
    found: list[Finding] = []
    if {"series_values", "series_changes"} <= tables.keys():
        changes = tables["series_changes"]
        found += [_changed(row) for _, row in _telling(tables, _SAID).iterrows()]
        if changes["jump_p"].notna().any():
            tested, jumped = Derived("series_changes", (("jump_p", "<=", 1.0),)), Derived("series_changes", (("found", "==", True),))
            text = f"{jumped.written(tables)} of {tested.written(tables)} curves have a change point that is beyond the null"
            found.append(Finding(text, n=changes["steps"].max(), unit="steps", derived=(tested, jumped), table="series_changes"))
        else:
            most = int(changes["steps"].max())
            reason = f"{most} steps are fewer than {FEWEST_STEPS}"
            found.append(Finding("which curves have a change point", withheld=reason, table="series_changes"))
    if "series_steps" in tables and tables["series_steps"]["moved"].notna().any():
        steps = tables["series_steps"].reset_index(drop=True)
        at = int(np.nanargmax(steps["moved"].to_numpy(dtype=float)))
        row, before = steps.iloc[at], steps.iloc[at - 1]
        text = (
            f"the weights moved farthest from step {written(int(before['step']))} to step {written(int(row['step']))}, by {written(row['moved'])}; at the last "
            f"step they lie {written(steps.iloc[-1]['away'])} from the first"
        )
        found.append(Finding(text, n=len(steps), unit="steps", rows=(row, before, steps.iloc[-1]), table="series_steps"))
    return found


def _changed(row: pd.Series) -> Finding:
    """Say when a curve changed most, and whether that is beyond its intervals and beyond the null."""
    of = f"{row['curve']} ({row['meaning']})" if row["curve"] else str(row["meaning"])
    verb = "rose" if row["largest"] > 0 else "fell"
    unit = f" {row['unit']}" if row["unit"] and not str(row["unit"]).startswith("of the ") else ""
    text = (
        f"{of} {verb} most from step {written(int(row['from_step']))} to step {written(int(row['to_step']))}, from {estimated(row, 'before')} to "
        f"{estimated(row, 'after')}{unit}"
    )
    if pd.notna(row["before_low"]) and pd.notna(row["after_low"]):
        text += ", and the intervals do not overlap" if row["apart"] else ", within overlapping intervals"
    text += (
        f"; from the first to the last of {written(int(row['steps']))} steps it went from {written(row['first'])} to {written(row['last'])}"
    )
    if row["found"]:
        around = f"interval {written(int(row['jump_step_low']))} to {written(int(row['jump_step_high']))}"
        text += f"; its change point is step {written(int(row['jump_step']))} ({around}), "
        text += f"a jump of {written(row['jump'], sign=True)}, q = {written(row['jump_q'])}"
    n, unit = (row["n"], "texts") if pd.notna(row["n"]) else (row["steps"], "steps")
    return Finding(text, n=n, unit=unit, rows=(row,), effect=abs(float(row["largest"])), table="series_changes")


def _caveats(tables: Tables) -> list[Caveat]:
    said: list[Caveat] = []
    if (steps := tables.get("series_steps")) is not None:
        for _, row in steps[steps["repeats"].notna()].iterrows():
            said.append(
                Caveat(
                    f"Step {int(row['step']):,} has the weights of step {int(row['repeats']):,}: one of them is not what it says.",
                    weakens="series_steps",
                )
            )
        for _, row in steps[steps["jumps"].astype(bool)].iterrows():
            said.append(
                Caveat(
                    f"The weights of step {int(row['step']):,} lie far from both neighbours, close to each other: they may be of another step or run.",
                    weakens="series_steps",
                )
            )
    said += [
        Caveat("All steps are of one training: when it happened there says nothing of another seed."),
        Caveat(
            "Curves were searched for the largest change, and its steps are as far apart as the checkpoints that were kept. Intervals are "
            "over the job's observations, the same at every step.",
            weakens="series_changes",
        ),
        Caveat(
            "A change point is a jump beside a straight course. A smooth course that bends, seen at 20 steps or more, can count as one: see the curve.",
            weakens="series_changes",
        ),
    ]
    return said


SECTION = Section(
    id="dynamics",
    heading="What changed when",
    intro=(
        "One job was run at every checkpoint, and every number of its tables is a curve over the steps. Two things are asked of each. Between which "
        "neighbouring steps did it change most, and is that beyond its intervals? And does it jump: two parallel lines against one by BIC, beside a null of "
        "curves that only wander (neighbouring steps correlate by .7), with the interval of the place by the bootstrap. Fewer than 8 steps cannot tell a "
        "jump from wandering."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
