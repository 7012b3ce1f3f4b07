"""Checkpoints that stay: the weights of every N-th step of a training, beside its result, so that its course can be studied.

The trainer's own checkpoints are for resuming; all but two are deleted. A kept one is a model or an adapter like any other (`checkpoint-100`), without
the optimizer's state. It appears by a rename, so that one that is there is whole; a training that continues after a kill goes over some steps again and
ends with the same weights there, so what is there stays.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from mechscope import ranks

KEPT = "kept"
"""The folder within a training's work folder in which they wait for its end."""


def save_weights(model: Any, folder: Path) -> None:
    """Write a model, or the adapter on it, as safetensors."""
    if isinstance(model, PeftModel):
        # peft would compile a template for a model card at every checkpoint, and ask a hub whether the embeddings were resized
        model.create_or_update_model_card = lambda *_: None
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.save_pretrained(folder)


class Keep(TrainerCallback):
    """Keeps the weights of every N-th step."""

    def __init__(self, every: int, folder: Path, tokenizer: Any) -> None:
        """Say which steps are kept.

        Args:
            every: Optimizer steps between two of them.
            folder: Where they are written.
            tokenizer: Saved beside each, so that it can be loaded by itself; None for none.
        """
        self.every = every
        self.folder = folder
        self.tokenizer = tokenizer

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Keep the step, where it is one of them."""
        kept = self.folder / f"checkpoint-{state.global_step}"
        if state.global_step % self.every or not ranks.is_first() or kept.exists():
            return
        begun = self.folder / f".{kept.name}"
        shutil.rmtree(begun, ignore_errors=True)  # what a kill left half-written
        begun.mkdir(parents=True)
        save_weights(model, begun)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(begun)
        os.rename(begun, kept)
