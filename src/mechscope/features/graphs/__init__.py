"""Attribution graphs: what latents of transcoders add to one another and to the logits in one prompt."""

from mechscope.features.graphs.frozen import FrozenRun
from mechscope.features.graphs.graph import AttributionGraph, attribution_graph, sums
from mechscope.features.graphs.influence import Pruned, Scores, pruned, scores
from mechscope.features.graphs.replacement import Replacement, shuffled

__all__ = [
    "AttributionGraph",
    "FrozenRun",
    "Pruned",
    "Replacement",
    "Scores",
    "attribution_graph",
    "pruned",
    "scores",
    "shuffled",
    "sums",
]
