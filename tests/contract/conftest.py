"""Order of the contract's tests: all claims of a technique one after the other, as they share its results."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the contract's tests into the order of the techniques, within the places that they have."""
    places = [place for place, item in enumerate(items) if FOLDER in item.path.parents]
    ordered = sorted((items[place] for place in places), key=_technique)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _technique(item: pytest.Item) -> str:
    return item.callspec.params.get("name", "") if hasattr(item, "callspec") else ""


@pytest.fixture(scope="package", autouse=True)
def _little_to_collect() -> Iterator[None]:
    """Set aside what is imported: each time that memory runs out all objects are looked through, and hundreds of tests let it run out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
