"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

# before transformers is imported anywhere: no test reaches a model hub
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of test data and models beside the project, or skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("../shared (test data and models) is not beside this checkout")
    return folder
