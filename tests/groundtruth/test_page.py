"""The page of ground truth: its table is what the benchmark gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechscope.studies.jobs import benchmark_circuits
from mechscope.studies.runner import run_job

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ground-truth.md"


@pytest.mark.slow
def test_the_table_of_the_page_is_what_the_benchmark_gives() -> None:
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if " · " in line or "| eap |" in line]
    methods, rows = lines[0][2:], {line[0]: line[2:] for line in lines[1:]}
    table = run_job(benchmark_circuits.JOB, benchmark_circuits.JOB.resolve(), None).circuit_benchmark
    assert list(rows) == list(dict.fromkeys(table["program"]))
    assert methods == list(dict.fromkeys(table["method"]))
    for row in table.itertuples():
        said = [float(number) for number in rows[str(row.program)][methods.index(str(row.method))].split(" · ")]
        # where scores are rounding, their order is the machine's
        near = 0.06 if said[0] < 1 else 0.0005
        assert [row.auroc, row.precision] == pytest.approx(said, abs=near + 0.0051), (row.program, row.method)
