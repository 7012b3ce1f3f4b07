"""What a run was asked for, as one value that travels to the process of every job."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.shapes import SHAPES, Shape, Size

ROUNDS = 5
# who a job of our own is by, and what its cost is a multiple of
OWN, FORWARD = "mechscope", "forward passes"


class BenchmarkError(ValueError):
    """Something the user gave that cannot be measured, compared or written; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How jobs are measured.

    Attributes:
        shape_name: Which variant; a job has its texts by variant.
        shape: The model, sizes changed by the command line included.
        threads: Threads of a job's process.
        repeats: Timed rounds of every job; None: 5, fewer for slow jobs.
        alone: Run the job once with nothing beside it and no warm-up, for what takes long or fills the memory.
        in_use: Count memory that is in use only, not what the allocator keeps of freed arrays; slower.
        device: Torch device.
        texts: Texts of every job instead of its own number.
        tokens: Tokens of each text, likewise.
        probes: Random texts of the jobs about head roles, each with a control as long.
        components: Heads of the jobs about weights, such as `a0.h1,layers:2`, or `all`; None for the first four of layer 0.
        model: A model's folder for these, instead of random weights.
        data: Documents of the job `difference`; None for the generated newsroom.
        tokenizer: Folder of the tokenizer for these; None for the newsroom's.
        documents: How many.
        max_tokens: Longest document in tokens.
        tokens_per_batch: Tokens of a batch of documents.
    """

    shape_name: str = "small"
    shape: Shape = SHAPES["small"]
    threads: int = 2
    repeats: int | None = None
    alone: bool = False
    in_use: bool = False
    device: str = "cpu"
    texts: int | None = None
    tokens: int | None = None
    probes: int = 32
    components: str | None = None
    model: str | None = None
    data: str | None = None
    tokenizer: str | None = None
    documents: int = 32
    max_tokens: int = 512
    tokens_per_batch: int = 8192

    def size(self, own: Size) -> Size:
        """Return a job's amount of text, as the command line changed it."""
        return Size(self.texts or own.texts, self.tokens or own.tokens)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """Read plain values back."""
        return cls(**{**values, "shape": Shape(**values["shape"])})
