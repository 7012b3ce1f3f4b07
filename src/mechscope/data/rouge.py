"""ROUGE: how much a written summary shares with a reference (Lin 2004), by Google's rouge-score.

F-measures with Porter stemming, per document, so that differences between models can be paired and bootstrapped. ROUGE-Lsum compares sentence
by sentence and needs sentences on lines: texts without line breaks are split after `.`, `!` or `?` before a capital, a digit or a
quotation mark, which needs no downloaded sentence model.

rouge-score's own tokenizer keeps a–z and 0–9 alone, as published English scores do: a German ü ends a word, and of a Thai text nothing is left. So where
references are not English by their letters, `UnicodeTokenizer` is used; which one it was stands in the column `tokenizer`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import pandas as pd
from rouge_score import rouge_scorer
from rouge_score.tokenizers import Tokenizer

from mechscope.errors import DataError

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z0-9])")

# share of letters beyond a–z from which references count as not English: borrowed words and names of English news stay below, German is at 2 %
FOREIGN = 0.005
# scripts that put no space between words, by how Unicode names their letters: every letter counts as a word
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


class UnicodeTokenizer(Tokenizer):
    """Words of any script: runs of letters, marks and digits, lower case, in Unicode's composed form (NFKC); no stemming.

    Where a script puts no space between words, every letter with its marks is a word, as is usual for Chinese.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        words: list[str] = []
        inside = False
        for letter in unicodedata.normalize("NFKC", text).lower():
            kind = unicodedata.category(letter)[0]
            if kind == "M" and words:
                words[-1] += letter
            elif kind == "L" and unicodedata.name(letter, "").startswith(_UNSPACED):
                words.append(letter)
                inside = False
            elif kind in "LN":
                if inside:
                    words[-1] += letter
                else:
                    words.append(letter)
                inside = True
            else:
                inside = False
        return words


def is_foreign(texts: Sequence[str]) -> bool:
    """Tell whether texts are not English by their letters: more than 0.5 % of them lie beyond a–z."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return bool(letters) and sum(not letter.isascii() for letter in letters) > FOREIGN * len(letters)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> pd.DataFrame:
    """Score summaries against references.

    Args:
        predictions: the written summaries; an empty one scores 0.
        references: the reference summaries, in the same order.

    Returns:
        One row per document: rouge1, rouge2, rougeL and rougeLsum as F-measures from 0 to 1, and `tokenizer`: "english" (rouge-score's own, with Porter
        stemming) or "unicode", chosen for all documents by the references.

    Raises:
        DataError: the two have different lengths.
    """
    if len(predictions) != len(references):
        raise DataError(f"ROUGE compares summaries in pairs, but there are {len(predictions)} predictions and {len(references)} references")
    tokenizer = UnicodeTokenizer() if is_foreign(references) else None
    scorer = rouge_scorer.RougeScorer(list(METRICS), use_stemmer=True, tokenizer=tokenizer)
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score(_lines(reference), _lines(prediction))
        rows.append([scores[metric].fmeasure for metric in METRICS])
    table = pd.DataFrame(rows, columns=list(METRICS), dtype=float)
    return table.assign(tokenizer="english" if tokenizer is None else "unicode")


def _lines(text: str) -> str:
    return text if "\n" in text.strip() else SENTENCE_END.sub("\n", text)
