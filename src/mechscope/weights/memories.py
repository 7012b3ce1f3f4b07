"""The MLP as a key–value memory: what each neuron fires on, and what its value then promotes.

Geva et al. 2021, "Transformer feed-forward layers are key-value memories": a neuron's key is read off the texts that drive it most (section 3), its
value off the vocabulary (section 4). *Agreement*: the token that a value promotes most is the token that comes next where the neuron fires most. A
neuron of a gated MLP may be driven either way; where its activation is negative it promotes what its value suppresses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument.mlp import Mlps
from mechscope.stats.inference import share_interval
from mechscope.subject import Subject
from mechscope.subject.spelling import Spelling
from mechscope.weights.activity import Activity
from mechscope.weights.neurons import names, written_tokens
from mechscope.weights.vocabulary import Vocabulary

# around the token that a neuron fired on, as printed in a context
MARKS = ("⟦", "⟧")
# of a context whose text ends there
_END = -1

COLUMNS = (
    *("layer", "neuron", "component", "place", "activation", "text", "position"),
    *("token", "context", "next", "promoted", "agrees", "token_id", "next_id"),
)


@torch.no_grad()
def memories(
    subject: Subject,
    activity: Activity,
    texts: Pairs,
    *,
    layers: Collection[int] | None = None,
    neurons: Collection[tuple[int, int]] | None = None,
    before: int = 12,
    k: int = 5,
) -> pd.DataFrame:
    """List the contexts that drive neurons most, and what the neurons then promote.

    Args:
        subject: The model that the activity is of.
        activity: What `neuron_activity` found.
        texts: The texts it was measured on.
        layers: All neurons of some layers.
        neurons: Some neurons, as (layer, neuron); by default all of all layers.
        before: Tokens of a context before the marked one.
        k: Promoted tokens that are listed.

    Returns:
        One row per neuron and context, strongest first: `layer`, `neuron`, `component`, `place` (from 1), `activation`, `text` (its id), `position`,
        `token` (the one it fired on), `context` (it and the tokens before, it between `MARKS`), `next` (the token that follows; None at the end of a
        text), `promoted` (list of the k tokens that this activation promotes most), `agrees` (whether `next` is the first of them; None at the end),
        `token_id`, `next_id` (-1 at the end). Neurons that were never driven have no rows.

    Raises:
        DataError: The texts are not those of the activity.
        SettingsError: A layer or neuron does not exist, or a number is out of range.
        ModelError: The model came without a tokenizer, or is not the one that the activity is of.
    """
    if before < 0 or k < 1:
        raise SettingsError(
            f"before = {before} and k = {k}: a context has 0 or more tokens before its own, and 1 or more promoted tokens are listed"
        )
    if subject.tokenizer is None:
        raise ModelError(f"model {subject.source!r} came without a tokenizer: contexts cannot be written as text; load it with one")
    mlps, vocabulary, reader = Mlps(subject), Vocabulary(subject, embedding="raw"), _Reader(activity, texts)
    parts = []
    for layer, own in mlps.chosen(layers, neurons):
        contexts = reader.contexts(mlps, layer, own)
        promoted = _promoted(vocabulary, mlps[layer].down[own], contexts, k)
        columns = {**names(layer, own[contexts.neuron].numpy()), "place": contexts.place + 1, "activation": contexts.activation.double()}
        columns["text"] = [activity.texts[text] for text in contexts.text.tolist()]
        columns |= {"position": contexts.position, "token_id": contexts.token, "next_id": contexts.next}
        columns["context"] = [reader.written(subject.spelling, *where, before=before) for where in contexts.where()]
        columns |= {"promoted": promoted.tolist(), "agrees": pd.Series(_agrees(contexts, promoted), dtype=object)}
        parts.append(pd.DataFrame(columns))
    return _in_words(pd.concat(parts, ignore_index=True), vocabulary)


@torch.no_grad()
def agreement(subject: Subject, activity: Activity, texts: Pairs) -> pd.DataFrame:
    """Measure per layer how often what a neuron's value promotes most is what comes next where the neuron fires most (Geva et al. 2021, section 4).

    Args:
        subject: The model that the activity is of.
        activity: What `neuron_activity` found.
        texts: The texts it was measured on.

    Returns:
        One row per layer: `layer`, `n` (neurons whose strongest context has a next token), `agreement` (share of them that agree there), `agreement_low`
        and `agreement_high` (Wilson, as if neurons were independent), `agreement_chance` (the share if contexts were dealt out among the layer's
        neurons at random), `agreement_contexts` (share over all contexts).

    Raises:
        DataError: The texts are not those of the activity.
        ModelError: The model is not the one that the activity is of.
    """
    mlps, vocabulary, reader = Mlps(subject), Vocabulary(subject, embedding="raw"), _Reader(activity, texts)
    rows = []
    for layer, own in mlps.chosen(None, None):
        contexts = reader.contexts(mlps, layer, own)
        promoted = _promoted(vocabulary, mlps[layer].down, contexts, 1)[:, 0]
        known, agrees = contexts.next != _END, promoted == contexts.next
        first = known & (contexts.place == 0)
        n, hits = int(first.sum()), int(agrees[first].sum())
        low, high = share_interval(hits, n)
        dealt = [torch.bincount(tokens[first], minlength=vocabulary.size).double() for tokens in (promoted, contexts.next)]
        row = {"layer": layer, "n": n, "agreement": hits / n if n else np.nan, "agreement_low": low, "agreement_high": high}
        row["agreement_chance"] = float(dealt[0] @ dealt[1]) / n**2 if n else np.nan
        rows.append({**row, "agreement_contexts": float(agrees[known].double().mean())})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Contexts:
    """The filled contexts of some neurons of a layer, by neuron, strongest first (place 0); `next` is `_END` at the end of a text."""

    neuron: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    text: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    next: Int[Tensor, " n"]

    def where(self) -> Iterator[tuple[int, int]]:
        """Yield every context's text and position."""
        return zip(self.text.tolist(), self.position.tolist(), strict=True)


