"""Warnings that weaken a result are part of it: noted while it is made, kept in the manifest, and rows of the table of caveats."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mechscope.store.run import RunFolder
from mechscope.studies.jobs import knockout
from mechscope.studies.noted import noting
from tests.studies.jobs.running import run


def test_a_warning_is_noted_where_it_says_what_it_weakens() -> None:
    log = logging.getLogger("mechscope.studies.somewhere")
    with noting() as noted:
        log.warning("no one reads this")
        log.warning("%d texts are too few", 7, extra={"weakens": "circuit_overlap", "withheld": "what circuits share"})
        log.warning("%d texts are too few", 7, extra={"weakens": "circuit_overlap", "withheld": "what circuits share"})
        log.info("so far", extra={"weakens": "heads"})
    log.warning("too late", extra={"weakens": "heads"})
    assert noted == [{"weakens": "circuit_overlap", "text": "7 texts are too few", "withheld": "what circuits share"}]


def test_a_run_keeps_what_was_noted_in_its_manifest_and_in_its_table_of_caveats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage,) = knockout.JOB.stages
    work = stage.work

    def weakened(job_run: Any) -> Any:
        logging.getLogger("mechscope.studies").warning("these texts are odd", extra={"weakens": "knockout"})
        return work(job_run)

    monkeypatch.setitem(stage.__dict__, "work", weakened)
    result = run(knockout.JOB, tmp_path / "run", keys="2,4", queries="last")
    caveats = result.tables["caveats"]
    assert list(caveats) == ["section", "weakens", "caveat", "withheld"]
    noted = caveats[caveats["caveat"] == "These texts are odd."]
    assert noted[["section", "weakens", "withheld"]].to_numpy().tolist() == [["knockout", "knockout", False]]
    assert "Only 6 texts were read; intervals from fewer than 30 are rough." in set(caveats["caveat"])
    manifest = RunFolder.read(tmp_path / "run").manifest
    assert manifest["stages"][stage.name]["caveats"] == [{"weakens": "knockout", "text": "these texts are odd", "withheld": ""}]
    assert "These texts are odd." in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
