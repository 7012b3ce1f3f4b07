"""A planted effect, of which the truth is known: directions that a made-up fine-tuning writes on known tokens.

    x_planted = x_base + strength · rms(x_base) · v_i        where the token is one of the kinds of direction i

Every direction has its own kinds of tokens, each of them rare, so that no latent of the base stands for just these tokens: a dictionary has to find the
direction itself. What finds none of them would find nothing that is as small.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.data.pairs import Pairs
from mechscope.errors import DataError
from mechscope.features.places import Place

# most of a direction's tokens that one kind of token may make up: a latent of the base for that kind would do for all of them
_MOST_OF_ONE = 0.25


@dataclass(frozen=True)
class Plant:
    """Directions that are written on known tokens.

    Attributes:
        kinds: Token ids, by direction.
        strength: Length of what is written, as a share of the root mean square norm of the base's activations.
        seed: Of the directions.
    """

    kinds: tuple[tuple[int, ...], ...]
    strength: float
    seed: int

    @classmethod
    def chosen(cls, texts: Pairs, *, directions: int, share: float, strength: float, seed: int) -> Plant:
        """Choose for every direction kinds of tokens that make up about a share of all tokens of some texts.

        Args:
            texts: What is read.
            directions: How many are planted.
            share: Of the tokens, for each direction.
            strength: As the attribute.
            seed: Of kinds and directions.

        Raises:
            DataError: The texts have too few kinds of rare tokens.
        """
        counts = Counter(token for pair in texts for token in pair.clean[1:])
        total = sum(counts.values())
        rare = sorted(token for token, count in counts.items() if count <= max(1, _MOST_OF_ONE * share * total))
        order = iter(np.random.default_rng(seed).permutation(rare).tolist())
        found = []
        for number in range(directions):
            kinds, size = [], 0
            while size < share * total and (token := next(order, None)) is not None:
                kinds.append(int(token))
                size += counts[token]
            if size < share * total:
                raise DataError(
                    f"{texts.source} has rare tokens for {number} of {directions} planted directions: give more texts, plant fewer, or leave the control "
                    "'planted' out"
                )
            found.append(tuple(sorted(kinds)))
        return cls(tuple(found), strength, seed)

    def directions(self, place: Place, width: int) -> Float[Tensor, "direction width"]:
        """Return the directions of a place, of norm one: others at every layer and site, whatever the model's name."""
        where = torch.Generator().manual_seed(self.seed * 1_000_003 + 1009 * place.layer + len(place.site))
        rows = torch.randn(len(self.kinds), width, generator=where, dtype=torch.float64)
        return rows / rows.norm(dim=1, keepdim=True)

    def of_tokens(self, ids: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """Return which direction is written on each token, −1 for none."""
        found = torch.full_like(ids, -1)
        for number, kinds in enumerate(self.kinds):
            found[torch.isin(ids, torch.tensor(kinds, dtype=ids.dtype))] = number
        return found

    def added(self, x: Float[Tensor, "row width"], ids: Int[Tensor, " row"], place: Place, rms: float) -> Float[Tensor, "row width"]:
        """Return activations of the base with the effect written into them."""
        at = self.of_tokens(ids)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        rows = torch.cat([self.directions(place, x.shape[1]), torch.zeros(1, x.shape[1], dtype=torch.float64)]).to(wide)
        return wide + self.strength * rms * rows[at]
