"""The documentation site is built strictly, from pages that are all in its menu; nothing in it asks a network for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the site needs the extra docs: make test-all installs it")

from website.hooks import commands, gallery, generated

from mechscope.errors import MechscopeError
from mechscope.report.marks.figure import png
from mechscope.report.notebook import figures
from mechscope.store.tables import read_table
from tests.report import synthetic

ROOT = Path(__file__).resolve().parents[1]


def test_the_menu_leads_to_every_page() -> None:
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    made = {name for name in generated() if name.endswith(".md")}
    assert not written & made
    menu = re.findall(r"(\S+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(menu) == sorted(written | made)


def test_the_gallery_shows_the_figures_of_a_run_at_half_their_pixels(tmp_path: Path) -> None:
    folder = synthetic.write_run(tmp_path / "run", {"layers": synthetic.tables(3, 2)["layers"]})
    (folder / "figures").mkdir(exist_ok=True)
    drawn = figures({"layers": read_table(folder / "tables" / "layers.parquet")})
    for name in drawn:
        (folder / "figures" / f"{name}.png").write_bytes(png('<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"/>'))
    made = gallery(str(folder))
    assert {name for name in made if name != "gallery.md"} == {f"gallery/{name}.png" for name in drawn}
    assert all(f"](gallery/{name}.png){{ loading=lazy width=30 }}" in str(made["gallery.md"]) for name in drawn)
    (folder / "figures" / f"{next(iter(drawn))}.png").unlink()
    with pytest.raises(MechscopeError, match="draws the figures of a run again"):
        gallery(str(folder))


def test_settings_of_commands_stand_in_one_line_each() -> None:
    rows = [line for line in commands().splitlines() if line.startswith("    |")]
    assert len(rows) > 100
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}


@pytest.mark.slow
def test_the_site_is_built_strictly_and_asks_nobody(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1", "MECHSCOPE_GALLERY": ""}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img|link rel="(?:stylesheet|preconnect|icon)")[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text(encoding="utf-8")
        )
        assert not loaded, page
    # signatures and docstrings of the packages are there
    assert "faithfulness_curve" in (tmp_path / "site" / "reference" / "circuits.html").read_text(encoding="utf-8")
