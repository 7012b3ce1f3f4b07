"""Interventions: what matters, shown by changing it."""

from mechscope.causal.ablation import ablate, ablate_together, random_like
from mechscope.causal.attribution import attribute
from mechscope.causal.cross import cross_patch, swapped
from mechscope.causal.effects import Effects
from mechscope.causal.knockout import knock_out
from mechscope.causal.patching import patch
from mechscope.causal.paths import patch_paths
from mechscope.causal.places import Place, places
from mechscope.causal.sources import Mean, Resample, Source, Text, Vector, mean_of
from mechscope.causal.tracing import trace

__all__ = [
    "Effects",
    "Mean",
    "Place",
    "Resample",
    "Source",
    "Text",
    "Vector",
    "ablate",
    "ablate_together",
    "attribute",
    "cross_patch",
    "knock_out",
    "mean_of",
    "patch",
    "patch_paths",
    "places",
    "random_like",
    "swapped",
    "trace",
]
