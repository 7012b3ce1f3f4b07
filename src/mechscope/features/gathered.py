"""What is gathered of labelled texts in one pass, of any number of dictionaries: means over each text's tokens, and some of the tokens themselves.

Held while texts are read: a mean per text, sparse codes of it, and some tokens with theirs, drawn from each text alike whatever the batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack

from mechscope import ranks
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.features.absorption import Tokens
from mechscope.features.codes import Codes
from mechscope.features.dictionary import Dictionary
from mechscope.features.probes import Pooled, Writes
from mechscope.features.rows import TOKENS_PER_BATCH, Reader, Rows, rows_together
from mechscope.instrument import Execution
from mechscope.instrument.texts import over_texts

# a set and a dictionary of it
_Name = tuple[str, str]


@dataclass(frozen=True)
class _Part:
    """What a batch holds for some dictionaries: its texts and their means, the tokens that are held and their places, and codes of both by dictionary."""

    text: np.ndarray
    x: np.ndarray
    token_x: np.ndarray
    token_at: np.ndarray
    codes: dict[_Name, csr_matrix] = field(default_factory=dict)
    token_codes: dict[_Name, csr_matrix] = field(default_factory=dict)


def gather(
    readers: Mapping[str, Reader], sets: Mapping[str, Mapping[str, Dictionary]], texts: Pairs, *, held: int, execution: Execution
) -> dict[str, dict[str, tuple[Pooled, Tokens]]]:
    """Read all texts once, whatever the number of sets and dictionaries.

    Args:
        readers: By set, what reads its places; of the same models.
        sets: By set, dictionaries of the same places, by name.
        texts: The texts.
        held: Tokens that are held, as many of each text; at least one of each.
        execution: Tokens of a batch, seed of the tokens that are held, progress.

    Returns:
        By set and dictionary, means per text and the tokens held, whose `text` is text × longest + position. What stands at the places is one array for all
        that read the same.
    """
    each = max(1, -(-held // len(texts)))
    longest = max(len(pair.clean) for pair in texts)
    # sets that read the same rows share what is held of them
    alike: dict[Hashable, tuple[Reader, dict[_Name, Dictionary]]] = {}
    for name, reader in readers.items():
        for inner, dictionary in sets[name].items():
            key = (reader.places, reader.tokens, tuple(reader.limits.items()), dictionary.layout.outputs)
            alike.setdefault(key, (reader, {}))[1][name, inner] = dictionary

    def work(batch: PairBatch) -> list[_Part]:
        every = rows_together([reader for reader, _ in alike.values()], batch)
        return [
            _of_batch(dictionaries, rows, _drawn(rows, each, execution.seed), longest)
            for (_, dictionaries), rows in zip(alike.values(), every, strict=True)
        ]

    own = [found for _, found in over_texts(texts, work, execution, tokens=TOKENS_PER_BATCH, label="concepts", dealt=True)]
    batches = [found for part in ranks.exchange(own) for found in part]
    found: dict[str, dict[str, tuple[Pooled, Tokens]]] = {name: {} for name in sets}
    for (_, dictionaries), parts in zip(alike.values(), zip(*batches, strict=True), strict=True):
        for (name, inner), made in _joined(dictionaries, parts, len(texts)).items():
            found[name][inner] = made
    return found


def _joined(dictionaries: Mapping[_Name, Dictionary], parts: Sequence[_Part], texts: int) -> dict[_Name, tuple[Pooled, Tokens]]:
    text, at = (np.concatenate([getattr(part, name) for part in parts]) for name in ("text", "token_at"))
    order = np.argsort(at)
    means = np.concatenate([part.x for part in parts])
    # a text of which every token is left out has no mean: zero, as for no activation
    x = np.zeros((texts, means.shape[1]))
    x[text] = means
    token_x = np.concatenate([part.token_x for part in parts])[order]
    made = {}
    for name, dictionary in dictionaries.items():
        codes = _placed(vstack([part.codes[name] for part in parts]).tocsr(), text, texts)
        token_codes = vstack([part.token_codes[name] for part in parts]).tocsr()[order]
        made[name] = (Pooled(x, codes, Writes(dictionary)), Tokens(token_x, token_codes, at[order]))
    return made


def _placed(codes: csr_matrix, text: np.ndarray, texts: int) -> csr_matrix:
    spread = csr_matrix((np.ones(len(text)), (text, np.arange(len(text)))), shape=(texts, len(text)))
    return (spread @ codes).tocsr()


def _drawn(rows: Rows, each: int, seed: int) -> np.ndarray:
    """Return which rows are held as tokens: of each text as many, the same whatever the batch."""
    held = np.zeros(len(rows), dtype=bool)
    text = rows.text.numpy()
    for index in np.unique(text):
        own = np.flatnonzero(text == index)
        chosen = np.random.default_rng([seed, int(index)]).permutation(len(own))[:each]
        held[own[chosen]] = True
    return held


def _of_batch(dictionaries: Mapping[_Name, Dictionary], rows: Rows, held: np.ndarray, longest: int) -> _Part:
    first = next(iter(dictionaries.values()))
    x = torch.cat([rows.values[place].double() for place in first.layout.outputs], dim=1).numpy()
    text, back = np.unique(rows.text.numpy(), return_inverse=True)
    counts = np.bincount(back, minlength=len(text))
    mean = csr_matrix((1 / counts[back], (back, np.arange(len(back)))), shape=(len(text), len(back)))
    at = rows.text.numpy() * longest + rows.position.numpy()
    part = _Part(text, mean @ x, x[held], at[held])
    for name, dictionary in dictionaries.items():
        codes = _sparse(
            dictionary.encode([rows.values[place].to(dictionary.device, dictionary.dtype) for place in dictionary.layout.inputs])
        )
        part.codes[name], part.token_codes[name] = (mean @ codes).tocsr(), codes[held]
    return part


def _sparse(codes: Codes) -> csr_matrix:
    return csr_matrix(
        (codes.values.double().cpu().numpy(), codes.latents.cpu().numpy(), codes.offsets.cpu().numpy()), shape=(codes.tokens, codes.width)
    )
