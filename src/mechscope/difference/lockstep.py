"""Models over one batch of documents, in lock-step: the two of a pair, or those of several pairs, each walked once however many pairs it is in.

The models are walked block by block side by side, so that one layer of each is held at a time and every comparison is made while both sides are
at hand: patterns by the identity of idea 2, heads' outputs, residual streams. Logits are made a few rows at a time and never held whole. Every
row-level value is averaged over the query rows of each document at once: what leaves this module is one number per document, head and measure.

    1. all models' embeddings;
    2. layer by layer: one block of each; for each pair, compare the patterns, z and the residual stream after the block;
    3. next-token distributions and losses, in chunks of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mechscope.data.prompt import Batch, Rows
from mechscope.difference.rows import row_means
from mechscope.difference.writes import Recorder, SameInput, Writers, write_changes, writing
from mechscope.errors import ModelError
from mechscope.instrument import AttentionCall, PatternStatistics, Walk, compare, observed, unembed
from mechscope.instrument.kernels import statistics_dtype
from mechscope.instrument.padding import Padding
from mechscope.instrument.patterns import Method
from mechscope.instrument.substitutes import fused_activations
from mechscope.shapes import by_shape
from mechscope.subject import Pair, Subject
from mechscope.subject.placement import index_for, sent

ROWS: tuple[Rows, ...] = get_args(Rows)
PATTERN_MEASURES = ("entropy", "relative_entropy", "distance", "sink")
SIDES = ("base", "tuned")
HEAD_MEASURES = (
    *(f"{name}_{side}" for name in PATTERN_MEASURES for side in SIDES),
    "entropy_change",
    "kl_base_tuned",
    "kl_tuned_base",
    "z_cosine_distance",
    "write_change",
    "write_change_own",
)
# the measures of attention and z, which come before those of what is written
_PATTERNS = HEAD_MEASURES.index("write_change")
GINI_MEASURES = ("gini_base", "gini_tuned")
LAYER_MEASURES = (
    "kl_base_tuned",
    "kl_tuned_base",
    "entropy_change",
    "write_change",
    "write_change_own",
    "activation_norm_base",
    "activation_norm_tuned",
    "activation_abs_base",
    "activation_abs_tuned",
    "cosine_distance",
    "mlp_write_change",
    "mlp_write_change_own",
)
# what a layer's row has of its heads: their mean
_MEANS = ("kl_base_tuned", "kl_tuned_base", "entropy_change", "write_change", "write_change_own")
OUTPUT_MEASURES = ("kl_base_tuned", "kl_tuned_base", "loss_base", "loss_tuned", "loss_change")

# logits held at once, in elements of one model: 64 MiB in float32, about 330 rows of GPT-2's vocabulary
_LOGITS = 2**24


@dataclass(frozen=True)
class Measured:
    """One batch's documents: means over each document's query rows, NaN where it has no such rows. Axes in `ROWS` and `*_MEASURES` order.

    Attributes:
        ids: The documents' ids.
        heads: ``(document, rows, measure, layer, head)`` of the layers that attend.
        layers: ``(document, rows, measure, layer)``; in a layer that does not attend what would be its heads' mean is NaN, but for `write_change` and
            `write_change_own`, which are of its mixer.
        outputs: ``(document, rows, measure)``; the rows of a next-token distribution are those of the token it predicts.
        pooled: ``(sampled document, side, rows, layer, d_model)``: mean residual stream after each block, float32.
        sampled: The ids of the documents of `pooled`.
    """

    ids: tuple[str, ...]
    heads: Float[np.ndarray, "document rows measure layer head"]
    layers: Float[np.ndarray, "document rows measure layer"]
    outputs: Float[np.ndarray, "document rows measure"]
    pooled: Float[np.ndarray, "sampled side rows layer d_model"]
    sampled: tuple[str, ...]

    __repr__ = by_shape


@dataclass(frozen=True)
class Pending:
    """A batch's numbers while a device still works on them, so that the next batch can be sent on its way before these are waited for.

    Attributes:
        pair: The models.
        batch: The documents.
        values: `heads`, `layers`, `outputs`, `pooled` of `Measured` on the device, and `finite` ``(document, side)``.
        sampled: The ids of the documents of `pooled`.
    """

    pair: Pair
    batch: Batch
    values: dict[str, Tensor]
    sampled: tuple[str, ...]

    def fetch(self) -> Measured:
        """Wait for the numbers.

        Raises:
            ModelError: A model's activations overflowed on a document: NaN means "no such row" further on, and would silently leave these rows out.
        """
        for column, side in enumerate(SIDES):
            finite = self.values["finite"][:, column].cpu()
            if not bool(finite.all()):
                subject: Subject = getattr(self.pair, side)
                document = self.batch.examples[int((~finite).int().argmax())].id
                raise ModelError(
                    f"{side} model {subject.source!r} in {subject.dtype}: the activations of document {document!r} are not finite: "
                    "load it in bfloat16 or float32"
                )
        arrays = {name: value.cpu().numpy() for name, value in self.values.items() if name != "finite"}
        return Measured(tuple(example.id for example in self.batch.examples), **arrays, sampled=self.sampled)


def measure(pair: Pair, batch: Batch, *, gini: bool = False, method: Method = "auto") -> Measured:
    """Run both models over a batch and return every document's means: `launch` for one pair, waiting for the result (raises as `Pending.fetch`)."""
    return launch([pair], batch, gini=(0,) if gini else (), method=method)[0].fetch()


