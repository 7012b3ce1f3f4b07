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

_SETTINGS = ConceptSettings(judged_share=0.5, tokens_held=400)


def _given(place: str) -> Dictionary:
    layout = features.autoencoder(place, families.WIDTH, 50, Rule("topk", 6))
    return Dictionary.plain(layout, layout.tensors(seed=1, dtype=torch.float64))


def _labelled(case: Case) -> Labelled:
    """Return the texts several times over, as probes need many."""
    pairs = case.pairs.pairs * 16
    odd = tuple("odd" if pair.clean[1] % 2 else "even" for pair in pairs)
    large = tuple(tuple(at for at, token in enumerate(pair.clean) if token % 3 == 0) for pair in pairs)
    return Labelled(Pairs(pairs, case.pairs.source), {"odd": odd}, {"large": large})


def concepts(case: Case, execution: Execution) -> Result:
    """Score what the latents of an autoencoder stand for."""
    found = features.concept_scores(case.subject, {"": _given("resid1")}, _labelled(case), settings=_SETTINGS, execution=execution)
    return columns(found[""])


def concepts_of_sets(case: Case, execution: Execution) -> Result:
    """Score those of autoencoders of two places, read together."""
    sets = {place: {"": _given(place)} for place in ("resid0", "resid1")}
    found = features.concept_scores_of_sets(case.subject, sets, _labelled(case), settings=_SETTINGS, execution=execution)
    return {f"{place} {name}": value for place in sets for name, value in columns(found[place][""]).items()}


TECHNIQUES: dict[str, Technique] = {"concepts": concepts, "concepts_of_sets": concepts_of_sets}
