"""Singular vectors of heads' circuits, named by tokens (Millidge & Black 2022, "The singular value decompositions of transformer weight matrices are
highly interpretable").

W_OV = Σ σ u ⊗ v: a head that attends to what lies along u writes along v. W_QK likewise pairs directions of queries and keys. Each vector is named by
the tokens that lie along it and against it: those read through the head's norm for what is read, those whose logits it raises and lowers for what
is written. For a pair of models the vectors are those of W_tuned − W_base, named by the base's tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
import torch

from mechscope.errors import SettingsError
from mechscope.subject.components import Components, chosen_heads
from mechscope.weights.bilinear import Bilinear
from mechscope.weights.forms import Model, forms_of
from mechscope.weights.vocabulary import Embedding, Vocabulary

SIDES = {"ov": ("in", "out"), "qk": ("query", "key")}
SINGULAR_COLUMNS = ("layer", "head", "component", "matrix", "index", "value", "side", "sign", "tokens")


@torch.no_grad()
def singular_tokens(
    model: Model,
    *,
    matrix: Literal["ov", "qk"] = "ov",
    heads: Components | str | None = None,
    n: int = 5,
    k: int = 8,
    offset: int = 0,
    embedding: Embedding = "normalised",
    effective: bool = False,
) -> pd.DataFrame:
    """List heads' leading singular vectors with their tokens.

    Args:
        model: A model, or a pair for what fine-tuning changed.
        matrix: `"ov"` or `"qk"`.
        heads: Which heads; by default all.
        n: How many singular vectors.
        k: How many tokens at each end of each.
        offset: Query position less key position for `"qk"` in rotary families.
        embedding: How tokens that are read are projected, see `Vocabulary`.
        effective: Add what the first layer's MLP makes of a token to its embedding, see `Vocabulary`.

    Returns:
        One row per head, vector, side (`in` and `out`, or `query` and `key`) and sign: `layer`, `head`, `component`, `matrix`, `index` (from 1), `value`
        (the singular value), `side`, `sign`, `tokens` (quoted, most extreme first). What is read along the `positive` end of one side is written
        along, or looked for at, the `positive` end of the other, and `negative` likewise; which end is called positive is a convention: the one
        where the second side's most extreme token lies. Heads that fine-tuning left as they were have no rows.

    Raises:
        SettingsError: The matrix is not known, heads or the offset do not fit the model, or n or k is below 1.
        ModelError: Heads cannot be taken apart, or queries and keys have norms of their own.
    """
    if matrix not in SIDES or n < 1 or k < 1:
        raise SettingsError(f"matrix={matrix!r}, n={n}, k={k}: the matrix is ov or qk, and n and k are at least 1")
    forms = forms_of(model)
    vocabulary = Vocabulary(forms.subject, embedding=embedding, effective=effective)
    rows: list[dict[str, Any]] = []
    for layer, head in chosen_heads(forms.subject.anatomy, heads):
        form = forms.ov(layer, head) if matrix == "ov" else forms.qk(layer, head, offset=offset)
        rows += [
            {"layer": layer, "head": head, "component": f"a{layer}.h{head}", "matrix": matrix, **row}
            for row in _of_form(form, vocabulary, layer, matrix, n, k)
        ]
    return pd.DataFrame(rows, columns=list(SINGULAR_COLUMNS))


def _of_form(form: Bilinear, vocabulary: Vocabulary, layer: int, matrix: str, n: int, k: int) -> list[dict[str, Any]]:
    if not form.rank:
        return []
    singular = form.singular()
    values, pair = singular.values[:n].tolist(), Bilinear(singular.left[:n], singular.right[:n])
    first = vocabulary.read(pair, layer)
    second = vocabulary.written(pair.right) if matrix == "ov" else vocabulary.read(pair, layer, side="right")
    high, low = second.amax(0), second.amin(0)
    sign = torch.where(high >= -low, 1.0, -1.0)
    rows = []
    for side, projected in zip(SIDES[matrix], (first * sign.to(first), second * sign.to(second)), strict=True):
        for name, ends in (("positive", projected), ("negative", -projected)):
            best = ends.topk(min(k, len(ends)), dim=0).indices.T.tolist()
            rows += [
                {"index": index, "value": value, "side": side, "sign": name, "tokens": _joined(vocabulary, tokens)}
                for index, (value, tokens) in enumerate(zip(values, best, strict=True), start=1)
            ]
    return sorted(rows, key=lambda row: row["index"])


def _joined(vocabulary: Vocabulary, tokens: list[int]) -> str:
    return " ".join(map(repr, vocabulary.subject.spelling.tokens(tokens)))
