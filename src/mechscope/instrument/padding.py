"""Where a batch's padding stands, read once.

Whether a fused kernel may be used, and how far each text must be turned to begin at the first token, depends on the padding alone. Reading that
from a device for every layer would make the host wait for all work queued there, so it is read once per batch and copied once per device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechscope.subject.placement import sent


@dataclass(frozen=True)
class Padding:
    """A batch's real tokens.

    Attributes:
        real: ``(batch, token)``, True where a token is real.
        contiguous: Whether each text's real tokens stand side by side.
        shift: ``(batch, 1)``: index of each text's first real token; None where every text starts with one.
    """

    real: Bool[Tensor, "batch token"]
    contiguous: bool
    shift: Int[Tensor, "batch 1"] | None
    _elsewhere: dict[torch.device, Padding] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, real: Bool[Tensor, "batch token"] | Padding) -> Padding:
        """Look at a mask; this waits for the device that holds it."""
        if isinstance(real, Padding):
            return real
        starts = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
        contiguous, from_first = torch.stack([(starts == 1).all(), real[:, 0].all()]).tolist()
        return cls(real, contiguous, None if from_first else real.to(torch.uint8).argmax(dim=1, keepdim=True))

    def on(self, device: torch.device) -> Padding:
        """Return the same on a device, copied there once."""
        if device == self.real.device:
            return self
        if device not in self._elsewhere:
            shift = None if self.shift is None else sent(self.shift, device)
            self._elsewhere[device] = Padding(sent(self.real, device), self.contiguous, shift)
        return self._elsewhere[device]

    def there(self, x: Tensor) -> Tensor:
        """Turn ``(batch, head, query, …)`` so that real tokens come first, where padding behind them is invisible to a causal pattern."""
        return x if self.shift is None else _rolled(x, self.shift)

    def back(self, x: Tensor) -> Tensor:
        """Undo `there`."""
        return x if self.shift is None else _rolled(x, -self.shift)


def _rolled(x: Tensor, shift: Tensor) -> Tensor:
    length = x.shape[2]
    index = (torch.arange(length, device=x.device) + shift) % length
    index = index[:, None].reshape(x.shape[0], 1, length, *(1 for _ in x.shape[3:]))
    return torch.take_along_dim(x, index, dim=2)
