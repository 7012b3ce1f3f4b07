"""Attribution graphs of a prompt: all edges into 2,000 active latents and the ten likeliest next tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.harness import Job
from benchmarks.jobs.cases import PairsCase, build, forward
from benchmarks.settings import Settings
from benchmarks.shapes import Size
from benchmarks.transcoders import FIRST, make_transcoders
from mechscope.features import AttributionGraph, Dictionary, Rule, attribution_graph, transcoder
from mechscope.settings.graph import GraphSettings


@dataclass(frozen=True, eq=False)
class GraphCase(PairsCase):
    """A model, a prompt, and a transcoder for every layer.

    Attributes:
        dictionaries: The transcoders, by layer.
    """

    dictionaries: tuple[Dictionary, ...] = ()

    def small(self) -> GraphCase:
        """Return a prompt of eight tokens, whose latents are fewer."""
        pairs = super().small().pairs
        return replace(self, pairs=pairs.first(1))


def build_graph(settings: Settings, size: Size) -> GraphCase:
    """Make the model, a prompt and the transcoders."""
    case = build(settings, size)
    made = []
    for layer, tensors in enumerate(make_transcoders(case.subject.plain, case.ids)):
        latents, width = tensors["encoder"].shape
        layout = transcoder(layer, width, latents, Rule("jumprelu"))
        named = {"encoder.0": tensors["encoder"], "decoder.0": tensors["decoder"]}
        made.append(Dictionary.plain(layout, {**named, **{name: tensors[name] for name in ("encoder_bias", "decoder_bias", "threshold")}}))
    return GraphCase(case.subject, case.pairs, dictionaries=tuple(made))


@torch.no_grad()
def graph(case: GraphCase) -> AttributionGraph:
    """Make the graph, with an edge into every active latent."""
    given = {f"m{layer}": dictionary for layer, dictionary in enumerate(case.dictionaries)}
    return attribution_graph(case.subject, given, case.ids[0].tolist(), settings=GraphSettings(probability=1.0, latents=10**9, first=FIRST))


def numbers(made: AttributionGraph) -> np.ndarray:
    """Return what latents and errors add to logits, and the sums of |edges| from latents and errors of every latent; layers and tokens in order."""
    sources = np.concatenate([made.where("latent"), made.where("error")])
    logits = made.edges[made.where("logit")][:, sources].toarray()
    sizes = np.asarray(abs(made.edges[made.where("latent")][:, sources]).sum(axis=1))
    return np.concatenate([logits.ravel(), sizes.ravel()])


JOBS = (
    Job(
        name="attribution_graph",
        what="attribution graph of 64 tokens, edges into 2,000 active latents",
        build=build_graph,
        run=graph,
        sizes={"small": Size(1, 64)},
        forward=forward,
        numbers=numbers,
        rounds=3,
        slow=True,
        seconds=120,
    ),
)
