"""How summaries are written, and on how many documents they are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mechscope.settings import Count, Number, Settings, setting


@dataclass(frozen=True, kw_only=True)
class Decoding(Settings):
    """How a summary is written: by beams or greedily, never by sampling."""

    panel: ClassVar[str] = "Decoding"

    beams: Number = setting(1, "Beams of the search; 1 is greedy (the paper: 2).")
    no_repeat_ngram: Count = setting(0, "Length of n-grams that may not repeat, those of the prompt included; 0 allows all (the paper: 2).")
    max_new_tokens: Number = setting(150, "Longest summary, in tokens.")


@dataclass(frozen=True, kw_only=True)
class Scoring(Settings):
    """Which held-out documents are summarized and scored."""

    panel: ClassVar[str] = "Decoding"

    rouge_documents: Number = setting(100, "Held-out documents that are summarized and scored.")
