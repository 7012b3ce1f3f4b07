"""Every test here runs twice: on a pretended device in the ordinary suite, and on CUDA where it is marked `gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.pretend import pretended


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: Any) -> Iterator[torch.device]:
    """Return a device to compare with the CPU."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("this machine has no CUDA device")
        # TF32 keeps ten bits of a factor: what is compared here is float32
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        yield torch.device("cuda:0")
        torch.backends.cuda.matmul.allow_tf32 = before
    else:
        with pretended():
            yield torch.device("cuda:0")
