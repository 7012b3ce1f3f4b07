"""The backward lens: what a training step would write into a weight, read in the words of the vocabulary.

A weight's gradient over a text is Σ_i x_iᵀ δ_i. Of a matrix that writes the residual stream (MLP down, W_O) the δ_i live there, of one that reads it (MLP
up, W_Q, W_K, W_V) the x_i do; those are projected through the final norm's gain and W_U (Katz et al. 2024, sections 4 and 5: "imprint and shift"). A
step of gradient descent subtracts the gradient: where the matrix reads something like x_i again it will write −δ_i more. So for δ what is
projected is −δ: its top tokens are those that the step promotes, its bottom tokens those that it suppresses. Inputs are projected as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import check_fits, per_text
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.instrument.kernels import statistics_dtype
from mechscope.instrument.readout import Readout
from mechscope.instrument.texts import over_texts
from mechscope.lens.gradient_factors import Factors, Matrix, factors, matrices_of
from mechscope.lens.question import ROWS
from mechscope.subject import Subject


def backward_lens(
    subject: Subject,
    texts: Pairs,
    *,
    matrices: Sequence[str] = ("mlp_down",),
    layers: Collection[int] | None = None,
    k: int = 10,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Project the gradients of weight matrices into the vocabulary, token by token of every text.

    Args:
        subject: The model.
        texts: Each text's loss is the mean −log p of its target tokens, or of its right answers after the last token if it has no target.
        matrices: Kinds: `query_key_value`, `attention_output`, `mlp_up`, `mlp_down`.
        layers: Which layers; None for all.
        k: How many tokens are listed.
        execution: Tokens of a batch (1,024 by default).

    Returns:
        One row per text, matrix and token that the loss reaches: `text` (id), `layer`, `matrix` (kind), `module` (path), `position`, `token` (text),
        `side` (`gradient` for −δ, `input` for x), `norm` (of that vector), `update_norm` (‖x‖·‖δ‖, the size of the token's share of the weight's
        gradient), `top_ids`, `top_tokens`, `bottom_ids`, `bottom_tokens` (tuples of k, the most extreme first).

    Raises:
        MechscopeError: Texts, matrices or layers do not fit the model, or it cannot be taken apart.
    """
    check_fits(subject, texts)
    wanted, vocabulary = matrices_of(subject, matrices, layers), _Vocabulary(subject, k)

    def projected(batch: PairBatch) -> list[pd.DataFrame]:
        tables = []
        of_batch = factors(subject, batch, wanted)
        for row, pair in enumerate(batch.pairs):
            of_text = []
            here = slice(batch.shift(row), batch.shift(row) + len(pair.clean))
            tokens = np.array(subject.spelling.tokens(pair.clean), dtype=object)
            for matrix in wanted:
                of_matrix = of_batch[matrix.name]
                own = Factors(of_matrix.inputs[row : row + 1, here], of_matrix.gradients[row : row + 1, here])
                reached, columns = _token_columns(matrix, own, vocabulary)
                where = {"text": pair.id, **_names(matrix), "position": reached, "token": tokens[reached]}
                of_text.append(pd.DataFrame({**where, **columns}))
            tables.append(pd.concat(of_text, ignore_index=True))
        return tables

    return pd.concat(per_text(texts, projected, execution, tokens=1024, label="backward lens"), ignore_index=True)


