"""How work is run: tokens of a batch, seed, and progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mechscope.errors import SettingsError

# called with a label, how much is done and how much there is
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Execution:
    """How work is run, not what is computed: the last keyword of every function that runs a model over texts or takes long.

    Attributes:
        tokens_per_batch: Most tokens of a batch, padding included; decides the memory. None: what suits the technique.
        seed: Of all that is drawn: noise, order, controls, resampling.
        progress: Called with a label, how much is done and how much there is; None for nobody.
    """

    tokens_per_batch: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Refuse empty batches; `SettingsError` where `tokens_per_batch` is below one."""
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise SettingsError(f"tokens_per_batch is {self.tokens_per_batch}: at least 1 is needed")

    def tokens(self, default: int) -> int:
        """Return the most tokens of a batch, or a technique's own number where none was given."""
        return default if self.tokens_per_batch is None else self.tokens_per_batch

    def told(self, label: str, done: int, total: int) -> None:
        """Report how far work is, if `progress` is given."""
        if self.progress is not None:
            self.progress(label, done, total)
