"""Does a head copy? From its OV circuit alone, by eigenvalues and by ranks.

A head copies if attending to a token raises that token's logit. Elhage et al. (2021) read this off the eigenvalues λ of the full circuit W_E W_OV W_U:
Σλ / Σ|λ| is 1 where all are positive, −1 where all are negative (copy suppression, McDougall et al. 2023), and 0 on average at random. A Bᵀ and BᵀA
share their non-zero eigenvalues, so a d_head × d_head matrix has them all. Ranks say it of single tokens: in what share of them is the token
itself among the k whose logits it raises (or lowers) most?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.shapes import by_shape
from mechscope.subject.components import Components, chosen_heads
from mechscope.subject.load import Subject
from mechscope.weights.forms import Forms
from mechscope.weights.rotary import is_bilinear
from mechscope.weights.vocabulary import Embedding, Vocabulary

# sampled tokens whose logits are held at once: 64 × 50,257 float32 are 12 MiB
_SAMPLED = 64


@dataclass(frozen=True)
class Eigenvalues:
    """The non-zero eigenvalues of A Bᵀ.

    Attributes:
        values: ``(rank,)``, complex.
    """

    values: Tensor

    __repr__ = by_shape

    @classmethod
    def of(cls, a: Float[Tensor, "vocab rank"], b: Float[Tensor, "vocab rank"]) -> Eigenvalues:
        """Find them from BᵀA."""
        return cls(torch.linalg.eigvals(b.T.double() @ a.double()))

    @property
    def score(self) -> float:
        """Σλ / Σ|λ|, from −1 to 1; NaN where all are zero."""
        return _ratio(float(self.values.real.sum()), float(self.values.abs().sum()))

    @property
    def positive(self) -> float:
        """The share, 0–1, of Σ|λ| that belongs to eigenvalues with a positive real part; NaN where all are zero."""
        return _ratio(float(self.values.abs()[self.values.real > 0].sum()), float(self.values.abs().sum()))


def copied(a: Float[Tensor, "vocab rank"], b: Float[Tensor, "vocab rank"], tokens: Sequence[int], *, k: int) -> tuple[float, float]:
    """Return the shares (0–1) of tokens that are among the k largest, and among the k smallest, of their own row of A Bᵀ."""
    high = low = 0
    for ids in torch.tensor(tokens, device=a.device).split(_SAMPLED):
        entries = a[ids] @ b.T
        own = entries.gather(1, ids[:, None].to(entries.device))
        high += int(((entries > own).count_nonzero(1) < k).sum())
        low += int(((entries < own).count_nonzero(1) < k).sum())
    return high / len(tokens), low / len(tokens)


@torch.no_grad()
def weight_heads(
    subject: Subject,
    *,
    heads: Components | str | None = None,
    tokens: Sequence[int] | None = None,
    n_tokens: int = 512,
    k: int = 5,
    embedding: Embedding = "normalised",
    effective: bool = False,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Describe every head by its weights.

    Args:
        subject: The model.
        heads: Which heads; by default all.
        tokens: The token ids whose own rank is looked at; by default `n_tokens` drawn from the whole vocabulary, most of which are rare words.
        n_tokens: How many to draw; fewer where the vocabulary is smaller.
        k: Among how many a token must be to count as copied.
        embedding: How tokens are read, see `Vocabulary`.
        effective: Add what the first layer's MLP makes of a token to its embedding, see `Vocabulary`.
        execution: Seed (of the draw), progress.

    Returns:
        One row per head: `layer`, `head`, `component`, `ov_norm` and `qk_norm` (Frobenius norms with the norms' gains folded in; of W_QK at offset 0, scaling
        included, NaN where queries and keys have norms of their own), `copying` (Σλ / Σ|λ|, −1 to 1), `positive` (share of Σ|λ| with a positive
        real part), `copied` and `suppressed` (shares of the tokens that are among their own k largest, and k smallest, entries).

    Raises:
        SettingsError: Heads or tokens do not fit the model, or a number is below 1.
        ModelError: The model's heads cannot be taken apart.
    """
    if n_tokens < 1 or k < 1:
        raise SettingsError(f"n_tokens={n_tokens}, k={k}: give at least 1")
    forms, vocabulary = Forms(subject), Vocabulary(subject, embedding=embedding, effective=effective)
    if tokens is None:
        order = torch.randperm(vocabulary.size, generator=torch.Generator().manual_seed(execution.seed))
        tokens = order[:n_tokens].tolist()
    tokens = vocabulary.checked(tokens, "tokens")
    chosen = chosen_heads(subject.anatomy, heads)
    bilinear = {layer: is_bilinear(subject, layer) for layer in {layer for layer, _ in chosen}}
    rows: list[dict[str, Any]] = []
    for layer, head in chosen:
        execution.told("heads", len(rows), len(chosen))
        form = forms.ov(layer, head)
        a, b = vocabulary.read(form, layer), vocabulary.written(form.right)
        eigenvalues, (high, low) = Eigenvalues.of(a, b.to(a.device)), copied(a, b.to(a.device), tokens, k=k)
        row = {"layer": layer, "head": head, "component": f"a{layer}.h{head}", "ov_norm": form.norm()}
        row["qk_norm"] = forms.qk(layer, head).norm() if bilinear[layer] else math.nan
        rows.append({**row, "copying": eigenvalues.score, "positive": eigenvalues.positive, "copied": high, "suppressed": low})
    execution.told("heads", len(chosen), len(chosen))
    return pd.DataFrame(rows)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