def gradient_directions(
    subject: Subject,
    texts: Pairs,
    *,
    matrices: Sequence[str] = ("mlp_down",),
    layers: Collection[int] | None = None,
    rank: int = 5,
    k: int = 10,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Project the leading singular directions of weight gradients, of the texts' mean loss, into the vocabulary.

    The matrices are never formed: their factors go through QR and a singular value decomposition no larger than the number of tokens.

    Args:
        subject: The model.
        texts: Each text's loss is the mean −log p of its target tokens, or of its right answers after the last token if it has no target.
        matrices: Kinds: `query_key_value`, `attention_output`, `mlp_up`, `mlp_down`.
        layers: Which layers; None for all.
        rank: How many directions.
        k: How many tokens are listed.
        execution: Tokens of a batch (1,024 by default).

    Returns:
        One row per matrix and direction: `layer`, `matrix`, `module`, `direction` (0 is the strongest), `singular_value`, `share` (of the gradient's
        squared Frobenius norm), `side`, `top_ids`, `top_tokens`, `bottom_ids`, `bottom_tokens`. A direction's sign is that of what the step adds
        for the mean input of the texts.

    Raises:
        MechscopeError: Texts, matrices or layers do not fit the model, or it cannot be taken apart.
    """
    check_fits(subject, texts)
    if rank < 1:
        raise SettingsError(f"rank is {rank}: ask for at least one direction")
    wanted, vocabulary = matrices_of(subject, matrices, layers), _Vocabulary(subject, k)
    sums = {matrix.name: _Gradient() for matrix in wanted}
    for _, of_batch in over_texts(
        texts, lambda batch: factors(subject, batch, wanted), execution, tokens=1024, label="gradient directions"
    ):
        for name, of_matrix in of_batch.items():
            sums[name].add(of_matrix, len(texts))
    tables = []
    for matrix in wanted:
        left, values, right = sums[matrix.name].directions()
        number = min(rank, int((values > 0).sum()))
        shares = values**2 / (values**2).sum()
        columns = {"direction": range(number), "singular_value": values[:number].numpy(), "share": shares[:number].numpy()}
        side = _projected_side(matrix, left[:, :number].T, right[:, :number].T)
        tables.append(pd.DataFrame({**_names(matrix), **columns, "side": _side(matrix), **vocabulary.columns(side)}))
    return pd.concat(tables, ignore_index=True)


class _Gradient:
    """A sum of outer products Σ x_iᵀ δ_i, kept as factors: no more rows than the matrix is high."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._mean: Tensor | None = None

    def add(self, of_batch: Factors, texts: int) -> None:
        """Add a batch's share of the mean over texts."""
        reached = of_batch.gradients.flatten(0, 1).any(-1)
        inputs, gradients = (x.flatten(0, 1)[reached] for x in (of_batch.inputs, of_batch.gradients))
        dtype = statistics_dtype(inputs.dtype)
        self._inputs.append(inputs.to(dtype).cpu())
        self._gradients.append(gradients.to(dtype).cpu() / texts)
        total = self._inputs[-1].sum(0)
        self._mean = total if self._mean is None else self._mean + total
        if sum(map(len, self._inputs)) > 2 * inputs.shape[-1]:
            # G = XᵀD with X = QR is Rᵀ(QᵀD): exact, in as many rows as X has columns
            q, r = torch.linalg.qr(torch.cat(self._inputs))
            self._inputs, self._gradients = [r], [q.T @ torch.cat(self._gradients)]

    def directions(self) -> tuple[Float[Tensor, "d_in rank"], Float[Tensor, " rank"], Float[Tensor, "d_out rank"]]:
        """Return U, S, V of the gradient U S Vᵀ as (input, output), each u turned towards the mean input."""
        left, r_left = torch.linalg.qr(torch.cat(self._inputs).T)
        right, r_right = torch.linalg.qr(torch.cat(self._gradients).T)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        u, v = left @ u, right @ vh.T
        sign = torch.where(u.T @ self._mean < 0, -1.0, 1.0).to(u) if self._mean is not None else 1.0
        return u * sign, s, v * sign


class _Vocabulary:
    """Which tokens a direction of the residual stream raises most and least, through the final norm's gain and the unembedding."""

    def __init__(self, subject: Subject, k: int) -> None:
        if not 1 <= k <= subject.anatomy.vocab_size:
            raise SettingsError(f"k is {k}: list at least 1 and at most the vocabulary's {subject.anatomy.vocab_size:,} tokens")
        self._subject, self._k, self._readout = subject, k, Readout.of(subject)

    def columns(self, vectors: Float[Tensor, "rows d_model"]) -> dict[str, list[tuple[Any, ...]]]:
        """Return those tokens, a row's in each tuple, as columns of a table."""
        with self._subject.active():
            rows = self._readout.folded(vectors).to(self._readout.weight)
        columns: dict[str, list[tuple[Any, ...]]] = {name: [] for name in ("top_ids", "top_tokens", "bottom_ids", "bottom_tokens")}
        for piece in rows.split(ROWS):
            logits = piece @ self._readout.weight.T
            for name, largest in (("top", True), ("bottom", False)):
                for ids in logits.topk(self._k, largest=largest).indices.tolist():
                    columns[f"{name}_ids"].append(tuple(ids))
                    columns[f"{name}_tokens"].append(tuple(self._subject.spelling.tokens(ids)))
        return columns


def _token_columns(matrix: Matrix, own: Factors, vocabulary: _Vocabulary) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the positions of a text that its loss reaches, and their columns of the table."""
    dtype = statistics_dtype(own.inputs.dtype)
    inputs, gradients = own.inputs[0].to(dtype), own.gradients[0].to(dtype)
    reached = gradients.any(-1).nonzero().flatten()
    inputs, gradients = inputs[reached], gradients[reached]
    sizes, deltas = inputs.norm(dim=-1), gradients.norm(dim=-1)
    tokens = vocabulary.columns(_projected_side(matrix, inputs, gradients))
    norm = deltas if matrix.writes else sizes
    columns = {"side": _side(matrix), "norm": norm.cpu().numpy(), "update_norm": (sizes * deltas).cpu().numpy()}
    return reached.cpu().numpy(), {**columns, **tokens}


def _projected_side(matrix: Matrix, inputs: Tensor, gradients: Tensor) -> Float[Tensor, "rows d_model"]:
    """Return the vectors that live in the residual stream, turned as a step of gradient descent turns them."""
    if not matrix.writes:
        return inputs
    # behind a norm a change d of what the map gives is written as gain ⊙ d, times a scale: δ has no part along what is normalised
    return -gradients if matrix.gain is None else -gradients * matrix.gain.to(gradients)


def _side(matrix: Matrix) -> str:
    return "gradient" if matrix.writes else "input"


def _names(matrix: Matrix) -> dict[str, Any]:
    return {"layer": matrix.layer, "matrix": matrix.kind, "module": matrix.name}
