"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

# before transformers is imported anywhere: no test reaches a model hub
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# families whose blocks differ most from each other: grouped queries, rotary parts of a head, parallel blocks, norms behind and soft caps, norms of queries
CORE = ("gpt2", "llama", "gpt_neox", "gemma2", "qwen3")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the other families to slow runs, but where it is shown that they are read and run aright."""
    from tests.families import FAMILIES

    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec") or item.path.parent.name in ("subject", "instrument"):
            continue
        if any(value in FAMILIES and value not in CORE for value in item.callspec.params.values() if isinstance(value, str)):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of test data and models beside the project, or skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("../shared (test data and models) is not beside this checkout")
    return folder