@torch.no_grad()
def launch(
    pairs: Sequence[Pair],
    batch: Batch,
    *,
    gini: Collection[int] = (),
    sample: Collection[str] | None = None,
    same_input: Sequence[Collection[str] | None] | None = None,
    writers: Sequence[Writers] | None = None,
    method: Method = "auto",
) -> list[Pending]:
    """Run all models of some pairs over a batch and return each pair's numbers, in their order; on a GPU before the work is done.

    Args:
        pairs: The base and the tuned models; a model (the same `Subject`) that several pairs have in common is run once.
        batch: Documents, padded on either side.
        gini: Numbers of the pairs of which the Gini coefficient of every pattern is measured too (takes the exact path, several times slower on long
            documents).
        sample: The ids of the documents whose pooled states are wanted; all by default.
        same_input: For each pair, the ids of the documents on which its tuned blocks also run on the base's residual stream (half of a pass more);
            None for all, and all of every pair by default. Elsewhere what is measured on the same input is NaN.
        writers: Each pair's output projections, kept from batch to batch.
        method: How pattern statistics are computed: `auto`, `fused` or `exact`; see `mechscope.instrument.patterns.describe`.
    """
    subjects = models_of(pairs)
    writers = [Writers(pair) for pair in pairs] if writers is None else writers
    place = {id(subject): at for at, subject in enumerate(subjects)}
    places = [(place[id(pair.base)], place[id(pair.tuned)]) for pair in pairs]
    # looked at on the CPU: where the padding stands is known without waiting for a device
    padding = Padding.of(batch.attention_mask)
    real = padding.on(subjects[0].device).real
    rows = sent(torch.stack([batch.rows(which) for which in ROWS], dim=1), real.device)
    calls: list[AttentionCall] = []
    heads: list[list[Tensor]] = [[] for _ in pairs]
    layers: list[list[Tensor]] = [[] for _ in pairs]
    at = [number for number, example in enumerate(batch.examples) if sample is None or example.id in sample]
    sampled = index_for(at, rows)
    # put into place as they come: all layers' states are the largest of a document's numbers
    sizes = [(len(at), len(SIDES), len(ROWS), pair.base.anatomy.n_layers, pair.base.anatomy.d_model) for pair in pairs]
    pooled = [torch.empty(size, dtype=torch.float32, device=real.device) for size in sizes]
    with contextlib.ExitStack() as stack:
        # an adapter's views with and without it are one module: watched once
        recorders: dict[int, Recorder] = {}
        for plain, side in {id(subject.plain): subject for subject in subjects}.items():
            stack.enter_context(observed(side, calls.append))
            stack.enter_context(fused_activations(side))
            recorders[plain] = stack.enter_context(writing(side))
        # the mask as it stands on the CPU: whether it is needed is decided without waiting for a device
        walks = [Walk(subject, batch.input_ids, batch.attention_mask) for subject in subjects]
        again = [SameInput(pair, batch, chosen) for pair, chosen in zip(pairs, same_input or [None] * len(pairs), strict=True)]
        hidden = [walk.hidden for walk in walks]
        for layer in range(subjects[0].anatomy.n_layers):
            attends = subjects[0].anatomy.blocks[layer].attends
            given, hidden, written = hidden, [], []
            for walk, stream in zip(walks, given, strict=True):
                hidden.append(walk.step(layer, stream))
                written.append(recorders[id(walk.subject.plain)].take(hidden[-1]))
            for number, (base, tuned) in enumerate(places):
                here = rows.to(hidden[base].device)
                if attends:
                    of_heads = _attention(calls[base], calls[tuned], padding, here, gini=number in gini, method=method)
                else:
                    of_heads = torch.full((*here.shape[:2], _PATTERNS, 1), torch.nan, dtype=torch.float64, device=here.device)
                own = write_changes(writers[number], layer, written[base], written[tuned], here)
                recorder = recorders[id(pairs[number].tuned.plain)]
                same = again[number].changes(writers[number], layer, given[base], written[base], recorder, here)
                of_heads = torch.cat([of_heads[:, :, :_PATTERNS], same.heads, own.heads, of_heads[:, :, _PATTERNS:]], dim=2)
                stream = _residual(hidden[base], hidden[tuned].to(here.device), here)
                of_layer = torch.cat([_mean_over_heads(of_heads), stream, same.mlp, own.mlp], dim=2)
                if attends:
                    heads[number].append(of_heads.to(real.device))
                layers[number].append(of_layer.to(real.device))
            states = [_pooled(stream, rows, sampled).to(real.device) for stream in hidden]
            for whole, (base, tuned) in zip(pooled, places, strict=True):
                whole[:, 0, :, layer], whole[:, 1, :, layer] = states[base], states[tuned]
            calls.clear()
    outputs = _outputs(pairs, subjects, places, batch, hidden, rows)
    finite = [(stream.isfinite().all(-1).to(real.device) | ~real).all(1) for stream in hidden]
    return [
        Pending(
            pair,
            batch,
            {
                "heads": torch.stack(heads[number], dim=3),
                "layers": torch.stack(layers[number], dim=3),
                "outputs": outputs[number],
                "pooled": pooled[number],
                "finite": torch.stack([finite[side] for side in places[number]], dim=1),
            },
            tuple(batch.examples[number].id for number in at),
        )
        for number, pair in enumerate(pairs)
    ]


