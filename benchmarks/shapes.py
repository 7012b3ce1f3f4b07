"""The sizes of the models and texts that everything is measured on: GPT-2 small, and its variant with room for 4,096 tokens."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_WIDTH = 64


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    Attributes:
        layers: Blocks.
        heads: Heads in each, 64 wide.
        vocabulary: Words.
        positions: Longest text, in tokens.
    """

    layers: int = 12
    heads: int = 12
    vocabulary: int = 50257
    positions: int = 1024

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return HEAD_WIDTH * self.heads

    def __str__(self) -> str:
        return f"{self.layers} layers × {self.heads} heads × {self.width}, {self.vocabulary:,} words, {self.positions:,} positions"


SHAPES = {"small": Shape(), "long": Shape(positions=4096)}


@dataclass(frozen=True)
class Size:
    """How much text a job reads.

    Attributes:
        texts: How many.
        tokens: Of each.
    """

    texts: int
    tokens: int
