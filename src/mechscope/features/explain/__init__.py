"""What units stand for, in words, and how well the words tell where they are active: latents, neurons, heads."""

from mechscope.features.explain.backends import Endpoint, EndpointError, LocalModel
from mechscope.features.explain.baseline import Baseline
from mechscope.features.explain.chat import Chat
from mechscope.features.explain.evidence import Evidence, Exchange, Explainer, Explanation, Window, gather, halves
from mechscope.features.explain.explaining import Explained, explain, kind_of, scorers_of
from mechscope.features.explain.scoring import CHANCE, Score, score

__all__ = [
    "CHANCE",
    "Baseline",
    "Chat",
    "Endpoint",
    "EndpointError",
    "Evidence",
    "Exchange",
    "Explained",
    "Explainer",
    "Explanation",
    "LocalModel",
    "Score",
    "Window",
    "explain",
    "gather",
    "halves",
    "kind_of",
    "score",
    "scorers_of",
]