def models_of(pairs: Sequence[Pair]) -> list[Subject]:
    """Return the models of some pairs, each once."""
    return list({id(side): side for pair in pairs for side in (pair.base, pair.tuned)}.values())


def _attention(
    base: AttentionCall, tuned: AttentionCall, padding: Padding, rows: Bool[Tensor, "batch rows token"], *, gini: bool, method: Method
) -> Float[Tensor, "batch rows measure head"]:
    compared = compare(base, tuned, padding, gini=gini, method=method)
    z_distance = cosine_distance(base.z, tuned.z.to(base.z.device)).transpose(1, 2)
    sides: tuple[PatternStatistics, ...] = (compared.base, compared.tuned)
    values = [getattr(side, name) for name in PATTERN_MEASURES for side in sides]
    values += [compared.tuned.entropy - compared.base.entropy, compared.kl_base_tuned, compared.kl_tuned_base, z_distance]
    if gini:
        values += [side.gini for side in sides]
    return torch.stack([row_means(value, rows) for value in values], dim=2)


def _mean_over_heads(heads: Float[Tensor, "batch rows measure head"]) -> Float[Tensor, "batch rows 5"]:
    # one by one: a list of places would be copied to the device, which waits for it
    return torch.stack([heads[:, :, HEAD_MEASURES.index(name)].mean(-1) for name in _MEANS], dim=2)


