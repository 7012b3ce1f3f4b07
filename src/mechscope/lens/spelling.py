"""Tokens as text: by a model's tokenizer, or as numbers where it has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mechscope.subject import Subject


def speller(subject: Subject) -> Callable[[Sequence[int]], str]:
    """Return what turns token ids into the text they stand for."""
    if subject.tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    return lambda ids: str(subject.tokenizer.decode(list(ids)))
