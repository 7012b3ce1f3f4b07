"""docs/contributing.md is true: the technique that it adds, file by file, becomes a command, a page, a row of the table docs and a contract."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mechscope.data.newsroom import newsroom_model_path

ROOT = Path(__file__).parents[1]
MODEL = str(newsroom_model_path())


PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
FILES = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL)
"""The files that the page shows: path and content."""


def follow(root: Path) -> None:
    """Write the files that the page shows."""
    for path, content in FILES:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content, encoding="utf-8")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout in which the page was followed."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", root)
    assert [path for path, _ in FILES if (root / path).exists()] == []
    follow(root)
    return root


def test_a_technique_is_four_files() -> None:
    folders = ["src/mechscope/lens", "src/mechscope/studies/jobs", "src/mechscope/report/sections", "tests/contract/entries"]
    assert [str(Path(path).parent) for path, _ in FILES] == folders


def run(checkout: Path, *arguments: str) -> str:
    """Run Python in the checkout and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout / "src"), str(checkout)]), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_technique_is_a_command_and_a_page(checkout: Path) -> None:
    assert "norms" in run(checkout, "-m", "mechscope", "--help")
    out = checkout / "run"
    said = run(checkout, "-m", "mechscope", "norms", MODEL, "--pairs", "newsroom:what", "--limit", "4", "--out", str(out))
    assert "The residual stream ends with a mean norm of" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert '<section id="norms">' in page
    assert "figures/norms.svg" not in page
    assert (out / "figures" / "norms.svg").is_file()


@pytest.mark.slow
def test_the_technique_is_a_function(checkout: Path) -> None:
    code = f"import mechscope; print(list(mechscope.norms({MODEL!r}, 'newsroom:what', limit=3).norms['layer']))"
    assert run(checkout, "-c", code).strip() == "[0, 1, 2, 3, 4, 5]"


def test_its_table_is_in_the_docs(checkout: Path) -> None:
    page = run(checkout, "-m", "mechscope.report.documentation")
    assert "### `norms`" in page
    assert "`norm`, `norm_low`, `norm_high`" in page


@pytest.mark.slow
def test_it_keeps_the_contract(checkout: Path) -> None:
    said = run(checkout, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/contract", "-k", "norms")
    assert re.search(r"[1-9]\d* passed", said)


def test_it_is_written_as_the_house_is(checkout: Path) -> None:
    files = [path for path, _ in FILES]
    run(checkout, "-m", "ruff", "check", *files)
    run(checkout, "-m", "ruff", "format", "--check", *files)
