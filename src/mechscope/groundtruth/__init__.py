"""Ground truth: small GPT-2s whose circuit is written into their weights, to judge methods of circuit discovery by."""

from mechscope.groundtruth.program import Head, Mlp, Program
from mechscope.groundtruth.programs import PROGRAMS, GroundTruth, ground_truth

__all__ = ["PROGRAMS", "GroundTruth", "Head", "Mlp", "Program", "ground_truth"]
