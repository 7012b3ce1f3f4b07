"""The contract of what latents stand for."""

from __future__ import annotations

import torch

from mechscope import features
from mechscope.data.labels import Labelled
from mechscope.data.pairs import Pairs
from mechscope.features import ConceptSettings, Dictionary, Rule
from mechscope.instrument import Execution
from tests import families
from tests.contract.technique import Case, Result, Technique, columns


def concepts(case: Case, execution: Execution) -> Result:
    """Score what the latents of an autoencoder stand for; texts are taken several times over, as probes need many."""
    layout = features.autoencoder("resid1", families.WIDTH, 50, Rule("topk", 6))
    given = Dictionary.plain(layout, layout.tensors(seed=1, dtype=torch.float64))
    pairs = case.pairs.pairs * 16
    odd = tuple("odd" if pair.clean[1] % 2 else "even" for pair in pairs)
    large = tuple(tuple(at for at, token in enumerate(pair.clean) if token % 3 == 0) for pair in pairs)
    labelled = Labelled(Pairs(pairs, case.pairs.source), {"odd": odd}, {"large": large})
    found = features.concept_scores(
        case.subject, {"": given}, labelled, settings=ConceptSettings(judged_share=0.5, tokens_held=400), execution=execution
    )
    return columns(found[""])


TECHNIQUES: dict[str, Technique] = {"concepts": concepts}
