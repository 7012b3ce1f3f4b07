"""What position does between a query and a key: scores = qᵀ F_Δ k with a d_head × d_head matrix F for every offset Δ.

Rotary embeddings turn queries and keys by their positions, so that only the offset counts (Su et al. 2021, RoFormer, eq. 16). How a family turns
them (all of a head or a part, which base, which scaling, another one in local layers) is not known here: basis vectors are given to the model's
own code in the place of queries and keys, and F_Δ is read off what comes out. Where queries and keys have norms of their own (Qwen 3, Gemma 3) a
score is no bilinear form of what was read: seen by twice the input not giving twice the output, and refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import ModelError, SettingsError
from mechscope.instrument.attention import AttentionInputs
from mechscope.instrument.parts import attention_inputs
from mechscope.instrument.walk import Walk
from mechscope.subject.load import Subject


@torch.no_grad()
def score_matrices(subject: Subject, layer: int, offsets: Sequence[int]) -> Float[Tensor, "offset d_head d_head"]:
    """Return F for every offset: (bare query)ᵀ F (bare key) is the score before soft cap, mask and softmax, scaling included.

    A soft cap (Gemma 2) keeps the order of scores. Offsets beyond a layer's window are given like any other, though its mask hides them.

    Args:
        subject: The model.
        layer: Which block.
        offsets: Query position less key position, in tokens, 0 or more.

    Returns:
        float64, on the model's device. Families without rotary embedding have one matrix for every offset.

    Raises:
        ModelError: Queries or keys are not turned by a linear map that all heads share, such as a norm.
        SettingsError: An offset is negative or beyond the model's positions.
    """
    _validate(subject, offsets)
    if not is_bilinear(subject, layer):
        raise ModelError(
            f"{subject.family} puts more than a turn by position between projection and score in block {layer} (a norm of queries and keys): "
            "its QK circuit is no product of weights; its OV circuit is (ov_tokens, matrix='ov', kinds=('v',))"
        )
    turned = _turned(subject, layer, max(offsets) + 1)
    return torch.stack([turned.scaling * _slots(turned.query, subject, offset) @ _slots(turned.key, subject, 0).T for offset in offsets])


@torch.no_grad()
def position_turn(subject: Subject, layer: int) -> Float[Tensor, "d_head d_head"]:
    """Return the orthogonal matrix by which one position more turns a query; the identity in families without rotary embedding.

    A norm of queries (Qwen 3) does not matter: it lengthens a basis vector alike at every position.
    """
    turned = _turned(subject, layer, 2)
    here, next_one = (_slots(turned.query, subject, position) for position in (0, 1))
    # rows are turned basis vectors
    return (torch.linalg.pinv(here) @ next_one).T


@torch.no_grad()
def is_bilinear(subject: Subject, layer: int) -> bool:
    """Tell whether a layer's scores are bilinear in what its heads read, for any one offset."""
    once, other = (_turned(subject, layer, 2, factor=factor, shift=shift) for factor, shift in ((1.0, 0), (2.0, 1)))
    tolerance = 1e-2 if once.query.element_size() == 2 else 1e-4
    return all(
        torch.allclose(
            2 * _slots(getattr(once, part), subject, 1), _slots(getattr(other, part), subject, 1, shift=1), rtol=0, atol=tolerance
        )
        for part in ("query", "key")
    )


def _validate(subject: Subject, offsets: Sequence[int]) -> None:
    if not offsets or min(offsets) < 0 or max(offsets) >= subject.anatomy.max_positions:
        raise SettingsError(
            f"offsets {list(offsets)}: give query position less key position, from 0 to {subject.anatomy.max_positions - 1}, as keys lie behind"
        )


def _turned(subject: Subject, layer: int, length: int, *, factor: float = 1.0, shift: int = 0) -> AttentionInputs:
    """Give every basis vector as query and key at every position: the slots (text, head) take one each, beginning with slot `shift`."""
    anatomy = subject.anatomy
    width, heads = anatomy.d_head, anatomy.n_heads
    texts = -(-(width + shift) // heads)
    # not the first tokens: one of them often stands for padding
    walk = Walk(subject, torch.full((texts, length), anatomy.vocab_size - 1))
    basis = walk.hidden.new_zeros(texts * heads, width)
    basis[shift : shift + width] = factor * torch.eye(width, dtype=basis.dtype, device=basis.device)
    given = basis.view(texts, 1, heads, width).expand(texts, length, heads, width)
    return attention_inputs(walk, layer, given, given, torch.zeros_like(given))


def _slots(values: Float[Tensor, "text head token d"], subject: Subject, position: int, *, shift: int = 0) -> Float[Tensor, "d d"]:
    """Return what became of each basis vector at one position, one per row."""
    return values[:, :, position].flatten(0, 1)[shift : shift + subject.anatomy.d_head].double()
