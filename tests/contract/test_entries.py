"""Every public function that runs a model over texts stands in an entry, and what is said of entries is said of some that exist."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract import exceptions
from tests.contract.technique import techniques

PACKAGES = ("causal", "circuits", "lens", "heads", "weights", "features", "probing", "edit", "difference", "adapt", "universality")
ENTRIES = Path(__file__).parent / "entries"


def public(package: str) -> Iterator[str]:
    """Yield the functions of a package whose work is told how it is run."""
    module = importlib.import_module(f"mechscope.{package}")
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing) and "execution" in inspect.signature(thing).parameters:
            yield name


def called() -> set[str]:
    """Return the names that entries use."""
    nodes = [node for path in ENTRIES.glob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_technique_has_an_entry(package: str) -> None:
    missing = set(public(package)) - called() - exceptions.ELSEWHERE.keys()
    assert not missing, f"write entries for {', '.join(sorted(missing))} in tests/contract/entries/"


def test_exceptions_are_of_techniques_that_exist() -> None:
    named = {*exceptions.WITHOUT_BATCHES, *exceptions.OF_BATCHES, *exceptions.NOT_HALVED, *exceptions.EVALUATED}
    named |= {name for _, name in exceptions.NOT_RUN}
    assert named <= techniques().keys()
    assert set(exceptions.ELSEWHERE) <= {name for package in PACKAGES for name in public(package)}
