"""Roles recognised by where a head looks in random text: before itself, at what stood there already, behind it, at the first token, at everything.

The probes are random tokens A and B, all different: a text A A, in which every token of the second half stood before, and its control A B, in which none
did. A head that looks L back in both does so for the distance and not for the token; so the control is the null of the roles that are about
repetition (Olsson et al. 2022, "In-context Learning and Induction Heads"; Wang et al. 2022), and a role of its own, the positional twin of induction.
Lengths differ, so that no distance is all texts'.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs, PromptPair
from mechscope.data.pieces import Pieces
from mechscope.errors import DataError
from mechscope.heads.attention import masses_at, run_probes
from mechscope.heads.roles import Role, RoleScores
from mechscope.heads.segments import row_means, uniform
from mechscope.instrument import AttentionCall, describe
from mechscope.instrument.execution import Execution
from mechscope.subject import Subject

_OLSSON = "Olsson et al. 2022, In-context Learning and Induction Heads"
# nearly a third of a row's attention on one key, several times what chance gives: a convention, chosen with trained induction models at hand
_ASCRIBED = 0.3
# tokens of the repeated part: long enough that chance is small, short enough for a model of 64 positions
_SHORTEST, _LONGEST = 12, 24

PREVIOUS = Role(
    name="previous-token",
    definition="Attention to the token just before, over a random text.",
    source=_OLSSON,
    null="The same number for a head that looks at all keys it can see alike.",
    threshold=_ASCRIBED,
)
INDUCTION = Role(
    name="induction",
    definition="Attention to the token behind the earlier occurrence of the same token, over the second half of a repeated random text.",
    source=_OLSSON,
    null="The same places in the control text, whose second half repeats nothing.",
    threshold=_ASCRIBED,
)
DUPLICATE = replace(
    INDUCTION,
    name="duplicate-token",
    definition="Attention to the earlier occurrence of the same token, over the second half of a repeated random text.",
    source="Wang et al. 2022, Interpretability in the Wild",
)
OFFSET = replace(
    PREVIOUS,
    name="induction-offset",
    definition="Attention to where induction would look, in a text that repeats nothing: a head of this distance, whatever the token.",
)
SINK = replace(
    PREVIOUS,
    name="attention-sink",
    definition="Attention to the first token, over a random text.",
    source="Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks",
    # more on one token than on all others together
    threshold=0.5,
)
BROAD = Role(
    name="broad",
    definition="Entropy of a row over its largest possible value, mean over a random text: 1 looks at all alike, 0 at one token.",
    source="mechscope",
    null="1: a head that looks at all alike, so heads can only fall below it.",
    threshold=None,
)
ROLES = (PREVIOUS, DUPLICATE, INDUCTION, OFFSET, SINK, BROAD)


@torch.no_grad()
def pattern_roles(subject: Subject, *, n: int = 32, execution: Execution = Execution()) -> tuple[RoleScores, ...]:
    """Score where every head looks in random text.

    Args:
        subject: The model.
        n: How many texts, each with its control.
        execution: Tokens of a batch (4,096 by default), seed (of the texts), progress.

    Returns:
        The roles in `ROLES`. A sliding window shorter than the distance hides the key: the score is then 0.

    Raises:
        DataError: The model has too few tokens or positions for repeated random text.
    """
    texts = repeated_texts(subject, n, seed=execution.seed)
    names = tuple(pair.id for pair in texts)
    repeated = run_probes(subject, texts, _repetition, execution=execution)
    control = run_probes(subject, texts.swapped(), _control, execution=execution)
    again, behind, offset_null, previous, previous_null, sink, sink_null, broad = (control[..., at] for at in range(8))
    scores = (
        (PREVIOUS, previous, previous_null),
        (DUPLICATE, repeated[..., 0], again),
        (INDUCTION, repeated[..., 1], behind),
        (OFFSET, behind, offset_null),
        (SINK, sink, sink_null),
        (BROAD, broad, broad * 0 + 1),
    )
    return tuple(RoleScores(role, names, score, null) for role, score, null in scores)


def repeated_texts(subject: Subject, n: int, *, seed: int = 0) -> Pairs:
    """Make random texts A A (clean) with their controls A B (corrupt), all tokens of A and B different; the segment "second" is the second half.

    Raises:
        DataError: The model has too few tokens or positions.
    """
    tokens, start = _ordinary(subject)
    longest = min(_LONGEST, (subject.anatomy.max_positions - len(start)) // 2, len(tokens) // 2)
    if longest < 2:
        raise DataError(
            f"{subject.source} has {len(tokens)} ordinary tokens and reads {subject.anatomy.max_positions}: repeated random text needs at least 4 of each"
        )
    pairs = []
    for number in range(n):
        rng = random.Random(f"{seed}/{number}")
        length = rng.randint(min(_SHORTEST, longest), longest)
        drawn = rng.sample(tokens, 2 * length)
        first, other, begin = drawn[:length], drawn[length:], len(start) + length
        segments = {"second": ((begin, begin + length),)}
        pairs.append(PromptPair(f"repeated-{seed}-{number}", (*start, *first, *first), (*start, *first, *other), segments=segments))
    return Pairs(tuple(pairs), f"{n} repeated random texts, seed {seed}")


def _ordinary(subject: Subject) -> tuple[Sequence[int], tuple[int, ...]]:
    """Return the tokens to draw from and what a text begins with."""
    tokenizer, size = subject.tokenizer, subject.anatomy.vocab_size
    if tokenizer is None:
        return range(size), ()
    special = {*tokenizer.all_special_ids, *(at for at, token in tokenizer.added_tokens_decoder.items() if token.special)}
    # a tokenizer may know words that the model has no row for
    return [at for at in sorted(tokenizer.get_vocab().values()) if at not in special and at < size], Pieces(tokenizer).start_ids


def _places(batch: PairBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows of the second half, and for every row its earlier occurrence and what stands behind that, as columns; −1 elsewhere."""
    second = batch.positions("second")
    keys = torch.full((*second.shape, 2), -1)
    for row, pair in enumerate(batch.pairs):
        (begin, end) = pair.segments["second"][0]
        at = torch.arange(begin, end) + batch.shift(row)
        keys[row, at, 0], keys[row, at, 1] = at - (end - begin), at - (end - begin) + 1
    return second.to(device), keys.to(device)


