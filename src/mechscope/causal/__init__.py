"""Interventions: what matters, shown by changing it."""

from mechscope.causal.ablation import ablate, ablate_together, random_like
from mechscope.causal.attribution import attribute
from mechscope.causal.cross import cross_patch, swapped
from mechscope.causal.das import Alignment, das, random_alignment, train_das
from mechscope.causal.effects import Effects
from mechscope.causal.knockout import flow, knock_out
from mechscope.causal.patching import patch
from mechscope.causal.paths import patch_paths
from mechscope.causal.places import Place, places
from mechscope.causal.scrubbing import Hypothesis, Scrubbed, scrub
from mechscope.causal.sources import Mean, Resample, Source, Text, Vector, mean_of
from mechscope.causal.steering import Direction, difference_of_means, remove, steer, sweep_strength
from mechscope.causal.tracing import trace
from mechscope.causal.worlds import World, run_worlds

__all__ = [
    "Alignment",
    "Direction",
    "Effects",
    "Hypothesis",
    "Mean",
    "Place",
    "Resample",
    "Scrubbed",
    "Source",
    "Text",
    "Vector",
    "World",
    "ablate",
    "ablate_together",
    "attribute",
    "cross_patch",
    "das",
    "difference_of_means",
    "flow",
    "knock_out",
    "mean_of",
    "patch",
    "patch_paths",
    "places",
    "random_alignment",
    "random_like",
    "remove",
    "run_worlds",
    "scrub",
    "steer",
    "swapped",
    "sweep_strength",
    "trace",
    "train_das",
]
