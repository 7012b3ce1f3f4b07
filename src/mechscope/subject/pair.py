"""A base model and its tuned version, checked to be comparable.

Same architecture and sizes, same tokenizer; a resized vocabulary is an error unless the caller asks to compare the shared tokens. When the tuned
model is a PEFT adapter, the base is the same weights with the adapter disabled: one model in memory, and no way to compare a model with itself
(the trap of `get_base_model()`, whose layers still hold the adapter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mechscope.errors import ModelError
from mechscope.subject.load import Subject

_SIZES = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "attending")


@dataclass(frozen=True)
class Pair:
    """Two comparable models.

    Attributes:
        base: The pre-trained model.
        tuned: The fine-tuned model.
        vocab_size: Number of tokens whose logits are compared.
    """

    base: Subject
    tuned: Subject
    vocab_size: int

    @property
    def tokenizer(self) -> Any:
        """The shared tokenizer."""
        return self.base.tokenizer if self.base.tokenizer is not None else self.tuned.tokenizer

    @property
    def max_positions(self) -> int:
        """The longest text both models can read, in tokens."""
        return min(self.base.anatomy.max_positions, self.tuned.anatomy.max_positions)


def pair(base: Subject, tuned: Subject, *, resize: Literal["refuse", "truncate"] = "refuse") -> Pair:
    """Check that two models can be compared.

    Args:
        base: The pre-trained model.
        tuned: The fine-tuned model, or the same adapter model's subject with its adapter on.
        resize: What to do with vocabularies of different size: refuse, or compare the shared first tokens.

    Raises:
        ModelError: Architecture, sizes, tokenizer or vocabulary differ; the message names which.
    """
    if base.family != tuned.family:
        raise ModelError(
            f"tuned model {tuned.source!r} is {tuned.family}, base {base.source!r} is {base.family}: compare a model with its own fine-tuned version"
        )
    for name in _SIZES:
        first, second = getattr(base.anatomy, name), getattr(tuned.anatomy, name)
        if first != second:
            raise ModelError(
                f"tuned model {tuned.source!r} has {name} = {second}, base {base.source!r} has {first}: they are not the same architecture"
            )
    for layer, blocks in enumerate(zip(base.anatomy.blocks, tuned.anatomy.blocks, strict=True)):
        first, second = (0 if block.experts is None else block.experts.number for block in blocks)
        if first != second:
            raise ModelError(
                f"layer {layer} of tuned model {tuned.source!r} has {second} experts, of base {base.source!r} {first}: they are not the same architecture"
            )
    if base.model is tuned.model and base.adapted == tuned.adapted and base.is_adapter:
        raise ModelError(f"base and tuned are the same model in the same state ({tuned.source!r}): take base = tuned.without_adapter()")
    ties = base.tied, tuned.tied
    if ties[0] != ties[1]:
        one, other = (base, tuned) if ties[0] else (tuned, base)
        raise ModelError(
            f"model {one.source!r} unembeds with its embedding, {other.source!r} with a weight of its own: their weights do not pair up; save the first with "
            "config.tie_word_embeddings = False and an unembedding that is a copy of its embedding"
        )
    _compare_tokenizers(base, tuned)
    sizes = base.anatomy.vocab_size, tuned.anatomy.vocab_size
    if sizes[0] != sizes[1] and resize == "refuse":
        raise ModelError(
            f'tuned model has vocabulary {sizes[1]:,}, base has {sizes[0]:,}: pass resize="truncate" to compare the shared {min(sizes):,} tokens'
        )
    return Pair(base, tuned, min(sizes))


def _compare_tokenizers(base: Subject, tuned: Subject) -> None:
    if base.tokenizer is None or tuned.tokenizer is None or base.tokenizer is tuned.tokenizer:
        return
    first, second = base.tokenizer.get_vocab(), tuned.tokenizer.get_vocab()
    shared = first.keys() & second.keys()
    moved = [token for token in shared if first[token] != second[token]]
    # added tokens at the end of a vocabulary are a resize, which is judged by the sizes of the embeddings
    if moved or len(shared) < min(len(first), len(second)):
        example = (
            f"token {moved[0]!r} is {first[moved[0]]} in one and {second[moved[0]]} in the other"
            if moved
            else f"{len(shared):,} tokens are shared"
        )
        raise ModelError(
            f"tuned model {tuned.source!r} and base {base.source!r} have different tokenizers ({len(second):,} and {len(first):,} tokens; {example}): "
            "the same text would not be the same input"
        )
