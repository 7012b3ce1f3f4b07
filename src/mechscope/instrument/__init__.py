"""One forward pass, observed: attention, recording, walking block by block, and the checks that it is right."""

from mechscope.instrument.attention import AttentionCall, observed
from mechscope.instrument.patterns import PatternComparison, PatternStatistics, compare, describe, pattern
from mechscope.instrument.record import Recording, record
from mechscope.instrument.trust import Check, check_subject, load, load_pair
from mechscope.instrument.walk import Walk, model_inputs, unembed

__all__ = [
    "AttentionCall",
    "Check",
    "PatternComparison",
    "PatternStatistics",
    "Recording",
    "Walk",
    "check_subject",
    "compare",
    "describe",
    "load",
    "load_pair",
    "model_inputs",
    "observed",
    "pattern",
    "record",
    "unembed",
]
