"""Columns of numbers and tokens as a page can hold many of them: base64 of small unsigned integers, and every token once.

A lens grid of 1,024 positions by 49 rows by two models has a hundred thousand cells of fourteen numbers. Written as text they would weigh some
80 bytes a cell; packed they weigh 38. Measures are coded as ``value = largest · (code / 65534)^4``, which keeps three digits from the largest
value down to its millionth part; `MISSING` is no number. Bytes are little-endian, as every machine that opens a page has them.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.theme import name_of

MISSING = 65535
"""Code of what is no number."""
POWER = 4
"""Exponent of the code: the higher, the finer near zero and the coarser near the largest value."""

# No token comes near this, in characters; only broken or hostile ones exceed it.
_LONGEST_TOKEN = 60
_VISIBLE = {"\n": "↵", "\r": "↵", "\t": "⇥", "\u2028": "↵", "\u2029": "↵", "\u00a0": " "}


def packed(values: np.ndarray) -> dict[str, Any]:
    """Code non-negative numbers in two bytes each.

    Args:
        values: Numbers of any shape, flattened row by row; negative ones, which only rounding makes, count as zero.

    Returns:
        `max`, the largest value, and `data`, the codes in base64.
    """
    flat = np.clip(np.asarray(values, dtype=np.float64).ravel(), 0.0, None)
    finite = np.isfinite(flat)
    largest = float(f"{flat[finite].max():.6g}") if finite.any() else 0.0
    codes = np.full(flat.shape, MISSING, dtype="<u2")
    share = np.clip(flat[finite] / largest, 0.0, 1.0) if largest > 0 else np.zeros(int(finite.sum()))
    codes[finite] = np.round((MISSING - 1) * share ** (1 / POWER))
    return {"max": largest, "data": _base64(codes)}


def whole(values: np.ndarray) -> dict[str, Any]:
    """Code whole numbers from zero on in as few of 1, 2 or 4 bytes as hold them.

    Args:
        values: Whole numbers of any shape, flattened row by row; what is not finite or below zero counts as zero.

    Returns:
        `bytes` per number, and `data`, the numbers in base64.
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    counts = np.clip(np.where(np.isfinite(flat), flat, 0.0), 0.0, 2.0**32 - 1)
    most = counts.max() if len(counts) else 0.0
    width = 1 if most < 2**8 else 2 if most < 2**16 else 4
    return {"bytes": width, "data": _base64(counts.astype(f"<u{width}"))}


class Tokens:
    """The texts of tokens that a panel holds, each once, by number; number 0 is the empty text."""

    def __init__(self) -> None:
        """Begin with the empty text."""
        self._places: dict[str, int] = {"": 0}

    def add(self, texts: pd.Series | np.ndarray) -> np.ndarray:
        """Return the number of every text; what is missing is the empty text."""
        codes, distinct = pd.factorize(np.asarray(texts, dtype=object).ravel(), use_na_sentinel=True)
        places = np.array([self._places.setdefault(shown(text), len(self._places)) for text in distinct] + [0], dtype=np.int64)
        return places[codes]

    @property
    def listed(self) -> list[str]:
        """The texts in the order of their numbers."""
        return list(self._places)


def segment_name(segment: object) -> object:
    """Return what the page calls a segment of a text; what is missing stays so."""
    return name_of(segment) if isinstance(segment, str) else segment


def shown(token: object) -> str:
    """Return a token as it can be shown: line breaks and tabs as signs, no control or direction characters, shortened where it is endless."""
    text = "".join(_VISIBLE.get(character, character if character.isprintable() else "·") for character in str(token))
    return text if len(text) <= _LONGEST_TOKEN else f"{text[:_LONGEST_TOKEN]}…"


def _base64(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode("ascii")
