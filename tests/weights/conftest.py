"""One family for each kind of MLP, norm and block."""

from __future__ import annotations

import pytest

from tests.weights.named import KINDS


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
