"""The summary in the terminal: what changed, how much is left for the page, and one sentence on what is the same."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from mechscope.report.contents import Contents
from mechscope.report.marks.tables import Cell, Shown, View
from mechscope.report.sections import sections
from mechscope.store.run import RunFolder
from mechscope.studies import console
from mechscope.studies.job import Result
from mechscope.studies.jobs import jobs
from tests.report import synthetic


def run_of(path: Path, kind: str, tables: dict[str, pd.DataFrame]) -> Result:
    """Return a finished run of some tables."""
    with RunFolder.open(path, {}, kind=kind) as folder:
        folder.record("models", {label: {"source": label} for label in ("base", "tuned")})
        folder.record("page", {"title": "A run", "sections": list(jobs()[kind].sections), "left_out": []})
        with folder.stage("made", {}) as stage:
            for name, table in tables.items():
                stage.write_table(name, table)
    return Result(path, path / "report.html", tables)


def printed(capsys: pytest.CaptureFixture[str], result: Result, *, kind: str = "diff") -> str:
    """Return what the terminal shows of a run, its lines joined."""
    console.show(jobs()[kind], result)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return a run of `diff` of eight layers of twelve heads."""
    made = synthetic.tables(8, 12)
    made["claims"] = pd.concat([made["claims"]] * 2, ignore_index=True)
    names = [name for section in jobs()["diff"].sections if section not in ("bakeoff", "samples") for name in sections()[section].tables]
    return run_of(tmp_path_factory.mktemp("diff") / "run", "diff", {name: made[name] for name in names if name in made})


def test_a_difference_shows_the_layers_and_heads_that_changed_most_with_intervals_and_the_outputs(measured, capsys) -> None:
    out = printed(capsys, measured)
    heads, layers = (measured.tables[name][lambda table: table["rows"] == "all"] for name in ("heads", "layers"))
    judged = heads[heads["write_change_verdict"] != "negligible"]
    top = judged.loc[judged["write_change"].idxmax()]
    for wanted in ("Heads that changed most", "Layers that changed most", "Distributions and loss", "Caveats", top["component"]):
        assert wanted in out
    row = next(line for line in out.split("Heads that changed most")[1].splitlines() if f" {top['component']} " in line)
    assert row.count("[") >= 2, "both with their intervals"
    assert f"│ {layers.loc[layers['kl_base_tuned'].idxmax(), 'layer']} " in out.split("Layers that changed most")[1]


def test_rows_that_are_left_out_are_counted_with_the_command_that_prints_them(measured, capsys) -> None:
    out = printed(capsys, measured)
    claims = measured.tables["claims"]
    assert len(claims) == 12
    assert f"… {len(claims) - 10} more; all in table claims: mechscope table {measured.path} claims\n" in out
    assert f"all in table heads: mechscope table {measured.path} heads" in out


def test_claims_are_sentences_under_their_verdict_the_decided_ones_first(measured, capsys) -> None:
    lines = printed(capsys, measured).split("What is claimed and what was measured")[1].splitlines()
    verdicts = [line.split()[0] for line in lines if line[:1].isalpha() and line.split()[0] in ("supported", "contradicted", "undecided")]
    assert len(verdicts) == 10
    decided = [verdict != "undecided" for verdict in verdicts]
    assert decided == sorted(decided, reverse=True)
    assert any("measured here:" in line for line in lines)


def test_what_fits_is_shown_and_columns_left_out_are_counted(measured, capsys) -> None:
    columns = tuple(f"column {number}" for number in range(30))
    view = View(columns, (tuple(Cell("1.00", sort=1.0) for _ in columns),))
    console._show_table(Shown("Wide", view), sections()["outputs"], Contents.read(measured.path))
    out = capsys.readouterr().out
    assert "more columns on the page" in out
    assert "column 0" in out
    assert "column 29" not in out


def test_models_that_are_the_same_get_one_sentence(measured, tmp_path, capsys) -> None:
    same = dict(measured.tables)
    same["weights"] = same["weights"].assign(change=0.0)
    out = " ".join(printed(capsys, run_of(tmp_path / "run", "diff", same)).split())
    assert out.startswith("The two models are identical: ")
    assert out.partition(" run ")[0].count(".") == 1
