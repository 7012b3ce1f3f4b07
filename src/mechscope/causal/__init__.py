"""Interventions: what matters, shown by changing it."""

from mechscope.causal.ablation import ablate, ablate_together, random_like
from mechscope.causal.alignment import Alignment
from mechscope.causal.attribution import attribution_patch
from mechscope.causal.counterfactuals import CounterfactualRun, run_counterfactuals
from mechscope.causal.cross import cross_patch, swapped
from mechscope.causal.das import das, random_alignment, train_das
from mechscope.causal.effects import Effects
from mechscope.causal.knockout import attention_flow, attention_knockout
from mechscope.causal.patching import patch
from mechscope.causal.paths import path_patch
from mechscope.causal.places import Place, places
from mechscope.causal.scrubbing import Hypothesis, Scrubbed, scrub
from mechscope.causal.sources import Mean, Resample, Source, Text, Vector, mean_of
from mechscope.causal.steering import Direction, difference_of_means, remove, steer, sweep_strength
from mechscope.causal.tracing import causal_trace

__all__ = [
    "Alignment",
    "CounterfactualRun",
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
    "ablate",
    "ablate_together",
    "attention_flow",
    "attention_knockout",
    "attribution_patch",
    "causal_trace",
    "cross_patch",
    "das",
    "difference_of_means",
    "mean_of",
    "patch",
    "path_patch",
    "places",
    "random_alignment",
    "random_like",
    "remove",
    "run_counterfactuals",
    "scrub",
    "steer",
    "swapped",
    "sweep_strength",
    "train_das",
]