def _residual(
    base: Float[Tensor, "batch token d"], tuned: Float[Tensor, "batch token d"], rows: Bool[Tensor, "batch rows token"]
) -> Float[Tensor, "batch rows 5"]:
    """Measure the residual stream after a block: size by two norms, and direction."""
    streams = (base.float() if base.dtype != torch.float64 else base, tuned.float() if tuned.dtype != torch.float64 else tuned)
    values = [stream.norm(dim=-1) for stream in streams] + [stream.abs().mean(-1) for stream in streams] + [cosine_distance(*streams)]
    return row_means(torch.stack(values, dim=1), rows)


def _pooled(
    stream: Float[Tensor, "batch token d"], rows: Bool[Tensor, "batch rows token"], sampled: Int[Tensor, " sampled"]
) -> Float[Tensor, "sampled rows d"]:
    """Average the residual stream over each kind of row of some documents."""
    here = sampled.to(stream.device)
    return row_means(stream[here].transpose(1, 2), rows.to(stream.device)[here])


def cosine_distance(x: Float[Tensor, "*shape d"], y: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
    """Return 1 − cosine as half the squared distance of the unit vectors: no cancellation, and exactly zero for equal vectors."""
    x, y = (value if value.dtype == torch.float64 else value.float() for value in (x, y))
    return (normalize(x, dim=-1) - normalize(y, dim=-1)).square().sum(-1) / 2


def _outputs(
    pairs: Sequence[Pair],
    subjects: Sequence[Subject],
    places: Sequence[tuple[int, int]],
    batch: Batch,
    hidden: Sequence[Float[Tensor, "batch token d"]],
    rows: Bool[Tensor, "batch rows token"],
) -> list[Float[Tensor, "batch rows measure"]]:
    """Compare next-token distributions: at the position before each real token, counted to the kind of row of the token predicted."""
    predicted = batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]
    # computed on the CPU and sent at once: an index from the CPU for every chunk would wait for the device every time
    at = predicted.nonzero()
    targets = sent(batch.input_ids[at[:, 0], at[:, 1] + 1], rows.device)
    sites = [sent(at, stream.device) for stream in hidden]
    step = max(1, _LOGITS // max(subject.anatomy.vocab_size for subject in subjects))
    parts: list[list[Tensor]] = [[] for _ in pairs]
    for wanted, *chunks in zip(*(each.split(step) for each in (targets, *sites)), strict=True):
        logs: dict[tuple[int, int], Tensor] = {}
        for number, (pair, sides) in enumerate(zip(pairs, places, strict=True)):
            size = pair.vocab_size
            for side in sides:
                if (side, size) not in logs:
                    chosen = hidden[side][chunks[side][:, 0], chunks[side][:, 1]]
                    logs[side, size] = _log_probabilities(subjects[side], chosen, size)
            parts[number].append(_compare_logits(logs[sides[0], size], logs[sides[1], size], wanted))
    row, token = sites[0].to(rows.device).unbind(1)
    means = []
    for values in parts:
        by_token = torch.full((len(OUTPUT_MEASURES), *predicted.shape), torch.nan, dtype=torch.float64, device=rows.device)
        by_token[:, row, token] = torch.cat(values, dim=1).to(rows.device)
        means.append(row_means(by_token.transpose(0, 1), rows[:, :, 1:]))
    return means


def _log_probabilities(subject: Subject, hidden: Float[Tensor, "n d"], size: int) -> Float[Tensor, "n vocab"]:
    """Return the log-probabilities of the first `size` tokens among themselves."""
    return torch.log_softmax(unembed(subject, hidden)[:, :size], -1, dtype=statistics_dtype(hidden.dtype))


def _compare_logits(p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"], targets: Tensor) -> Float[Tensor, "measure n"]:
    """Return `OUTPUT_MEASURES` of some rows, from log-probabilities. Tokens outside a truncated shared vocabulary have no loss (NaN)."""
    q, targets = q.to(p.device), targets.to(p.device)
    inside = targets < p.shape[1]
    index = targets.clamp(max=p.shape[1] - 1)[:, None]
    losses = [-log.gather(1, index)[:, 0].masked_fill(~inside, torch.nan) for log in (p, q)]
    difference = p - q
    forward, backward = p.exp().mul_(difference).sum(-1), -q.exp().mul_(difference).sum(-1)
    return torch.stack([forward, backward, *losses, losses[1] - losses[0]]).double()
