"""One forward pass, observed or changed: attention, recording, edits, walking block by block, rerunning, and the checks that it is right."""

from mechscope.instrument.attention import AttentionCall, AttentionInputs, attend, observed
from mechscope.instrument.edits import Change, Edit, Knockout
from mechscope.instrument.execution import Execution, Progress
from mechscope.instrument.gradients import Gradients, gradients
from mechscope.instrument.intervene import intervene
from mechscope.instrument.patterns import PatternComparison, PatternStatistics, compare, describe, pattern
from mechscope.instrument.record import Recording, record
from mechscope.instrument.rerun import CachedRun, Reading
from mechscope.instrument.trust import Check, check_subject, load, load_pair
from mechscope.instrument.walk import Walk, model_inputs, unembed

__all__ = [
    "AttentionCall",
    "AttentionInputs",
    "CachedRun",
    "Change",
    "Check",
    "Edit",
    "Execution",
    "Gradients",
    "Knockout",
    "PatternComparison",
    "PatternStatistics",
    "Progress",
    "Reading",
    "Recording",
    "Walk",
    "attend",
    "check_subject",
    "compare",
    "describe",
    "gradients",
    "intervene",
    "load",
    "load_pair",
    "model_inputs",
    "observed",
    "pattern",
    "record",
    "unembed",
]
