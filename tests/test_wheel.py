"""A wheel holds all that the package needs: installed beside the checkout it runs, model, templates and all, where the checkout cannot be seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mechscope

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel of a copy of the sources, and install it alone into a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    # a copy, as building writes into the tree
    sources = folder / "sources"
    shutil.copytree(ROOT / "src", sources / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # the build's own tools are those of this environment: nothing is downloaded
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources], check=True)
    (wheel,) = folder.glob("mechscope-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def outside(installed: Path, cwd: Path, *words: str | Path) -> str:
    """Run Python elsewhere, with the installed wheel in front of what this environment has and the checkout hidden; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_runs_where_the_checkout_is_not(installed: Path, tmp_path: Path) -> None:
    where = outside(installed, tmp_path, "-c", "import mechscope; print(mechscope.__file__)").strip()
    assert Path(where).is_relative_to(installed)
    assert outside(installed, tmp_path, "-m", "mechscope", "--version").split()[-1] == mechscope.__version__
    # a job on the model that lies in the wheel, and its page, which needs the templates
    model = outside(installed, tmp_path, "-c", "from mechscope.data.newsroom import newsroom_model_path as path; print(path())").strip()
    assert Path(model).is_relative_to(installed)
    asked = ("spectrum", model, "--data", "newsroom", "--documents", "3", "--layers", "0", "--bands", "4", "--out", "run")
    assert "report" in outside(installed, tmp_path, "-m", "mechscope", *asked)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "unembedding" in page
    assert str(ROOT / "src") not in page


@pytest.mark.slow
def test_the_demo_runs_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    said = outside(installed, tmp_path, "-m", "mechscope", "demo")
    assert "Fine-tuning did what it was meant to" in said
    page = (tmp_path / "runs" / "demo" / "report.html").read_text(encoding="utf-8")
    assert '<section id="bakeoff">' in page
    assert str(ROOT / "src") not in page


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(installed: Path) -> None:
    assert {path.name for path in installed.iterdir()} - {"bin"} == {"mechscope", f"mechscope-{mechscope.__version__}.dist-info"}
    package = ROOT / "src" / "mechscope"

    def files(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    assert files(installed / "mechscope") == files(package)
