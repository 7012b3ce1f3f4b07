"""Neurons in vocabulary space, from weights alone: which tokens a neuron reads, and which it promotes and suppresses.

An MLP is a memory of keys (rows of W_in) and values (columns of W_out): a key matches patterns of the input, its value is a distribution over the
vocabulary (Geva et al. 2021, "Transformer feed-forward layers are key-value memories"; Geva et al. 2022, section 3; Dar et al. 2023). Keys are held
against the token embeddings, values against what the logits read. How a value spreads over the vocabulary tells prediction neurons (a few tokens
promoted: high kurtosis, positive skew) from suppression neurons (negative skew) and partition neurons (high variance): Gurnee et al. 2024, "Universal
neurons in GPT2 language models", section 5.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.instrument.mlp import Mlp, Mlps, Reading
from mechscope.instrument.norms import Norm
from mechscope.instrument.readout import Readout
from mechscope.shapes import by_shape
from mechscope.subject import Subject
from mechscope.weights.vocabulary import Vocabulary

# entries of a block of vocabulary × neurons; 64 MiB in float32
_ENTRIES = 2**24
# rows of the embedding or unembedding worked on at once; of width 4,096 in float32 they are 64 MiB
_ROWS = 4096
# over the vocabulary, a heavier tail than this means few tokens that stand out (as in the authors' analysis; a normal distribution has 3)
HEAVY_TAIL = 10.0

TOKEN_COLUMNS = ("layer", "neuron", "component", "side", "place", "token", "value", "token_id")


@dataclass(frozen=True)
class TopTokens:
    """The most extreme tokens of some neurons, most extreme first."""

    tokens: Int[Tensor, "neuron k"]
    values: Float[Tensor, "neuron k"]

    __repr__ = by_shape


@torch.no_grad()
def neuron_tokens(
    subject: Subject,
    *,
    layers: Collection[int] | None = None,
    neurons: Collection[tuple[int, int]] | None = None,
    k: int = 10,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """List what neurons read and write in vocabulary space.

    Args:
        subject: The model.
        layers: All neurons of some layers.
        neurons: Some neurons, as (layer, neuron); by default all of all layers.
        k: Tokens per side.
        execution: Progress.

    Returns:
        One row per neuron, side and place (from 1): `layer`, `neuron`, `component` (`m3.n17`), `side`, `place`, `token`, `value`, `token_id`. Sides:
        `in`: what would go into the activation if the residual stream were the token's embedding alone (no position), bias included, largest first; in
        gated MLPs that is the side `gate`, and `in` is what is multiplied with it, largest in size first, as either sign acts. `promoted` and
        `suppressed`: what an activation of 1 adds to the token's logit, less the mean over the vocabulary, where the scales of the norms on the way (the
        final one; one behind the MLP) are 1. Of equal values, any come first.

    Raises:
        SettingsError: A layer or neuron does not exist, or k is below 1.
        ModelError: The model's MLPs or embedding cannot be taken apart.
    """
    if k < 1:
        raise SettingsError(f"the top {k} tokens of a neuron: ask for at least 1")
    mlps, vocabulary = Mlps(subject), Vocabulary(subject, embedding="raw")
    chosen = list(mlps.chosen(layers, neurons))
    parts = []
    for done, (layer, own) in enumerate(chosen):
        execution.told("neurons", done, len(chosen))
        for side, best in _sides(vocabulary, mlps[layer], own, min(k, vocabulary.size)):
            parts.append(_token_rows(layer, own, side, best))
    execution.told("neurons", len(chosen), len(chosen))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(token=table["token_id"].map(vocabulary.subject.spelling.token))[list(TOKEN_COLUMNS)]


@torch.no_grad()
def neuron_weights(
    subject: Subject,
    *,
    layers: Collection[int] | None = None,
    neurons: Collection[tuple[int, int]] | None = None,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Describe neurons' weights: their sizes, whether they write what they read, and how what they write spreads over the vocabulary.

    The spread is that of the cosines between what a neuron writes and every token's unembedding (the final norm's gain and centring folded in, less
    the mean over the vocabulary, on which no probability depends), as Gurnee et al. (2024) take it.

    Args:
        subject: The model.
        layers: All neurons of some layers.
        neurons: Some neurons, as (layer, neuron); by default all of all layers.
        execution: Progress.

    Returns:
        One row per neuron: `layer`, `neuron`, `component`; `norm_in`, `norm_gate` (NaN without gates), `norm_out`: lengths of the weights with the norms'
        gains folded in; `cosine_in_out`, `cosine_gate_out`: −1 for a neuron that erases what it reads, 1 for one that amplifies it; `vocabulary_variance`,
        `vocabulary_skew`, `vocabulary_kurtosis` (3 for a normal distribution); `kind`: `prediction` or `suppression` where the kurtosis is above
        `HEAVY_TAIL`, by the sign of the skew, else `""`: a candidate from its weights, to be confirmed on data. A neuron that writes nothing has NaN there.

    Raises:
        SettingsError: A layer or neuron does not exist.
        ModelError: The model's MLPs or embedding cannot be taken apart.
    """
    mlps, vocabulary = Mlps(subject), Vocabulary(subject, embedding="raw")
    lengths = _direction_lengths(Readout.of(subject))
    chosen = list(mlps.chosen(layers, neurons))
    tables = []
    for done, (layer, own) in enumerate(chosen):
        execution.told("neurons", done, len(chosen))
        columns = {**_sizes(mlps[layer], own), **_spread(vocabulary, mlps[layer].down[own], lengths)}
        named = {name: value.double().cpu().numpy() for name, value in columns.items()}
        tables.append(pd.DataFrame({**names(layer, own.numpy()), **named}))
    execution.told("neurons", len(chosen), len(chosen))
    table = pd.concat(tables, ignore_index=True)
    heavy, positive = table["vocabulary_kurtosis"] > HEAVY_TAIL, table["vocabulary_skew"] > 0
    return table.assign(kind=np.where(heavy, np.where(positive, "prediction", "suppression"), ""))


