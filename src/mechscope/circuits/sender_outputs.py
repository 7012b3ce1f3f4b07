"""What every sender writes in one run, in a small form: z of the heads rather than their outputs, which are d_model / d_head times as large.

Only differences of two runs are ever expanded to the residual stream. Behind a norm (Gemma 2/3) z is stored times the norm's scale, which the
heads of a token share, so that what a head writes is linear in what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.circuits.graph import Graph
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import check_fits
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument import CachedRun
from mechscope.instrument.execution import Execution
from mechscope.instrument.texts import over_texts
from mechscope.instrument.wiring import Wiring
from mechscope.shapes import by_shape
from mechscope.subject import Subject

SITES = ("z", "attention_output", "mlp_output")


@dataclass(frozen=True)
class SenderOutputs:
    """What each sender writes; a batch and token axis of length one stands for all.

    Attributes:
        embedding: ``(batch, token, d_model)``.
        z: By layer, ``(batch, token, head, d_head)``.
        mlp: By layer, ``(batch, token, d_model)``.
        wiring: The weights that turn z into what is written: those of the model that ran.
    """

    embedding: Float[Tensor, "batch token d_model"]
    z: Sequence[Float[Tensor, "batch token head d_head"]]
    mlp: Sequence[Float[Tensor, "batch token d_model"]]
    wiring: Wiring

    __repr__ = by_shape

    @classmethod
    def by(cls, run: CachedRun, wiring: Wiring) -> SenderOutputs:
        """Take what a run's senders wrote."""
        layers = range(run.subject.anatomy.n_layers)
        z = [scaled(wiring, layer, run.recording["z", layer]) for layer in layers]
        return cls(run.input_of(0), z, [run.recording["mlp_output", layer] for layer in layers], wiring)

    @classmethod
    def nothing(cls, like: SenderOutputs) -> SenderOutputs:
        """Return a run in which no sender writes."""
        return cls(
            torch.zeros_like(like.embedding[:1, :1]),
            [torch.zeros_like(z[:1, :1]) for z in like.z],
            [torch.zeros_like(mlp[:1, :1]) for mlp in like.mlp],
            like.wiring,
        )

    @classmethod
    @torch.no_grad()
    def mean_over(cls, subject: Subject, texts: Pairs, *, execution: Execution = Execution()) -> SenderOutputs:
        """Return what each sender writes on average over all tokens of all clean texts.

        Args:
            subject: The model.
            texts: What is averaged over.
            execution: Tokens of a batch (1,024 by default).

        Raises:
            MechscopeError: There are no texts, or they do not fit the model.
        """
        check_fits(subject, texts)
        subject.anatomy.require_all_attending("a graph of edges between heads and MLPs")
        wiring = Wiring(subject)

        def summed(batch: PairBatch) -> tuple[int, list[Tensor]]:
            run = CachedRun(subject, batch.clean, batch.real, sites=SITES)
            here, mask = cls.by(run, wiring), batch.real
            sums = [(x * mask.view(*mask.shape, *[1] * (x.ndim - 2)).to(x.device)).sum((0, 1), keepdim=True) for x in here.parts]
            return int(mask.sum()), sums

        total, tokens = None, 0
        for _, (number, sums) in over_texts(texts, summed, execution, tokens=1024):
            total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
            tokens += number
        assert total is not None  # `over_texts` refuses an empty set
        return cls.of_parts([x / tokens for x in total], wiring)

    @property
    def parts(self) -> list[Tensor]:
        """The embedding, then each layer's z and MLP output."""
        return [self.embedding, *(x for pair in zip(self.z, self.mlp, strict=True) for x in pair)]

    @classmethod
    def of_parts(cls, parts: Sequence[Tensor], wiring: Wiring) -> SenderOutputs:
        """Put parts together again."""
        return cls(parts[0], parts[1::2], parts[2::2], wiring)

    def heads(
        self, layer: int, minus: SenderOutputs | None = None, *, out: Tensor | None = None
    ) -> Float[Tensor, "head batch token d_model"]:
        """Expand what a layer's heads write to the residual stream, less what they write in another run (of this model or another)."""
        if minus is None:
            return expanded(self.wiring, layer, self.z[layer], out=out)
        if minus.wiring.subject is self.wiring.subject:
            return expanded(self.wiring, layer, self.z[layer] - minus.z[layer], out=out)
        own = self.heads(layer)
        return torch.sub(own, minus.heads(layer).to(own.device), out=out)

    def attention(self, layer: int) -> Float[Tensor, "batch token d_model"]:
        """Return what a layer's heads write together, without the projection's bias."""
        weight, _ = self.wiring.writer(layer)
        return self.z[layer].flatten(2) @ weight.flatten(0, 1)


def scaled(wiring: Wiring, layer: int, z: Tensor) -> Tensor:
    """Multiply z by the scale of the norm behind attention, if there is one."""
    # the norm reads through the output projection, on which an adapter may lie
    with wiring.subject.active():
        scale = wiring.written_scale(layer, z)
    return z if scale is None else z * scale


