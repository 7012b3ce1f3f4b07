"""What every sender writes in one run, kept small: z of the heads rather than their outputs, which are d_model / d_head times as large.

Only differences of two runs are ever expanded to the residual stream. Behind a norm (Gemma 2/3) z is kept times the norm's scale, which the
heads of a token share, so that what a head writes is linear in what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.circuits.graph import Graph
from mechscope.data.pairs import Pairs
from mechscope.instrument import Prefix
from mechscope.instrument.wiring import Wiring
from mechscope.scoring import batches
from mechscope.subject import Subject

SITES = ("z", "attention_output", "mlp_output")


@dataclass(frozen=True)
class Written:
    """What each sender writes; a batch and token axis of length one stands for all.

    Attributes:
        embedding: ``(batch, token, d_model)``.
        z: By layer, ``(batch, token, head, d_head)``.
        mlp: By layer, ``(batch, token, d_model)``.
    """

    embedding: Float[Tensor, "batch token d_model"]
    z: Sequence[Float[Tensor, "batch token head d_head"]]
    mlp: Sequence[Float[Tensor, "batch token d_model"]]

    @classmethod
    def by(cls, run: Prefix, wiring: Wiring) -> Written:
        """Take what a run's senders wrote."""
        layers = range(run.subject.anatomy.n_layers)
        z = [run.recording["z", layer] for layer in layers]
        return cls(
            run.input_of(0), [scaled(wiring, layer, z[layer]) for layer in layers], [run.recording["mlp_output", layer] for layer in layers]
        )

    @classmethod
    def nothing(cls, like: Written) -> Written:
        """Return a run in which no sender writes."""
        return cls(
            torch.zeros_like(like.embedding[:1, :1]),
            [torch.zeros_like(z[:1, :1]) for z in like.z],
            [torch.zeros_like(mlp[:1, :1]) for mlp in like.mlp],
        )

    @classmethod
    @torch.no_grad()
    def mean_over(cls, subject: Subject, texts: Pairs, *, tokens_per_batch: int = 1024) -> Written:
        """Return what each sender writes on average over all tokens of all clean texts.

        Args:
            subject: The model.
            texts: What is averaged over.
            tokens_per_batch: Most tokens of a batch, padding included.
        """
        wiring, total, tokens = Wiring(subject), None, 0
        for batch in batches(texts, tokens_per_batch):
            run = Prefix(subject, batch.clean, batch.real, sites=SITES)
            here, mask = cls.by(run, wiring), batch.real.to(subject.device)
            sums = [(x * mask.view(*mask.shape, *[1] * (x.ndim - 2))).sum((0, 1), keepdim=True) for x in here.parts]
            total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
            tokens += int(mask.sum())
        assert total is not None  # `batches` refuses an empty set
        return cls.of_parts([x / tokens for x in total])

    @property
    def parts(self) -> list[Tensor]:
        """The embedding, then each layer's z and MLP output."""
        return [self.embedding, *(x for pair in zip(self.z, self.mlp, strict=True) for x in pair)]

    @classmethod
    def of_parts(cls, parts: Sequence[Tensor]) -> Written:
        """Put parts together again."""
        return cls(parts[0], parts[1::2], parts[2::2])

    def heads(self, wiring: Wiring, layer: int, minus: Written | None = None) -> Float[Tensor, "head batch token d_model"]:
        """Expand what a layer's heads write to the residual stream, less what they write in another run."""
        z = self.z[layer] if minus is None else self.z[layer] - minus.z[layer]
        return expanded(wiring, layer, z)

    def attention(self, wiring: Wiring, layer: int) -> Float[Tensor, "batch token d_model"]:
        """Return what a layer's attention writes, the projection's bias included."""
        weight, bias = wiring.writer(layer)
        written = self.z[layer].flatten(2) @ weight.flatten(0, 1)
        return written if bias is None else written + bias


def scaled(wiring: Wiring, layer: int, z: Tensor) -> Tensor:
    """Multiply z by the scale of the norm behind attention, if there is one."""
    scale = wiring.written_scale(layer, z)
    return z if scale is None else z * scale


def expanded(wiring: Wiring, layer: int, z: Float[Tensor, "batch token head d_head"]) -> Float[Tensor, "head batch token d_model"]:
    """Turn z into what each head writes to the residual stream."""
    weight, _ = wiring.writer(layer)
    batch, tokens, heads, _ = z.shape
    return torch.bmm(z.permute(2, 0, 1, 3).reshape(heads, batch * tokens, -1), weight).view(heads, batch, tokens, -1)


def fill_differences(
    out: Float[Tensor, "sender batch token d_model"], graph: Graph, wiring: Wiring, one: Written, other: Written
) -> Float[Tensor, "sender batch token d_model"]:
    """Write what each sender writes in one run less what it writes in another into a tensor, in the graph's order."""
    out[0] = one.embedding - other.embedding
    for layer in range(graph.n_layers):
        out[graph.heads_of(layer)] = one.heads(wiring, layer, minus=other)
        out[graph.mlp_sender(layer)] = one.mlp[layer] - other.mlp[layer]
    return out