def written_tokens(vocabulary: Vocabulary, down: Float[Tensor, "neuron d_model"], k: int) -> tuple[TopTokens, TopTokens]:
    """Return the k tokens that vectors in the residual stream promote most, and the k that they suppress most."""
    parts: tuple[list[TopTokens], list[TopTokens]] = ([], [])
    for rows in down.split(max(1, _ENTRIES // vocabulary.size)):
        values = vocabulary.written(rows).T.contiguous()  # the copy takes a fraction of what a search down the columns does
        for largest, side in zip((True, False), parts, strict=True):
            best = values.topk(k, dim=1, largest=largest)
            side.append(TopTokens(best.indices, best.values))
    return _joined(parts[0]), _joined(parts[1])


def names(layer: int, neurons: np.ndarray) -> dict[str, object]:
    """Return the columns that say which neuron a row is about."""
    return {"layer": layer, "neuron": neurons, "component": [f"m{layer}.n{neuron}" for neuron in neurons.tolist()]}


def _sides(vocabulary: Vocabulary, mlp: Mlp, neurons: Int[Tensor, " some"], k: int) -> Iterator[tuple[str, TopTokens]]:
    if mlp.gate is not None:
        yield "gate", _read_tokens(vocabulary, mlp.norm, mlp.gate, neurons, k, by_size=False)
    yield "in", _read_tokens(vocabulary, mlp.norm, mlp.up, neurons, k, by_size=mlp.gate is not None)
    promoted, suppressed = written_tokens(vocabulary, mlp.down[neurons], k)
    yield "promoted", promoted
    yield "suppressed", suppressed


def _read_tokens(
    vocabulary: Vocabulary, norm: Norm | None, side: Reading, neurons: Int[Tensor, " some"], k: int, *, by_size: bool
) -> TopTokens:
    embedding, parts = vocabulary.rows(0), []
    scales = None if norm is None else torch.cat([norm.normalised(rows)[1] for rows in embedding.split(_ROWS)])[:, 0]
    for some in neurons.split(max(1, _ENTRIES // vocabulary.size)):
        values = side.weight[some].to(embedding) @ embedding.T
        if scales is not None:
            values.mul_(scales)
        values.add_(side.constant[some].to(values)[:, None])
        best = (values.abs() if by_size else values).topk(k, dim=1).indices
        parts.append(TopTokens(best, values.gather(1, best)))
    return _joined(parts)


def _joined(parts: list[TopTokens]) -> TopTokens:
    return TopTokens(torch.cat([part.tokens for part in parts]), torch.cat([part.values for part in parts]))


def _token_rows(layer: int, neurons: Int[Tensor, " some"], side: str, best: TopTokens) -> pd.DataFrame:
    n, k = best.tokens.shape
    columns = {**names(layer, neurons.repeat_interleave(k).numpy()), "side": side, "place": np.tile(np.arange(1, k + 1), n)}
    columns |= {"value": best.values.flatten().double().cpu().numpy(), "token_id": best.tokens.flatten().cpu().numpy()}
    return pd.DataFrame(columns)


def _sizes(mlp: Mlp, neurons: Int[Tensor, " some"]) -> dict[str, Tensor]:
    down, inside = mlp.down[neurons], mlp.up.weight[neurons]
    missing = torch.full((len(neurons),), torch.nan)
    gate = None if mlp.gate is None else mlp.gate.weight[neurons]
    return {
        "norm_in": inside.norm(dim=1),
        "norm_gate": missing if gate is None else gate.norm(dim=1),
        "norm_out": down.norm(dim=1),
        "cosine_in_out": torch.cosine_similarity(inside, down),
        "cosine_gate_out": missing if gate is None else torch.cosine_similarity(gate, down),
    }


def _direction_lengths(readout: Readout) -> Float[Tensor, "vocab 1"]:
    """Return the lengths of all tokens' unembeddings, less their mean."""
    pieces = torch.arange(len(readout.weight)).split(_ROWS)
    mean = torch.stack([readout.directions(tokens).double().sum(0) for tokens in pieces]).sum(0) / len(readout.weight)
    return torch.cat([(readout.directions(tokens) - mean).norm(dim=1, keepdim=True) for tokens in pieces])


def _spread(vocabulary: Vocabulary, down: Float[Tensor, "neuron d_model"], lengths: Float[Tensor, "vocab 1"]) -> dict[str, Tensor]:
    moments = []
    for rows in down.split(max(1, _ENTRIES // vocabulary.size)):
        written = vocabulary.written(rows)
        cosines = written / (lengths.to(written) * rows.norm(dim=1).to(written))
        centred = cosines - cosines.mean(0)
        squares = centred.square()
        variance = squares.mean(0)
        moments.append(torch.stack([variance, (squares * centred).mean(0) / variance**1.5, squares.square().mean(0) / variance.square()]))
    variance, skew, kurtosis = torch.cat(moments, dim=1)
    return {"vocabulary_variance": variance, "vocabulary_skew": skew, "vocabulary_kurtosis": kurtosis}
