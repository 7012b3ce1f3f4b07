"""The notebooks of docs/notebooks run from the top, show what they are kept with, and name no machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra docs: make test-all installs it")

from website.notebooks import execute, page, paths  # noqa: E402

PATHS = paths()


def kinds(notebook: Any) -> list[list[str]]:
    """Return what kinds of output every cell of code has."""
    return [
        [kind for output in cell.outputs for kind in sorted(output.get("data", {output.output_type: ""}))]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_there_are_the_four() -> None:
    assert {path.stem for path in PATHS} == {"circuit", "difference", "reading", "steering"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_executed_small_and_without_this_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert not re.search(r"/(tmp|work|home|root|Users)/|\d{4}-\d\d-\d\dT", text)
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert "image/svg+xml" in str(kinds(notebook))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_becomes_a_page_with_its_pictures(path: Path) -> None:
    text, pictures = page(path)
    assert text.startswith("# ")
    assert set(re.findall(r"!\[[^\]]*\]\((\S+)\)", text)) == pictures.keys()
    assert all(picture.lstrip().startswith(b"<svg") for picture in pictures.values())


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_gives_outputs_of_the_same_kinds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert kinds(execute(path)) == kinds(nbformat.read(path, as_version=4))
