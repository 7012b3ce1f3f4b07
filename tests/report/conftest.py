"""Invented runs, rendered once for the tests that only read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from mechscope.report import page
from mechscope.report.page import render
from tests.report import synthetic, synthetic_circuits, synthetic_reading
from tests.report.circuit_pages import run_of


@contextmanager
def without_pixels() -> Iterator[None]:
    """Write figures as SVG alone: pictures of sixty take half of a rendering, and are looked at in `run`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "png", lambda svg: b"\x89PNG")
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a rendered run of 12 layers by 12 heads with every table."""
    folder = synthetic.write_run(tmp_path_factory.mktemp("report") / "run", synthetic.tables())
    render(folder)
    return folder


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a rendered run with hostile text in every string that a user, a document or a model can supply."""
    nasty = synthetic.HOSTILE[0]
    settings = synthetic.settings() | {"base": f"models/{nasty}", "note": synthetic.HOSTILE[2]}
    record = synthetic.manifest() | {
        "commands": [["mechscope", nasty]],
        "data": {nasty: {"problems": {nasty: 3}}},
        "models": {"base": {"source": nasty}},
        "page": {"title": f"What fine-tuning changed in {nasty}", "sections": list(synthetic.STUDY)},
    }
    made = synthetic.hostile(synthetic.tables(4, 4))
    folder = synthetic.write_run(tmp_path_factory.mktemp("report") / "hostile", made, study=settings, record=record)
    with without_pixels():
        render(folder)
    return folder


@pytest.fixture(scope="session")
def diff_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a rendered run that compares the circuits of two models."""
    with without_pixels():
        return run_of(tmp_path_factory.mktemp("circuits"), "circuit-diff", synthetic_circuits.diff_tables(4, 4))


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """Return every table of readings."""
    return synthetic_reading.all_tables()
