"""Do two models' circuits differ? Scores of edges, text by text, drawn with one circuit in both models or with another one after tuning; and real ones.

Most worlds are drawn. The real ones are scores of the embedded newsroom model, of two samples of texts or beside a copy with noisy weights, pruned as the
product prunes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

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
# prompt pairs of the real model; two halves of them are compared
_PAIRS = 48


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
        prune: Whether circuits lose their dead ends, as they do by default.
        heavy: Noise with the tails of Student's t with 3 degrees of freedom, texts of very different weight.
    """

    texts: int = 24
    shared: float = 0.0
    louder: float = 1.0
    noise: float = 1.0
    noisier: float = 1.0
    moved: float = 0.0
    prune: bool = False
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
    return _judged(_scores(base), _scores(tuned), seed=seed, prune=world.prune)


def _judged(base: EdgeScores, tuned: EdgeScores, *, seed: int, prune: bool) -> str:
    table = overlap_table(base, tuned, (SIZE,), exchanges=79, draws=2, seed=seed, prune=prune)
    judgement = circuit_changed({"circuit_overlap": table}, Scope())
    assert judgement is not None
    return judgement.verdict


@cache
def _measured(noise: float) -> EdgeScores:
    """Return scores of the newsroom model's edges on prompt pairs, or of a copy with noise of a share of every parameter's norm."""
    from mechscope.circuits.attribution import attribute_edges
    from mechscope.data.newsroom import newsroom_model_path
    from mechscope.data.newsroom_pairs import newsroom_pairs
    from mechscope.instrument import load
    from mechscope.studies.calibration.trainings import with_noise

    base = load(newsroom_model_path(), device="cpu", check=False)
    model = with_noise(base, noise, 0).tuned if noise else base
    return attribute_edges(model, newsroom_pairs(_PAIRS, role="what"), method="eap")


def _texts_twice(seed: int) -> str:
    """Judge one model's circuits on two halves of its texts, as if the second were another model's on the texts of the first."""
    scores = _measured(0.0)
    assert scores.per_text is not None
    one, other = np.split(np.random.default_rng(seed).permutation(len(scores.per_text)), 2)
    return _judged(*(_of(scores, scores.per_text[texts]) for texts in (one, other)), seed=seed, prune=True)


def _noisy(seed: int, *, noise: float, exchanged: bool) -> str:
    """Judge the model beside its noisy copy on half of the texts; exchanged, by lot text by text, they are two models alike."""
    random = np.random.default_rng(seed)
    models = _measured(0.0), _measured(noise)
    texts = random.permutation(_PAIRS)[: _PAIRS // 2]
    first, second = (scores.per_text[texts] for scores in models if scores.per_text is not None)
    lot = random.random((len(texts), 1)) < (0.5 if exchanged else 0.0)
    both = np.where(lot, second, first), np.where(lot, first, second)
    return _judged(*(_of(scores, own) for scores, own in zip(models, both, strict=True)), seed=seed, prune=True)


def _of(scores: EdgeScores, per_text: Float[np.ndarray, "text edge"]) -> EdgeScores:
    return replace(scores, per_text=per_text, mean=per_text.mean(0))


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

_PRUNED = {
    "one circuit, pruned": _World(prune=True),
    "one circuit, pruned, noise mostly of the text": _World(shared=0.8, prune=True),
    "one circuit, pruned, heavy tails": _World(heavy=True, shared=0.5, prune=True),
    "one circuit, pruned, tuned three times as large and a third as noisy": _World(louder=3.0, noise=3.0, noisier=1 / 3, prune=True),
}
_REAL: dict[str, Callable[[int], str]] = {
    "newsroom model on two samples of texts (real scores)": _texts_twice,
    "newsroom model and one with 20 % noise, exchanged by lot in every text (real scores)": partial(_noisy, noise=0.2, exchanged=True),
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
            claim="circuit_changed", world=words, kind="null", unit="text", wrong=("supported", "contradicted"), small=_SMALL // 2,
            full=_FULL // 4, draw=partial(_draw, world=world),
        )
        for words, world in _PRUNED.items()
    ),
    *(
        Truth(
            claim="circuit_changed", world=words, kind="null", unit="text", wrong=("supported", "contradicted"), small=_SMALL // 4,
            full=_FULL // 5, draw=draw,
        )
        for words, draw in _REAL.items()
    ),
    *(
        Truth(
            claim="circuit_changed", world="newsroom model and one with so much noise in every matrix (real scores)", kind="planted",
            unit="text", size=noise, right=("supported",), small=_SMALL // 4, full=_FULL // 10, draw=partial(_noisy, noise=noise, exchanged=False),
        )
        for noise in (0.05, 0.2)
    ),
    *(
        Truth(
            claim="circuit_changed", world="pruned; share of the edges whose score tuning drew anew", kind="planted", unit="text",
            size=moved, right=("supported",), small=_SMALL // 4, full=_FULL // 10,
            draw=partial(_draw, world=_World(moved=moved, shared=0.8, prune=True)),
        )
        for moved in (0.1, 0.2)
    ),
    *(
        Truth(
            claim="circuit_changed", world="share of the edges whose score tuning drew anew", kind="planted", unit="text", size=moved,
            right=("supported",), small=_SMALL // 2, full=_FULL // 4, draw=partial(_draw, world=_World(moved=moved, shared=0.8)),
        )
        for moved in (0.1, 0.2, 0.4)
    ),
)  # fmt: skip
