"""Roles recognised by where a head looks in random text: before itself, at what stood there already, behind it, at the first token, at everything.

The probes are random tokens A and B, all different: a text A A, in which every token of the second half stood before, and its control A B, in which none
did. A head that looks L back in both does so for the distance and not for the token; so the control is the null of the roles that are about
repetition (Olsson et al. 2022, "In-context Learning and Induction Heads"; Wang et al. 2022), and a role of its own, the positional twin of induction.
Lengths differ, so that no distance is all texts'. What heads reach by chance is measured on the same texts, with heads turned at random.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.pieces import Pieces
from mechscope.data.tasks import LONGEST, repeated
from mechscope.errors import DataError
from mechscope.heads.attention import masses_at, run_probes
from mechscope.heads.roles import Role, RoleScores
from mechscope.heads.segments import row_means, uniform
from mechscope.heads.turned import TEXTS, Turns, mean_excess
from mechscope.instrument import AttentionCall, describe
from mechscope.instrument.execution import Execution
from mechscope.subject import Subject

_OLSSON = "Olsson et al. 2022, In-context Learning and Induction Heads"
# a tenth of a row's attention more than chance gives is worth a name
_LEAST = 0.1

PREVIOUS = Role(
    name="previous-token",
    definition="Attention to the token just before, over a random text.",
    source=_OLSSON,
    null="The same number for a head that looks at all keys it can see alike.",
    least=_LEAST,
)
INDUCTION = Role(
    name="induction",
    definition="Attention to the token behind the earlier occurrence of the same token, over the second half of a repeated random text.",
    source=_OLSSON,
    null="The same places in the control text, whose second half repeats nothing.",
    least=_LEAST,
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
    # any query goes there where a model has learned to park attention, turned ones too: no job that a head is aligned for
    least=None,
)
BROAD = Role(
    name="broad",
    definition="Entropy of a row over its largest possible value, mean over a random text: 1 looks at all alike, 0 at one token.",
    source="mechscope",
    null="1: a head that looks at all alike, so heads can only fall below it.",
    least=None,
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
    repeated = run_probes(subject, texts, _looks, execution=execution)
    control = run_probes(subject, texts.swapped(), _control, execution=execution)
    few, turns = texts.first(TEXTS), Turns(subject, seed=execution.seed)
    turned = run_probes(subject, few, turns.each(_looks), execution=execution)
    turned_control = run_probes(subject, few.swapped(), turns.each(_looks), execution=execution)
    again, behind, previous, offset_null, previous_null, sink_null, sink, broad = (control[..., at] for at in range(8))
    evenly, layers = control[: len(few), ..., 3:5, None], subject.anatomy.attending
    return (
        RoleScores(PREVIOUS, names, previous, previous_null, mean_excess(turned_control[..., 2, :], evenly[..., 1, :]), layers=layers),
        RoleScores(DUPLICATE, names, repeated[..., 0], again, mean_excess(turned[..., 0, :], turned_control[..., 0, :]), layers=layers),
        RoleScores(INDUCTION, names, repeated[..., 1], behind, mean_excess(turned[..., 1, :], turned_control[..., 1, :]), layers=layers),
        RoleScores(OFFSET, names, behind, offset_null, mean_excess(turned_control[..., 1, :], evenly[..., 0, :]), layers=layers),
        RoleScores(SINK, names, sink, sink_null, layers=layers),
        RoleScores(BROAD, names, broad, broad * 0 + 1, layers=layers),
    )


def repeated_texts(subject: Subject, n: int, *, seed: int = 0) -> Pairs:
    """Make random texts A A (clean) with their controls A B (corrupt) that a model can read, see `mechscope.data.tasks.repeated`.

    Raises:
        DataError: The model has too few tokens or positions.
    """
    tokenizer, size, most = subject.tokenizer, subject.anatomy.vocab_size, subject.anatomy.max_positions
    start = len(Pieces(tokenizer).start_ids) if tokenizer is not None else 0
    try:
        return repeated(tokenizer or size, n, seed=seed, longest=min(LONGEST, (most - start) // 2), below=size)
    except DataError as error:
        raise DataError(f"{subject.source}, which reads {most} tokens, cannot read repeated random text: {error}") from error


def _places(batch: PairBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows of the second half, and for every row its earlier occurrence and what stands behind that, as columns; −1 elsewhere."""
    second = batch.positions("second")
    keys = torch.full((*second.shape, 2), -1)
    for row, pair in enumerate(batch.pairs):
        (begin, end) = pair.segments["second"][0]
        at = torch.arange(begin, end) + batch.shift(row)
        keys[row, at, 0], keys[row, at, 1] = at - (end - begin), at - (end - begin) + 1
    return second.to(device), keys.to(device)


def _looks(call: AttentionCall, batch: PairBatch) -> Float[Tensor, "batch head 4"]:
    """Return the attention to the earlier occurrence, to what stands behind it, to the token before, and to the first token."""
    device = call.query.device
    second, keys = _places(batch, device)
    before, first = _previous(batch).to(device), _first(batch).to(device)
    masses = masses_at(call, torch.cat([keys, before[..., None], first[..., None]], dim=-1), batch.real.to(device))
    rows = (second, second, before >= 0, first >= 0)
    return torch.stack([row_means(masses[..., at], of) for at, of in enumerate(rows)], dim=-1)


def _control(call: AttentionCall, batch: PairBatch) -> Float[Tensor, "batch head 8"]:
    """Return what heads look at where nothing repeats: again, behind, previous; chance of the last two and of the first token; that token; breadth."""
    own, chance = _looks(call, batch), _looks(uniform(call), batch).expand(-1, call.query.shape[1], -1)
    broad = row_means(describe(call, batch.real).relative_entropy, _first(batch) >= 0)
    return torch.cat([own[..., :3], chance[..., 1:], own[..., 3:], broad[..., None]], dim=-1)


def _first(batch: PairBatch) -> Int[Tensor, "batch query"]:
    """Return the first token's column for every row; −1 for a row that sees one key and has no choice."""
    begin = batch.real.to(torch.int64).argmax(1, keepdim=True)
    return torch.where(batch.real & (batch.real.cumsum(1) > 1), begin, -1)


def _previous(batch: PairBatch) -> Int[Tensor, "batch query"]:
    """Return the column before every row; −1 where that is the first token, which draws attention for its own sake, or nothing."""
    place = batch.real.cumsum(1) - 1
    columns = torch.arange(batch.real.shape[1]).expand_as(place) - 1
    return torch.where(batch.real & (place > 1), columns, -1)
