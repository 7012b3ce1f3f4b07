"""What a module gives: most give a tensor, others a tuple or list that begins with one (attention with its maps, experts with their router's scores)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def tensor_of(output: Any) -> Tensor:
    """Return the tensor."""
    return output[0] if isinstance(output, tuple | list) else output


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """Return the same output with another tensor."""
    return type(output)((tensor, *output[1:])) if isinstance(output, tuple | list) else tensor
