"""The house stands: floors import downwards only, no circle of files, small files, light entrances."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import mechscope

ROOT = Path(mechscope.__file__).parent
# who may import whom: only what stands further down
FLOORS = (
    ("errors", "choices", "shapes"),
    ("settings", "ranks"),
    ("store",),
    ("subject",),
    ("instrument", "stats"),
    ("data",),
    ("difference", "lens", "causal", "circuits", "heads", "weights", "features", "probing", "edit"),
    ("adapt", "groundtruth", "universality"),
    ("report",),
    ("studies",),
    ("commands",),
    ("api", "cli", "__init__", "__main__"),
)
# the report is drawn from tables alone
REPORT_READS = {"errors", "store", "report"}
# one noun each, and longer than others for a reason
LONG = {"data/newsroom/events.py": "a list of what may happen in an article"}


@cache
def modules() -> dict[str, Path]:
    """Return all modules by name."""
    named = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return named


def imports(module: str) -> Iterator[str]:
    """Yield the modules of mechscope that a module imports, inside functions and for types too."""
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mechscope":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())


def room(module: str) -> str:
    """Return the part of mechscope that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor(module: str) -> int:
    """Return how high a module stands."""
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def test_every_room_has_a_floor() -> None:
    known = {name for rooms in FLOORS for name in rooms}
    assert {room(module) for module in modules()} == known


def test_no_import_goes_upward() -> None:
    upward = [f"{module} -> {other}" for module in modules() for other in imports(module) if floor(other) > floor(module)]
    # what the package shows at its top is read off the jobs on first use
    assert [each for each in upward if not each.startswith("mechscope -> ")] == []


def test_the_report_reads_tables_alone() -> None:
    assert {room(other) for module in modules() if room(module) == "report" for other in imports(module)} <= REPORT_READS


def test_techniques_know_each_other_by_their_front_door() -> None:
    techniques = FLOORS[6]
    inside = [
        f"{module} -> {other}"
        for module in modules()
        for other in imports(module)
        if room(module) in techniques and room(other) in techniques and room(module) != room(other) and other.count(".") > 1
    ]
    assert inside == []


def test_there_is_no_circle_of_files() -> None:
    # what the package shows at its top is read off the jobs on first use
    needs = {module: set(imports(module)) - {module, "mechscope"} for module in modules() if module != "mechscope"}
    while free := {module for module, others in needs.items() if not others & needs.keys()}:
        needs = {module: others for module, others in needs.items() if module not in free}
    assert {module: sorted(others & needs.keys()) for module, others in needs.items()} == {}


def test_files_are_one_noun_each() -> None:
    long = {
        file.relative_to(ROOT).as_posix(): lines
        for file in modules().values()
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 350
    }
    assert long.keys() <= LONG.keys()


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = ("torch", "pandas", "numpy", "scipy", "altair", "transformers", "pyarrow")
    code = f"import sys, mechscope.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
