"""Comparing two models by dictionaries: what fine-tuning added, beside controls of the same budget, and what of it matters."""

from mechscope.features.diffing.by_chance import nearest_by_chance
from mechscope.features.diffing.carried import Carried, Contribution, LatentSet, alike, carried, contributed
from mechscope.features.diffing.classes import BY_NORM, JUDGED, classified, found_again
from mechscope.features.diffing.comparisons import CROSSCODER, Comparison, Judged, comparisons, judge
from mechscope.features.diffing.planted import Plant
from mechscope.features.diffing.scaling import Decoders, ScalingSums, latent_scaling, scaled_latents, scaling_sums
from mechscope.features.diffing.views import DIFFERENCE, Recipe, Views, model_places, require_change
from mechscope.settings.diffing import ExclusiveSettings, PlantSettings

__all__ = [
    "BY_NORM",
    "CROSSCODER",
    "DIFFERENCE",
    "JUDGED",
    "Carried",
    "Comparison",
    "Contribution",
    "Decoders",
    "ExclusiveSettings",
    "Judged",
    "LatentSet",
    "Plant",
    "PlantSettings",
    "Recipe",
    "ScalingSums",
    "Views",
    "alike",
    "carried",
    "classified",
    "comparisons",
    "contributed",
    "found_again",
    "judge",
    "latent_scaling",
    "model_places",
    "nearest_by_chance",
    "require_change",
    "scaled_latents",
    "scaling_sums",
]