class _Reader:
    """Texts, to look contexts up in."""

    def __init__(self, activity: Activity, texts: Pairs) -> None:
        self._activity = activity
        if tuple(pair.id for pair in texts) == activity.texts:
            # by their place, as an id may stand for several texts
            self._tokens = [pair.clean for pair in texts]
            return
        tokens = {pair.id: pair.clean for pair in texts}
        if several := [pair.id for pair in texts if tokens[pair.id] != pair.clean]:
            raise DataError(
                f"{several[0]!r} names several of the texts ({texts.source}): give exactly the texts that the activity was measured on"
            )
        if missing := [text for text in activity.texts if text not in tokens]:
            raise DataError(
                f"text {missing[0]!r} of the activity is not among the texts ({texts.source}): give the texts that it was measured on"
            )
        self._tokens = [tokens[text] for text in activity.texts]

    def contexts(self, mlps: Mlps, layer: int, neurons: Int[Tensor, " some"]) -> _Contexts:
        if tuple(len(one.active) for one in self._activity.layers) != mlps.widths:
            raise ModelError(f"the activity is of another model than {mlps.subject.source!r}: numbers of layers or neurons differ")
        top = self._activity.layers[layer].contexts
        neuron, place = top.filled[:, neurons].T.nonzero().unbind(1)
        at = place, neurons[neuron]
        text, position = top.text[at], top.position[at]
        following = [self._following(*where) for where in zip(text.tolist(), position.tolist(), strict=True)]
        return _Contexts(neuron, place, top.activation[at], text, position, top.token[at], torch.tensor(following, dtype=torch.int64))

    def written(self, spelling: Spelling, text: int, position: int, *, before: int) -> str:
        tokens = self._tokens[text]
        head, own = tokens[max(0, position - before) : position], tokens[position]
        return f"{spelling.text(head)}{MARKS[0]}{spelling.text([own])}{MARKS[1]}"

    def _following(self, text: int, position: int) -> int:
        tokens = self._tokens[text]
        return tokens[position + 1] if position + 1 < len(tokens) else _END


def _promoted(vocabulary: Vocabulary, down: Float[Tensor, "neuron d_model"], contexts: _Contexts, k: int) -> Int[Tensor, "n k"]:
    """Return what each context's activation promotes most, by its sign."""
    promoted, suppressed = (best.tokens.cpu()[contexts.neuron] for best in written_tokens(vocabulary, down, min(k, vocabulary.size)))
    return promoted.where((contexts.activation > 0)[:, None], suppressed)


def _agrees(contexts: _Contexts, promoted: Int[Tensor, "n k"]) -> list[bool | None]:
    same = (promoted[:, 0] == contexts.next).tolist()
    return [None if following == _END else agrees for following, agrees in zip(contexts.next.tolist(), same, strict=True)]


def _in_words(table: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame:
    """Write the columns of token ids as text."""
    spelling = vocabulary.subject.spelling
    return table.assign(
        token=table["token_id"].map(spelling.token),
        next=pd.Series([None if token == _END else spelling.token(token) for token in table["next_id"]], dtype=object),
        promoted=pd.Series([spelling.tokens(tokens) for tokens in table["promoted"]], dtype=object),
    )[list(COLUMNS)]
