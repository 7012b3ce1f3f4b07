"""Roles of heads in indirect-object identification: who looks at which name, and what it then writes.

"Then, Jane and Tom went to the park. Jane gave a ring to": the heads that answer " Tom" have four kinds of jobs (Wang et al. 2022, "Interpretability in
the Wild"). Duplicate-token and induction heads notice at the second " Jane" (S2) that it stood before (S1); S-inhibition heads bring that to
the end; name movers look from there at the name that is left (IO) and write it, negative ones write against it.

    copies                of all names of the probe, v(IO) W_O raises IO most (lowers it most, for the negative)
    name mover            attention END → IO, where copies
    direct effect         ⟨z(END) W_O, u(IO) − u(S)⟩ · scale of the final norm, which is frozen as in the model's own run

Wang et al. ask for the name among the five tokens that the head raises most of the whole vocabulary; against the other names alone it costs no
unembedding, and chance is one in their number. S-inhibition is defined there by path patching into the name movers' queries; attention is the part of
it that can be observed, so its score says where a head looks and not what it causes.

Chance is the same number on the corrupt text, where three different names stand in the same three places: the head's taste for places and for names is
in both, and what is left is owed to the repeated name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechscope import ranks
from mechscope.data.pairs import PairBatch, Pairs, PromptPair
from mechscope.data.scoring import check_fits
from mechscope.data.tasks import ioi
from mechscope.errors import DataError
from mechscope.heads.attention import mass_at, run_probes
from mechscope.heads.roles import Role, RoleScores
from mechscope.heads.turned import TEXTS, Turns, mean_excess
from mechscope.instrument import AttentionCall
from mechscope.instrument.execution import Execution
from mechscope.instrument.readout import Readout
from mechscope.instrument.wiring import Wiring
from mechscope.subject import Subject

_WANG = "Wang et al. 2022, Interpretability in the Wild"
_CORRUPT = "The same on the corrupt text, where three different names stand in the same places."

NAME_MOVER = Role(
    name="name-mover",
    definition="Attention from the last token to the indirect object, where the head's value there raises that name above all others of the probe.",
    source=_WANG,
    null=_CORRUPT,
    least=0.1,
)
NEGATIVE_NAME_MOVER = replace(
    NAME_MOVER,
    name="negative-name-mover",
    definition="Attention from the last token to the indirect object, where the head's value there lowers that name below all others of the probe.",
)
S_INHIBITION = replace(
    NAME_MOVER,
    name="s-inhibition",
    definition="Attention from the last token to the subject's second mention (observed, not shown to inhibit).",
)
DUPLICATE = replace(NAME_MOVER, name="ioi-duplicate-token", definition="Attention from the subject's second mention to its first.")
INDUCTION = replace(
    DUPLICATE, name="ioi-induction", definition="Attention from the subject's second mention to the token behind its first."
)
DIRECT_EFFECT = Role(
    name="ioi-direct-effect",
    definition="What the head writes at the last token to the logit of the indirect object minus that of the subject, in nats.",
    source=_WANG,
    null=_CORRUPT,
    least=None,
    low=None,
    high=None,
)
ROLES = (NAME_MOVER, NEGATIVE_NAME_MOVER, S_INHIBITION, DUPLICATE, INDUCTION, DIRECT_EFFECT)


@torch.no_grad()
def task_roles(subject: Subject, *, n: int = 50, execution: Execution = Execution()) -> tuple[RoleScores, ...]:
    """Score every head's jobs in indirect-object identification.

    Args:
        subject: The model, with its tokenizer.
        n: How many prompt pairs.
        execution: Tokens of a batch (4,096 by default), seed (of the pairs), progress.

    Returns:
        The roles in `ROLES`: attention as shares of a row, the direct effect in nats.

    Raises:
        DataError: The model has no tokenizer, or one that makes too few names single tokens: these roles cannot be measured on it.
        ModelError: The model's heads or its readout cannot be taken apart.
    """
    if subject.tokenizer is None:
        raise DataError(f"{subject.source} has no tokenizer to write prompts with: load it with one")
    return roles_on(subject, ioi(subject.tokenizer, n, seed=execution.seed), execution=execution)


@torch.no_grad()
def roles_on(subject: Subject, pairs: Pairs, *, execution: Execution = Execution()) -> tuple[RoleScores, ...]:
    """Score the roles on given pairs; segments "io", "s1" and "s2" are one token each. Raises what `task_roles` raises."""
    check_fits(subject, pairs)  # before a name is looked up in the unembedding
    names = _names(pairs)
    score, null = (_Jobs(subject, names).run(texts, execution) for texts in (pairs, pairs.swapped()))
    texts, layers = tuple(pair.id for pair in pairs), subject.anatomy.attending
    few, turns = pairs.first(TEXTS), Turns(subject, seed=execution.seed)
    turned = [run_probes(subject, of, turns.each(_Jobs(subject, names)), execution=execution) for of in (few, few.swapped())]
    # the direct effect of turned heads lacks the final norm's scale, and is not ascribed
    chance = [None if role.least is None else mean_excess(*(one[..., at, :] for one in turned)) for at, role in enumerate(ROLES)]
    return tuple(RoleScores(role, texts, score[..., at], null[..., at], chance[at], layers=layers) for at, role in enumerate(ROLES))


def _place(pair: PromptPair, name: str) -> int:
    return pair.segments[name][0][0]


def _names(pairs: Pairs) -> Int[Tensor, " name"]:
    """Return the ids of all names of both texts, in order."""
    places = [(pair, _place(pair, name)) for pair in pairs for name in ("io", "s1", "s2")]
    return torch.tensor(sorted({ids[at] for pair, at in places for ids in (pair.clean, pair.corrupt)}))


class _Jobs:
    """Reduces an attention call to ``(batch, head, role)``; the direct effect still lacks the final norm's scale."""

    def __init__(self, subject: Subject, names: Int[Tensor, " name"]) -> None:
        self.subject, self.names = subject, names
        self.wiring, self.readout = Wiring(subject), Readout.of(subject)
        self.directions = self.readout.directions(names)
        self.batch: PairBatch | None = None
        self.scale: dict[int, float] = {}

    def run(self, pairs: Pairs, execution: Execution) -> Float[np.ndarray, "text layer head role"]:
        """Score all texts in one pass."""
        with self._final_scales():
            scores = run_probes(self.subject, pairs, self, execution=execution)
        # every text ran on one of the ranks
        scales = np.sum(ranks.exchange([self.scale.get(index, 0.0) for index in range(len(pairs))]), axis=0)
        scores[..., -1] *= scales[:, None, None]
        return scores

    def __call__(self, call: AttentionCall, batch: PairBatch) -> Float[Tensor, "batch head role"]:
        self.batch = batch
        at = {name: _columns(batch, name) for name in ("io", "s1", "s2", "end")}
        to_io, to_s1 = _attention(call, batch, (at["end"], at["io"]), (at["s2"], at["s1"]))
        to_s2, behind_s1 = _attention(call, batch, (at["end"], at["s2"]), (at["s2"], at["s1"] + 1))
        raises, lowers = self._copies(call, batch, at["io"])
        effect = self._effect(call, batch, at)
        return torch.stack([to_io * raises, to_io * lowers, to_s2, to_s1, behind_s1, effect], -1)

    def _copies(self, call: AttentionCall, batch: PairBatch, io: Tensor) -> tuple[Tensor, Tensor]:
        """Tell where a head's value at the indirect object raises, and lowers, that name most, ``(batch, head)`` each."""
        text = torch.arange(len(io))
        value = call.value[text, :, io].repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
        written = torch.einsum("bhd,hdm,nm->bhn", value, self._writer(call), self.directions.to(value))
        own = torch.searchsorted(self.names, batch.clean[text, io]).to(written.device)[:, None, None].expand(-1, written.shape[1], 1)
        mine = written.gather(-1, own)[..., 0]
        # strictly: a head that writes nothing raises no name
        return mine > written.scatter(-1, own, -torch.inf).amax(-1), mine < written.scatter(-1, own, torch.inf).amin(-1)

    def _effect(self, call: AttentionCall, batch: PairBatch, at: dict[str, Tensor]) -> Float[Tensor, "batch head"]:
        text = torch.arange(len(batch.pairs))
        z = call.z[text, at["end"]]
        wanted, unwanted = (self.readout.directions(batch.clean[text, at[name]]).to(z) for name in ("io", "s1"))
        effect = torch.einsum("bhd,hdm,bm->bh", z, self._writer(call), wanted - unwanted)
        scale = self.wiring.written_scale(call.layer, z)
        return effect if scale is None else effect * scale[..., 0]

    def _writer(self, call: AttentionCall) -> Float[Tensor, "head d_head d_model"]:
        return self.wiring.writer(call.layer)[0].to(call.z)

    @contextmanager
    def _final_scales(self) -> Iterator[None]:
        """Note what the final norm divides each text's last token by, as the last block gives it out."""

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if self.batch is None:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            ends = hidden[torch.arange(len(self.batch.pairs)), _columns(self.batch, "end")]
            scales = self.readout.scale(ends)[:, 0].tolist()
            self.scale |= zip(self.batch.indices, scales, strict=True)

        handle = self.subject.anatomy.blocks[-1].module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _columns(batch: PairBatch, name: str) -> Int[Tensor, " batch"]:
    """Return the columns of every text's token: a name, or the end."""
    places = (len(pair.clean) - 1 if name == "end" else _place(pair, name) for pair in batch.pairs)
    return torch.tensor([place + batch.shift(row) for row, place in enumerate(places)])


def _attention(call: AttentionCall, batch: PairBatch, *looks: tuple[Tensor, Tensor]) -> list[Float[Tensor, "batch head"]]:
    """Return the attention of some rows, one a text, to one key each."""
    text, keys = torch.arange(len(batch.pairs)), torch.full((*batch.real.shape, 1), -1)
    for row, key in looks:
        keys[text, row, 0] = key
    mass = mass_at(call, keys.to(call.query.device), batch.real.to(call.query.device))
    return [mass[text, :, row] for row, _ in looks]
