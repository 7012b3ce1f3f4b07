"""The difference between two models, measured over documents and in their weights."""

from mechscope.difference.accumulate import Accumulated
from mechscope.difference.lockstep import Measured, measure
from mechscope.difference.one_pass import Difference, difference, differences
from mechscope.difference.patterns import attention_patterns
from mechscope.difference.smallest import SmallestEffects, smallest_effects
from mechscope.difference.weights import WeightDifference, compare_weights

__all__ = [
    "Accumulated",
    "Difference",
    "Measured",
    "SmallestEffects",
    "WeightDifference",
    "attention_patterns",
    "compare_weights",
    "difference",
    "differences",
    "measure",
    "smallest_effects",
]
