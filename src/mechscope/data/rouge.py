"""ROUGE: how much a written summary shares with a reference (Lin 2004), by Google's rouge-score.

F-measures with Porter stemming, per document, so that differences between models can be paired and bootstrapped. ROUGE-Lsum compares sentence
by sentence and needs sentences on lines: texts without line breaks are split after `.`, `!` or `?` before a capital, a digit or a
quotation mark, which needs no downloaded sentence model. rouge-score keeps only a–z and 0–9: it means nothing for other scripts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd
from rouge_score import rouge_scorer

from mechscope.errors import DataError

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z0-9])")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> pd.DataFrame:
    """Score summaries against references.

    Args:
        predictions: the written summaries; an empty one scores 0.
        references: the reference summaries, in the same order.

    Returns:
        One row per document: rouge1, rouge2, rougeL and rougeLsum as F-measures from 0 to 1.

    Raises:
        DataError: the two have different lengths.
    """
    if len(predictions) != len(references):
        raise DataError(f"ROUGE compares summaries in pairs, but there are {len(predictions)} predictions and {len(references)} references")
    scorer = rouge_scorer.RougeScorer(list(METRICS), use_stemmer=True)
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score(_lines(reference), _lines(prediction))
        rows.append([scores[metric].fmeasure for metric in METRICS])
    return pd.DataFrame(rows, columns=list(METRICS), dtype=float)


def _lines(text: str) -> str:
    return text if "\n" in text.strip() else SENTENCE_END.sub("\n", text)
