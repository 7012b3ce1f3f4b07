"""How attribution graphs are made and pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mechscope.settings import Count, Number, Settings, Share, setting


@dataclass(frozen=True, kw_only=True)
class GraphSettings(Settings):
    """Which logits are explained, by how many latents."""

    panel: ClassVar[str] = "Graph"

    logits: Number = setting(10, "Likeliest next tokens that are explained, at most.")
    probability: Share = setting(0.95, "Probability that they have together, if so many are enough.")
    latents: Number = setting(
        4096, "Active latents of the prompt that get edges into them, at most; those that matter most to the logits come first."
    )
    first: Count = setting(
        1, "Tokens at the beginning at which MLPs count as constants, because dictionaries are not trained on them: an attention sink."
    )


@dataclass(frozen=True, kw_only=True)
class PruningSettings(Settings):
    """What is left of a graph."""

    panel: ClassVar[str] = "Graph"

    node_share: Share = setting(0.8, "Share of the nodes' influence that is kept.")
    edge_share: Share = setting(0.98, "Share of the edges' influence that is kept.")