def expanded(
    wiring: Wiring, layer: int, z: Float[Tensor, "batch token head d_head"], *, out: Tensor | None = None
) -> Float[Tensor, "head batch token d_model"]:
    """Turn z into what each head writes to the residual stream."""
    weight, _ = wiring.writer(layer)
    batch, tokens, heads, _ = z.shape
    into = None if out is None else out.flatten(1, 2)
    return torch.bmm(z.permute(2, 0, 1, 3).reshape(heads, batch * tokens, -1), weight, out=into).view(heads, batch, tokens, -1)


def differences(
    graph: Graph, one: SenderOutputs, other: SenderOutputs, *, senders: int | None = None
) -> Float[Tensor, "sender batch token d_model"]:
    """Return what each sender writes in one run less what it writes in another, in the graph's order, on the device of the embedding.

    Args:
        graph: The model's edges.
        one: A run.
        other: Another.
        senders: At least the first so many are wanted, whole layers at a time; None for all.
    """
    last = graph.n_layers
    if senders is not None:
        last = next((layer for layer in range(graph.n_layers) if graph.heads_of(layer).start >= senders), graph.n_layers)
    shape = torch.broadcast_shapes(one.embedding.shape, other.embedding.shape)
    out = one.embedding.new_empty(1 + last * (graph.n_heads + 1), *shape)
    out[0] = one.embedding - other.embedding.to(out.device)
    for layer in range(last):
        heads, mlp = out[graph.heads_of(layer)], one.mlp[layer]
        if mlp.device == out.device:
            one.heads(layer, minus=other, out=heads)
        else:  # of a model over several devices
            heads.copy_(one.heads(layer, minus=other))
        out[graph.mlp_sender(layer)] = mlp - other.mlp[layer].to(mlp.device)
    return out


Source = Literal["corrupt", "zero"] | SenderOutputs | Subject


def written_in(source: Source, batch: PairBatch, clean: SenderOutputs) -> SenderOutputs:
    """Return what closed edges carry.

    Args:
        source: `corrupt`: the run of the corrupt texts; `zero`; an average (`SenderOutputs.mean_over`); or another model of the same architecture, whose
            run of the clean texts is meant.
        batch: The pairs.
        clean: What is written in the clean run.

    Raises:
        MechscopeError: The source is none of these, or of another architecture.
    """
    wiring = clean.wiring
    if source == "zero":
        return SenderOutputs.nothing(clean)
    if source == "corrupt":
        return SenderOutputs.by(CachedRun(wiring.subject, batch.corrupt, batch.real, sites=SITES), wiring)
    if isinstance(source, Subject):
        own, given = wiring.subject.anatomy, source.anatomy
        if source.family != wiring.subject.family:
            raise ModelError(
                f"closed edges cannot take values of {source.source!r}: it is {source.family}, this model is {wiring.subject.family}"
            )
        for name in ("n_layers", "n_heads", "d_model", "d_head"):
            if getattr(own, name) != getattr(given, name):
                raise ModelError(
                    f"closed edges cannot take values of {source.source!r}: {name} is {getattr(given, name)} there, {getattr(own, name)} here"
                )
        return SenderOutputs.by(CachedRun(source, batch.clean, batch.real, sites=SITES), Wiring(source))
    if not isinstance(source, SenderOutputs):
        raise SettingsError(
            f"source {source!r} is not known: closed edges take values of the corrupt run, of means, of another model, or zero"
        )
    fits = len(source.z) == len(clean.z) and all(_stands_for(mine, its) for mine, its in zip(source.parts, clean.parts, strict=True))
    if not fits:
        shapes = f"{len(source.z)} layers of {tuple(source.embedding.shape)} and {tuple(source.z[0].shape)}"
        raise DataError(f"the means closed edges should take are {shapes}, not this model's: average them over its own texts")
    return source


def _stands_for(given: Tensor, run: Tensor) -> bool:
    """Tell whether values are of a run's shape, but for a batch or token axis of length one."""
    return given.shape[2:] == run.shape[2:] and all(size in (1, its) for size, its in zip(given.shape[:2], run.shape[:2], strict=True))


def require_source(pairs: Pairs, source: Source) -> None:
    """Refuse texts without a corrupt version that differs, where closed edges should take its values.

    Raises:
        DataError: A pair's two texts are the same.
    """
    for pair in pairs if source == "corrupt" else ():
        if pair.clean == pair.corrupt:
            raise DataError(
                f"pair {pair.id!r} has the same clean and corrupt text, so closing an edge changes nothing: give pairs that differ"
            )


def source_name(source: Source) -> str:
    """Say in a word what closed edges carry."""
    if isinstance(source, str):
        return source
    return source.source if isinstance(source, Subject) else "mean"
