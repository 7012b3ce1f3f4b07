"""Do two models' circuits differ? Scores of edges, text by text, drawn with one circuit in both models or with another one after tuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float

from mechscope.circuits.change import overlap_table
from mechscope.circuits.graph import Graph
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.studies.calibration.truth import Truth
from mechscope.studies.paper_2505_17073.circuits import SIZE, circuit_changed
from mechscope.studies.paper_2505_17073.judgement import Scope

_GRAPH = Graph(4, 6)
_SMALL, _FULL = 40, 1000


@dataclass(frozen=True, kw_only=True)
class _World:
    """How the scores of two models come about.

    Attributes:
        texts: How many.
        shared: Share of the variance of noise that both models have in common on a text.
        louder: How many times larger tuned's scores are.
        noise: How large the noise of both is.
        noisier: How many times larger the noise of tuned alone is.
        moved: Share of the edges whose score tuning drew anew.
        heavy: Noise with the tails of Student's t with 3 degrees of freedom, texts of very different weight.
    """

    texts: int = 24
    shared: float = 0.0
    louder: float = 1.0
    noise: float = 1.0
    noisier: float = 1.0
    moved: float = 0.0
    heavy: bool = False


def _draw(seed: int, *, world: _World) -> str:
    random = np.random.default_rng(seed)
    edges = len(_GRAPH)
    before = random.standard_t(3, edges)
    after = np.where(random.random(edges) < world.moved, random.standard_t(3, edges), before)
    common, own, other = (_noise(random, (world.texts, edges), heavy=world.heavy) for _ in range(3))
    weight = np.exp(random.standard_normal((world.texts, 1))) if world.heavy else np.ones((world.texts, 1))
    alone = np.sqrt(1 - world.shared)
    base = weight * (before + world.noise * (np.sqrt(world.shared) * common + alone * own))
    tuned = world.louder * weight * (after + world.noise * (np.sqrt(world.shared) * common + world.noisier * alone * other))
    table = overlap_table(_scores(base), _scores(tuned), (SIZE,), exchanges=79, draws=2, seed=seed, prune=False)
    judgement = circuit_changed({"circuit_overlap": table}, Scope())
    assert judgement is not None
    return judgement.verdict


def _noise(random: np.random.Generator, shape: tuple[int, int], *, heavy: bool) -> Float[np.ndarray, "text edge"]:
    return random.standard_t(3, shape) if heavy else random.standard_normal(shape)


def _scores(per_text: Float[np.ndarray, "text edge"]) -> EdgeScores:
    return EdgeScores(_GRAPH, per_text.mean(0), per_text, "drawn", Cost(0, 0))


_NULLS = {
    "one circuit, independent noise": _World(),
    "one circuit, 8 texts": _World(texts=8),
    "one circuit, noise mostly of the text": _World(shared=0.8),
    "one circuit, heavy tails": _World(heavy=True, shared=0.5),
    "one circuit, tuned twice as large": _World(louder=2.0, shared=0.8),
    "one circuit, tuned three times as noisy": _World(noisier=3.0),
    "one circuit, tuned three times as large and a third as noisy": _World(louder=3.0, noise=3.0, noisier=1 / 3),
    "one circuit, tuned a third as large and three times as noisy": _World(louder=1 / 3, noisier=3.0),
}

TRUTHS: tuple[Truth, ...] = (
    *(
        Truth(
            claim="circuit_changed", world=words, kind="null", unit="text", wrong=("supported", "contradicted"), small=_SMALL, full=_FULL,
            draw=partial(_draw, world=world),
        )
        for words, world in _NULLS.items()
    ),
    *(
        Truth(
            claim="circuit_changed", world="share of the edges whose score tuning drew anew", kind="planted", unit="text", size=moved,
            right=("supported",), small=_SMALL // 2, full=_FULL // 4, draw=partial(_draw, world=_World(moved=moved, shared=0.8)),
        )
        for moved in (0.1, 0.2, 0.4)
    ),
)  # fmt: skip
