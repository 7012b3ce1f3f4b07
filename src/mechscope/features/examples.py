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

from mechscope.data.pairs import Pairs
from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.observed import Latents
from mechscope.features.places import Place
from mechscope.features.rows import Models
from mechscope.features.windows import strongest, watch
from mechscope.instrument import Execution
from mechscope.instrument.readout import Readout
from mechscope.settings.features import TokenSettings
from mechscope.shapes import by_shape
from mechscope.subject import Subject

# sites whose decoder rows are added to the residual stream
_WRITES = frozenset({"residual", "attention_output", "mlp_output"})


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
        return strongest(self.energy, count)


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
    latents = Latents(models, dictionary, texts, tokens=tokens, other_model=other_model, execution=execution)
    seen = watch(latents, texts, top=count, execution=execution)
    table = pd.DataFrame(
        {"latent": seen.top.unit, "rank": seen.top.rank + 1, "text": seen.top.text, "position": seen.top.position, "value": seen.top.value}
    )
    return Examples(table, seen.energy, seen.tokens)


@torch.no_grad()
def promoted_tokens(
    subject: Subject, dictionary: Dictionary, latents: Sequence[int], *, k: int = 8, place: Place | None = None
) -> list[tuple[list[int], list[int]]]:
    """Return of some latents the tokens that their decoder rows promote most, and those that they suppress most.

    Args:
        subject: The model.
        dictionary: The dictionary.
        latents: Which latents.
        k: Tokens of each list.
        place: Where they write; None for all that they add in the first model: a latent of a cross-layer transcoder adds to many layers.

    Raises:
        SettingsError: The dictionary writes nothing into the residual stream there.
    """
    first = dictionary.layout.outputs[0] if place is None else place
    if not writes_residual(first):
        raise SettingsError(f"a dictionary that writes {first} adds nothing to the residual stream of which tokens could be read")
    places = [first]
    if place is None and first.site != "residual":  # what stands in the stream at one place stands there at the next: it is not added again
        places = [each for each in dictionary.layout.outputs if each.model == first.model and writes_residual(each)]
    readout = Readout.of(subject)
    rows = torch.stack([dictionary.directions(latents, each) for each in places]).sum(0).to(readout.weight)
    logits = readout.folded(rows) @ readout.weight.T
    k = min(k, logits.shape[1])
    return [(row.topk(k).indices.tolist(), (-row).topk(k).indices.tolist()) for row in logits]


def writes_residual(place: Place) -> bool:
    """Tell whether what stands at a place is, or is added to, the residual stream."""
    return place.site in _WRITES
