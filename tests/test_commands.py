"""Commands about runs, models and settings that exist already: version, templates of settings, tables."""

from __future__ import annotations

import dataclasses
import io
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml

import mechscope
from mechscope.settings import leaves
from mechscope.store.run import RunFolder
from mechscope.studies.jobs import jobs
from mechscope.studies.templates import config_template
from tests.test_cli import run, spectrum_into

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == f"mechscope {mechscope.__version__}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == cited["version"] == mechscope.__version__
    assert f"## {mechscope.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("job", [job for job in jobs().values() if job.options], ids=lambda job: job.name)
def test_a_template_lists_every_setting_and_is_read_back(job, tmp_path):
    text = config_template(job.name)
    names = {leaf.name for leaf in leaves(job.settings)}
    opened = {line.partition(":")[0].removeprefix("# ") for line in text.splitlines()}
    assert names <= opened
    # all that is commented out is what is the case anyway
    defaults = yaml.safe_load(
        "\n".join(line.removeprefix("# ") for line in text.splitlines() if line.removeprefix("# ").partition(":")[0] in names)
    )
    given = {leaf.name: "x" for leaf in leaves(job.settings) if leaf.default is dataclasses.MISSING}
    known = {leaf.name: leaf for leaf in leaves(job.settings)}
    for name, value in defaults.items():
        if name not in given:
            assert value == known[name].default or str(known[name].default) == str(value)


def test_an_unknown_template_is_one_red_line(monkeypatch, capsys):
    assert run(monkeypatch, "config", "dif") == 2
    assert "no command 'dif' takes settings: use one of" in " ".join(capsys.readouterr().err.split())


def test_tables_of_a_run_go_to_csv_and_json(monkeypatch, capsys, tmp_path):
    asked = spectrum_into(tmp_path / "run")
    assert run(monkeypatch, *asked, "--quiet") == 0
    capsys.readouterr()
    assert run(monkeypatch, "table", tmp_path / "run") == 0
    assert capsys.readouterr().out.split() == ["caveats", "spectrum"]
    wanted = RunFolder.read(tmp_path / "run").table("spectrum")
    assert run(monkeypatch, "table", tmp_path / "run", "spectrum") == 0
    csv = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert run(monkeypatch, "table", tmp_path / "run", "spectrum", "--as", "json") == 0
    rows = pd.read_json(io.StringIO(capsys.readouterr().out))
    for read in (csv, rows):
        pd.testing.assert_frame_equal(read, wanted, check_dtype=False)
    assert run(monkeypatch, "table", tmp_path / "run", "heads") == 2
    assert "heads" in capsys.readouterr().err