def _repetition(call: AttentionCall, batch: PairBatch) -> Float[Tensor, "batch head 2"]:
    device = call.query.device
    second, keys = _places(batch, device)
    masses = masses_at(call, keys, batch.real.to(device))
    return torch.stack([row_means(masses[..., place], second) for place in range(2)], dim=-1)


def _control(call: AttentionCall, batch: PairBatch) -> Float[Tensor, "batch head 8"]:
    device = call.query.device
    real = batch.real.to(device)
    second, keys = _places(batch, device)
    before = _previous(batch).to(device)
    keys = torch.cat([keys, before[..., None]], dim=-1)
    evenly = uniform(call)
    own, chance = masses_at(call, keys, real), masses_at(evenly, keys, real)
    seen, seen_evenly = describe(call, batch.real), describe(evenly, batch.real)
    # a row that sees one key has no choice
    inner = real & (real.cumsum(1) > 1)
    heads = own.shape[1]

    def alike(values: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch head"]:
        return values.expand(-1, heads)

    return torch.stack(
        [
            row_means(own[..., 0], second),
            row_means(own[..., 1], second),
            alike(row_means(chance[..., 1], second)),
            row_means(own[..., 2], before >= 0),
            alike(row_means(chance[..., 2], before >= 0)),
            row_means(seen.sink, inner),
            alike(row_means(seen_evenly.sink, inner)),
            row_means(seen.relative_entropy, inner),
        ],
        dim=-1,
    )


def _previous(batch: PairBatch) -> Int[Tensor, "batch query"]:
    """Return the column before every row; −1 where that is the first token, which draws attention for its own sake, or nothing."""
    place = batch.real.cumsum(1) - 1
    columns = torch.arange(batch.real.shape[1]).expand_as(place) - 1
    return torch.where(batch.real & (place > 1), columns, -1)
