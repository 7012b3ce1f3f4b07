"""How much what a head or an MLP adds to the residual stream differs between two models.

A change of a head's output projection alone moves no attention pattern and no z, so what is compared here is what is written, z W_O. It is compared in
two ways. *Same input*: the tuned block runs on the base's residual stream, its MLP on the base's stream behind the base's attention, so only this
part's own weights (its norm's included) can make a difference. *Own input*: each model's part on its own stream, so whatever changed further up counts
as well.

Vectors of d_model per head are never held. With W (d_head × d_model) of the base, W + ΔW of the tuned model and z, z + Δz what they read,

    (z + Δz)(W + ΔW) − z W = Δz W + (z + Δz) ΔW = [Δz, z + Δz] [W; ΔW],

and [W; ΔW] = L Q with L lower triangular and Q orthonormal, so norms are those of [Δz, z + Δz] L, at most 2 d_head numbers. Nothing cancels: unlike
quadratic forms with Gram matrices, small changes keep their digits. Where a norm stands behind attention (Gemma 2/3, OLMo 2) its gain belongs to W and
its scale, which a token's heads share, to z.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechscope.data.prompt import Batch
from mechscope.difference.rows import row_means
from mechscope.errors import ModelError
from mechscope.instrument import Walk
from mechscope.instrument.kernels import statistics_dtype
from mechscope.instrument.norms import Norm, recognised
from mechscope.instrument.outputs import tensor_of
from mechscope.shapes import by_shape
from mechscope.subject import Pair, Subject
from mechscope.subject.linear import is_conv1d, oriented_weight
from mechscope.subject.placement import fetched, index_for


@dataclass(frozen=True)
class Written:
    """What the parts of one block read and wrote.

    Attributes:
        attention: What attention added to the residual stream, or what mixes tokens in a layer that does not attend, ``(batch, token, d_model)``.
        mlp: What the MLP added.
        read: What the output projection read: the heads' z, ``(batch, token, head · d_head)``; None in a layer that does not attend.
        projected: What the output projection returned, where a norm stands behind it.
    """

    attention: Float[Tensor, "batch token d_model"]
    mlp: Float[Tensor, "batch token d_model"]
    read: Float[Tensor, "batch token features"] | None = None
    projected: Float[Tensor, "batch token d_model"] | None = None

    def of_texts(self, at: list[int]) -> Written:
        """Return the same of some texts of the batch."""
        parts = {name: value for name, value in vars(self).items() if value is not None}
        return Written(**{name: value[index_for(at, value)] for name, value in parts.items()})


class Recorder:
    """Notes what the blocks of a model write, one block at a time, and lets attention write something else where that is asked for."""

    def __init__(self) -> None:
        """Start with nothing noted."""
        self._seen: dict[str, Tensor] = {}
        self._instead: Tensor | None = None

    def take(self, hidden: Float[Tensor, "batch token d_model"]) -> Written:
        """Return what the block that ran last wrote, and forget it; `hidden` is the residual stream behind it."""
        seen, self._seen = self._seen, {}
        # OPT's MLP sees all tokens of the batch as rows of one matrix
        return Written(**{**seen, "mlp": seen["mlp"].view(*hidden.shape[:2], -1)})

    @contextlib.contextmanager
    def attention_writes(self, instead: Float[Tensor, "batch token d_model"]) -> Iterator[None]:
        """Let attention add something given to the residual stream, whatever it computes."""
        self._instead = instead
        try:
            yield
        finally:
            self._instead = None

    def read(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Note what an output projection reads."""
        self._seen["read"] = args[0]

    def projected(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Note what an output projection returns."""
        self._seen["projected"] = output

    def attention(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Note what attention writes, and replace it."""
        several = isinstance(output, tuple)
        written = self._seen["attention"] = output[0] if several else output
        if self._instead is None:
            return None
        instead = self._instead.to(written)
        return (instead, *output[1:]) if several else instead

    def mlp(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Note what an MLP writes."""
        self._seen["mlp"] = tensor_of(output)


@contextlib.contextmanager
def writing(subject: Subject) -> Iterator[Recorder]:
    """Note what every block of a model writes while the context is open; hooks are removed in any case."""
    recorder, handles = Recorder(), []
    for block in subject.anatomy.blocks:
        handles += [
            block.mixing.write.register_forward_hook(recorder.attention),
            block.mlp_write.register_forward_hook(recorder.mlp),
        ]
        if block.attends:
            handles.append(block.output.module.register_forward_pre_hook(recorder.read))
            if block.attention_write is not block.attention:
                handles.append(block.output.module.register_forward_hook(recorder.projected))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


class Writers:
    """Output projections of the two models of a pair, as `write_changes` needs them; made when a layer is first asked for, and kept."""

    def __init__(self, pair: Pair) -> None:
        """Nothing is read yet."""
        self.anatomy = pair.base.anatomy
        self._sides = (pair.base, pair.tuned)
        self._weights: list[dict[str, Tensor]] = []
        self._factors: dict[int, Tensor] = {}
        self._norms: dict[tuple[int, int], Norm | None] = {}

    def factor(self, layer: int) -> Float[Tensor, "head twice_d_head k"]:
        """Return L of every head of a layer, ``(head, 2 d_head, k)`` with k at most 2 d_head and d_model; on the base's device."""
        if layer not in self._factors:
            if not self._weights:
                self._weights = [_output_weights(subject) for subject in self._sides]
            base, tuned = (self._weight(side, layer) for side in (0, 1))
            # columns of [W; ΔW]ᵀ keep their digits one by one, so a small ΔW is not lost beside W
            stacked = torch.cat([base, tuned.to(base.device) - base], dim=1)
            self._factors[layer] = torch.linalg.qr(stacked.mT, mode="r").R.mT.contiguous()
            if len(self._factors) == len(self.anatomy.attending):
                self._weights = []
        return self._factors[layer]

    def handed_over(self, side: int, layer: int, written: Written) -> Float[Tensor, "batch token head d_head"]:
        """Return each head's z as its weights read it: times the scale of a norm behind attention."""
        if written.read is None:
            raise ModelError(f"layer {layer} does not attend: it has no heads that write")
        z = written.read.to(statistics_dtype(written.read.dtype)).unflatten(-1, (self.anatomy.n_heads, self.anatomy.d_head))
        norm = self._norm(side, layer)
        if norm is None or written.projected is None:
            return z
        return z * norm.normalised(written.projected.to(z.dtype))[1][..., None]

    def _weight(self, side: int, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Return each head's slice of W_O as it turns z into what is written, in the type of statistics."""
        output = self._sides[side].anatomy.blocks[layer].output
        stored = self._weights[side][f"{output.name}.weight"]
        weight = stored if is_conv1d(output.module) else stored.T
        weight = weight.to(statistics_dtype(weight.dtype)).unflatten(0, (self.anatomy.n_heads, self.anatomy.d_head))
        norm = self._norm(side, layer)
        if norm is None:
            return weight
        with fetched(norm.module):
            weight = weight * norm.gain.to(weight)
        return weight - weight.mean(-1, keepdim=True) if norm.centred else weight

    def _norm(self, side: int, layer: int) -> Norm | None:
        """Return the norm behind attention of one side."""
        if (side, layer) not in self._norms:
            subject = self._sides[side]
            block = subject.anatomy.blocks[layer]
            with subject.active():
                behind = block.attention_write is not block.attention
                self._norms[side, layer] = (
                    recognised(subject.family, block.attention_write, oriented_weight(block.output.module)[:, 0]) if behind else None
                )
        return self._norms[side, layer]


def _output_weights(subject: Subject) -> dict[str, Tensor]:
    """Return the output projections of all layers as they act, an adapter's change included."""
    wanted = {f"{block.output.name}.weight" for block in subject.anatomy.blocks if block.attends}
    return {name: weight for name, weight in subject.weights() if name in wanted}


@dataclass(frozen=True)
class WriteChanges:
    """How much what a layer's parts write changed, relative to what the base's write: per document and kind of row.

    Attributes:
        heads: ``(batch, rows, 1, head)``; in a layer that does not attend one number, of its mixer.
        mlp: ``(batch, rows, 1)``.
    """

    heads: Float[Tensor, "batch rows 1 head"]
    mlp: Float[Tensor, "batch rows 1"]

    __repr__ = by_shape


def write_changes(writers: Writers, layer: int, base: Written, tuned: Written, rows: Bool[Tensor, "batch rows token"]) -> WriteChanges:
    """Compare what the heads and the MLP of a layer write: ‖change‖ over ‖what the base writes‖, each a mean over a document's rows.

    A ratio of means and not a mean of ratios: on tokens where a head writes next to nothing (it attends to the first one) a ratio means nothing.
    """
    if base.read is None:
        heads = [row_means(x.to(rows.device)[:, None], rows) for x in _of_whole(base.attention, tuned.attention)]
    else:
        heads = [row_means(x.to(rows.device), rows) for x in _of_heads(writers, layer, base, tuned)]
    mlp = [row_means(x.to(rows.device)[:, None], rows) for x in _of_whole(base.mlp, tuned.mlp)]
    return WriteChanges(_ratio(*heads)[:, :, None], _ratio(*mlp))


def _ratio(change: Tensor, size: Tensor) -> Tensor:
    # no change of nothing is no change; what writes nothing in the base has no size to relate a change to
    return torch.where(change == 0, change, torch.where(size == 0, torch.nan, change / size))


def _of_heads(writers: Writers, layer: int, base: Written, tuned: Written) -> tuple[Tensor, Tensor]:
    """Return ‖what a tuned head writes − what the base's writes‖ and ‖what the base's writes‖, both ``(batch, head, token)``."""
    factor = writers.factor(layer)
    z, other = (writers.handed_over(side, layer, written).to(factor) for side, written in enumerate((base, tuned)))
    width = z.shape[-1]
    moved = torch.cat([other - z, other], dim=-1).transpose(1, 2)
    # the base's own weights are the first rows, of which only the first columns are not zero
    return (moved @ factor).norm(dim=-1), (z.transpose(1, 2) @ factor[:, :width, :width]).norm(dim=-1)


def _of_whole(base: Float[Tensor, "batch token d_model"], tuned: Float[Tensor, "batch token d_model"]) -> tuple[Tensor, Tensor]:
    """Return the same of what a layer's MLP or mixer writes, both ``(batch, token)``."""
    first = base.to(statistics_dtype(base.dtype))
    second = tuned.to(first.device).to(statistics_dtype(tuned.dtype))
    return (second - first).norm(dim=-1), first.norm(dim=-1)


class SameInput:
    """The tuned model's blocks, each run on what the base's same block is given, over some documents of a batch."""

    def __init__(self, pair: Pair, batch: Batch, ids: Collection[str] | None) -> None:
        """Choose the documents: those with these ids, all where `ids` is None."""
        self._at = [number for number, example in enumerate(batch.examples) if ids is None or example.id in ids]
        # a pass of its own: masks and rotary angles are made for as many texts as there are
        self._walk = Walk(pair.tuned, batch.input_ids[self._at], batch.attention_mask[self._at]) if self._at else None

    def changes(
        self,
        writers: Writers,
        layer: int,
        given: Float[Tensor, "batch token d_model"],
        base: Written,
        recorder: Recorder,
        rows: Bool[Tensor, "batch rows token"],
    ) -> WriteChanges:
        """Run one block and compare what it writes; NaN for documents that were not chosen.

        Args:
            writers: The pair's output projections.
            layer: Which block.
            given: What the base's block read.
            base: What it wrote.
            recorder: That of the tuned model.
            rows: Which query rows are averaged.
        """
        anatomy, (texts, kinds) = writers.anatomy, rows.shape[:2]
        parts = anatomy.n_heads if anatomy.blocks[layer].attends else 1
        heads = torch.full((texts, kinds, 1, parts), torch.nan, dtype=torch.float64, device=rows.device)
        mlp = torch.full((texts, kinds, 1), torch.nan, dtype=torch.float64, device=rows.device)
        if self._walk is None:
            return WriteChanges(heads, mlp)
        at = index_for(self._at, given)
        # the MLP is to read the base's stream behind the base's attention, not behind the tuned model's
        with recorder.attention_writes(base.attention[index_for(self._at, base.attention)]):
            after = self._walk.step(layer, given[at].to(self._walk.hidden))
        own, here = base.of_texts(self._at), index_for(self._at, rows)
        found = write_changes(writers, layer, own, recorder.take(after), rows[here])
        heads[here], mlp[here] = found.heads, found.mlp
        return WriteChanges(heads, mlp)
