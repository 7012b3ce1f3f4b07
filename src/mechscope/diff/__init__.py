"""The difference between two models, measured over documents and in their weights."""

from mechscope.diff.accumulate import Accumulated
from mechscope.diff.difference import Difference, difference
from mechscope.diff.measure import Measured, measure
from mechscope.diff.patterns import attention_patterns
from mechscope.diff.weights import WeightDifference, compare_weights

__all__ = ["Accumulated", "Difference", "Measured", "WeightDifference", "attention_patterns", "compare_weights", "difference", "measure"]
