"""A model that learned nothing: the same architecture with random weights, for what probes tell of any model that sees the words."""

from __future__ import annotations

from dataclasses import replace

import torch

from mechscope.errors import ModelError
from mechscope.instrument import load
from mechscope.subject import Subject


def untrained(subject: Subject, *, seed: int = 0) -> Subject:
    """Return the model of a subject as it was before any training: its configuration, with weights drawn as the architecture draws them.

    Args:
        subject: The model.
        seed: Of the weights.

    Raises:
        ModelError: The architecture cannot be made of its configuration.
    """
    plain = subject.plain
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = type(plain)._from_config(plain.config, dtype=subject.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"model {subject.source!r} cannot be made anew with random weights: {error}") from error
    # checked already: it is the architecture of the subject
    return replace(
        load(made.to(subject.device).eval(), check=False), tokenizer=subject.tokenizer, source=f"{subject.source}, random weights"
    )
