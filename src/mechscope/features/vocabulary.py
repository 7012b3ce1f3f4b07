"""Which tokens a dictionary's activations were of: kept with it, so that it is not used where the same text would be other tokens."""

from __future__ import annotations

from typing import Any

from mechscope.store.hashing import hash_json
from mechscope.subject import Subject


def vocabulary(subject: Subject) -> dict[str, Any]:
    """Return a model's vocabulary as its size and fingerprint, JSON-able; nothing where it has no tokenizer."""
    if subject.tokenizer is None:
        return {}
    tokens = subject.tokenizer.get_vocab()
    return {"tokens": len(tokens), "hash": hash_json(sorted(tokens.items()))}


def is_other(subject: Subject, known: dict[str, Any]) -> bool:
    """Tell whether a model's vocabulary is another one than what `vocabulary` returned; tokens added behind its end make no other one."""
    if not known or subject.tokenizer is None:
        return False
    tokens = subject.tokenizer.get_vocab()
    own = (
        sorted(tokens.items())
        if len(tokens) == known["tokens"]
        else sorted((name, at) for name, at in tokens.items() if at < known["tokens"])
    )
    return hash_json(own) != known["hash"]
