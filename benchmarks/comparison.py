"""Two result files side by side: what a change of the code, or of the machine, did to every job.

A ratio is told from chance by the spread of the rounds: half of how far they lie apart in each file, added. Where the machine itself was faster or
slower that day, the column of forward passes says so: it is of ratios that were taken in turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.results import Results
from benchmarks.settings import BenchmarkError

# the load, how many rounds, and how much text, which is part of what makes records comparable
_NO_MATTER = {"load", "repeats", "texts", "tokens", "documents"}
# what a single round may be off by, where there is no spread to know it from
_UNKNOWN = 0.1


@dataclass(frozen=True)
class Change:
    """What became of one job; ratios are new over old.

    Attributes:
        job: Its name.
        by: Who did it.
        seconds: Of time.
        passes: Of time in forward passes (or whatever its ratio is to); None where there is none.
        memory: Of peak memory above the loaded model; None where there was none to speak of.
        noise: How far the ratio of time may be from 1 by chance.
    """

    job: str
    by: str
    seconds: float
    passes: float | None
    memory: float | None
    noise: float

    @property
    def verdict(self) -> str:
        """`faster`, `slower` or `same`, by the ratio of ratios if there is one."""
        ratio = self.seconds if self.passes is None else self.passes
        if abs(ratio - 1) <= self.noise:
            return "same"
        return "faster" if ratio < 1 else "slower"


def changes(old: Results, new: Results) -> list[Change]:
    """Compare what both files have.

    Raises:
        BenchmarkError: They have nothing in common.
    """
    before = old.by_key()
    found = [_change(before[name], record) for name, record in new.by_key().items() if name in before]
    if not found:
        raise BenchmarkError(f"{old.path} and {new.path} have no job of the same name and texts in common: nothing to compare")
    return found


def _change(old: dict[str, Any], new: dict[str, Any]) -> Change:
    passes = None if old["ratio"] is None or new["ratio"] is None else new["ratio"] / old["ratio"]
    memory = new["memory_gib"] / old["memory_gib"] if old["memory_gib"] > 0 else None
    noise = sum(_UNKNOWN if record["noise"] is None else record["noise"] for record in (old, new))
    return Change(new["job"], new["by"], new["seconds"] / old["seconds"], passes, memory, noise)


def report(old: Results, new: Results) -> Iterator[str]:
    """Yield the comparison as lines of plain text."""
    yield f"{'job':<22}{'by':<22}{'time ×':>9}{'ratio ×':>9}{'noise':>8}{'memory ×':>10}  verdict"
    for change in changes(old, new):
        ratio, memory = ("–" if value is None else f"{value:.2f}" for value in (change.passes, change.memory))
        noise = f"± {100 * change.noise:.0f} %"
        yield f"{change.job:<22}{change.by:<22}{change.seconds:>9.2f}{ratio:>9}{noise:>8}{memory:>10}  {change.verdict}"
    for title, one, other in (("only in the old file", old, new), ("only in the new file", new, old)):
        missing = [f"{name[0]} ({name[1]})" for name in one.by_key() if name not in other.by_key()]
        if missing:
            yield f"{title}: {', '.join(missing)}"
    for name in ("settings", "machine", "versions"):
        before, after = (_flat(results.head[name]) for results in (old, new))
        keys = sorted({*before, *after} - _NO_MATTER)
        differing = [f"{part} {before.get(part)} → {after.get(part)}" for part in keys if before.get(part) != after.get(part)]
        if differing:
            yield f"{name} differ: {'; '.join(differing)}"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put what is nested, a shape's sizes, beside the rest."""
    nested = {name: value for value in values.values() if isinstance(value, Mapping) for name, value in value.items()}
    return {name: value for name, value in values.items() if not isinstance(value, Mapping)} | nested
