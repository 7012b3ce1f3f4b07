"""Where latents are active most, and which tokens they promote: what a person reads to say what a latent stands for.

examples    of every latent its largest values, from different texts: one pass, held are `count` places of each latent whatever the length of the text
promoted    tokens by the logits that a decoder row adds to them (scale of the final norm left out), less their mean over the vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import SettingsError
from mechscope.features.codes import Codes
from mechscope.features.dictionary import Dictionary
from mechscope.features.places import Place
from mechscope.features.rows import TOKENS_PER_BATCH, Models, reader_of, require_rows
from mechscope.instrument import Execution
from mechscope.instrument.readout import Readout
from mechscope.instrument.texts import over_texts
from mechscope.settings.features import TokenSettings
from mechscope.shapes import by_shape
from mechscope.subject import Subject

# sites whose decoder rows are added to the residual stream
_WRITES = frozenset({"residual", "attention_output", "mlp_output"})
# values of single precision: equal texts are not put in order by how they were batched
_ENTRY = np.dtype([("latent", "i8"), ("text", "i8"), ("position", "i8"), ("value", "f4")])


@dataclass(frozen=True)
class Examples:
    """Where latents are active most.

    Attributes:
        table: One row per latent and example, the largest first: `latent`, `rank` (from 1), `text` (its place among the texts), `position` (its token),
            `value`.
        energy: ``(latent)``: Σ f² over all tokens that were read.
        tokens: Tokens that were read.
    """

    table: pd.DataFrame
    energy: np.ndarray
    tokens: int

    __repr__ = by_shape

    def strongest(self, count: int) -> list[int]:
        """Return the latents that carry most of what the dictionary writes: with decoders of norm one, those of the largest energy."""
        order = np.lexsort((np.arange(len(self.energy)), -self.energy))
        return [int(latent) for latent in order[:count] if self.energy[latent] > 0]


@dataclass(frozen=True)
class _Found:
    entries: np.ndarray
    energy: np.ndarray
    tokens: int


def top_examples(
    models: Models,
    dictionary: Dictionary,
    texts: Pairs,
    *,
    count: int = 8,
    tokens: TokenSettings | None = None,
    other_model: bool = False,
    execution: Execution = Execution(),
) -> Examples:
    """Find where each latent is active most, one token of a text at most.

    Args:
        models: The model, or several by name.
        dictionary: The dictionary.
        texts: Any texts; their clean versions are read.
        count: Examples of a latent.
        tokens: Which tokens are left out; None for those that its training left out, or the defaults where that is not known.
        other_model: Allow a dictionary of a model with other weights.
        execution: Tokens of a batch, progress.

    Raises:
        MechscopeError: The dictionary or the texts do not fit, or no token is left.
    """
    if count < 1:
        raise SettingsError(f"count={count}: ask for at least one example of a latent")
    reader = reader_of(models, dictionary, texts, tokens, other_model=other_model, execution=execution)

    def work(batch: PairBatch) -> _Found:
        rows = reader.rows(batch)
        inputs = [rows.values[place].to(dictionary.device, dictionary.dtype) for place in dictionary.layout.inputs]
        codes = dictionary.encode(inputs)
        return _Found(_entries(codes, rows.text, rows.position), codes.total(codes.values.square()).double().cpu().numpy(), len(rows))

    kept, energy, read = np.zeros(0, dtype=_ENTRY), np.zeros(dictionary.latents), 0
    for _, found in over_texts(texts, work, execution, tokens=TOKENS_PER_BATCH, label="examples"):
        kept = _largest(np.concatenate([kept, found.entries]), count)
        energy += found.energy
        read += found.tokens
    require_rows(read, texts, reader.tokens)
    rank = np.arange(len(kept)) - np.searchsorted(kept["latent"], kept["latent"]) + 1
    columns = {
        "latent": kept["latent"],
        "rank": rank,
        "text": kept["text"],
        "position": kept["position"],
        "value": kept["value"].astype(float),
    }
    return Examples(pd.DataFrame(columns), energy, read)


def _entries(codes: Codes, text: Tensor, position: Tensor) -> np.ndarray:
    rows = codes.rows.cpu()
    entries = np.zeros(len(rows), dtype=_ENTRY)
    entries["latent"], entries["text"], entries["position"] = codes.latents.cpu(), text[rows], position[rows]
    entries["value"] = codes.values.float().cpu()
    return entries


def _largest(entries: np.ndarray, count: int) -> np.ndarray:
    """Return the largest entries of each latent, one of a text: latent after latent, the largest first."""
    entries = entries[np.lexsort((entries["position"], -entries["value"], entries["text"], entries["latent"]))]
    new = np.ones(len(entries), dtype=bool)
    new[1:] = (np.diff(entries["latent"]) != 0) | (np.diff(entries["text"]) != 0)
    entries = entries[new]
    entries = entries[np.lexsort((entries["text"], -entries["value"], entries["latent"]))]
    return entries[np.arange(len(entries)) - np.searchsorted(entries["latent"], entries["latent"]) < count]


@torch.no_grad()
def promoted_tokens(subject: Subject, dictionary: Dictionary, latents: Sequence[int], *, k: int = 8) -> list[tuple[list[int], list[int]]]:
    """Return of some latents the tokens that their decoder rows promote most, and those that they suppress most, at the first place they write.

    Raises:
        SettingsError: The dictionary writes nothing into the residual stream.
    """
    place = dictionary.layout.outputs[0]
    if not writes_residual(place):
        raise SettingsError(f"a dictionary that writes {place} adds nothing to the residual stream of which tokens could be read")
    readout = Readout.of(subject)
    rows = dictionary.directions(latents, place).to(readout.weight)
    logits = readout.folded(rows) @ readout.weight.T
    return [(row.topk(k).indices.tolist(), (-row).topk(k).indices.tolist()) for row in logits]


def writes_residual(place: Place) -> bool:
    """Tell whether what stands at a place is, or is added to, the residual stream."""
    return place.site in _WRITES
