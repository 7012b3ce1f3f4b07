"""Latent scaling: how much of a crosscoder's latent is in what each of two models holds, whatever its decoders say (Minder et al. 2025, §3).

A sparsity penalty can shrink a decoder to nothing though the model has the latent (complete shrinkage), and can give one thing two latents, one for each
model (decoupling). For latent j with v its decoder in the model in which that is longer, the least squares scale of f_j v in Y is

    β(Y) = Σ_n f_nj ⟨Y_n, v⟩ / (Σ_n f_nj² ‖v‖²)

    error            Y = x_l − (x̂_l − f_j D_lj)     what all other latents leave over of model l
    reconstruction   Y = x̂_l                        what all latents together say of it

ν is β in the model in which the decoder is shorter over β in the other. ν of the error is high where the shorter decoder was shrunk; ν of the reconstruction
is high where other latents say the same in that model. A latent that only one model has is near zero in both.

Everything is sums over tokens of f, f², f⟨x − x̂, v⟩ and f⟨x̂, v⟩ at active entries: memory is that of the latents, however many tokens there are, and
⟨D_lj, v⟩ is all that is needed of the latent's own part. In the units of the tensors, where both models have mean squared norm one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import ModelError
from mechscope.features.dictionary import Dictionary, decoded
from mechscope.features.rows import TOKENS_PER_BATCH, Models, reader_of, require_rows
from mechscope.instrument import Execution
from mechscope.instrument.texts import over_texts
from mechscope.settings.features import TokenSettings
from mechscope.shapes import by_shape


@dataclass(frozen=True)
class Decoders:
    """The decoders of a crosscoder of two models, in the units of its tensors.

    Attributes:
        first: ``(latent, width)``, of the first model; several places side by side.
        second: The same of the second.
    """

    first: Float[Tensor, "latent width"]
    second: Float[Tensor, "latent width"]

    __repr__ = by_shape

    @classmethod
    def of(cls, dictionary: Dictionary) -> Decoders:
        """Take them from a dictionary.

        Raises:
            ModelError: It is no crosscoder that reads and writes the same places of two models, one after the other.
        """
        layout = dictionary.layout
        half, names = len(layout.inputs) // 2, [place.model for place in layout.inputs]
        sides = [[(place.site, place.layer) for place in part] for part in (layout.inputs[:half], layout.inputs[half:])]
        two = len(set(names[:half])) == len(set(names[half:])) == 1 and names[0] != names[-1]
        if layout.inputs != layout.outputs or len(layout.groups) > 1 or not two or sides[0] != sides[1]:
            raise ModelError(
                f"a dictionary that reads {', '.join(map(str, layout.inputs))} and writes {', '.join(map(str, layout.outputs))} compares no two models: give a "
                "crosscoder of the same places of two models, such as base:resid6,tuned:resid6"
            )
        first, second = dictionary.tensors["decoder.0"].split(sum(layout.output_widths[:half]), dim=1)
        return cls(first, second)

    @property
    def norms(self) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
        """Their norms."""
        one, two = (torch.linalg.vector_norm(each, dim=1) for each in (self.first, self.second))
        return one, two

    @property
    def longer(self) -> Float[Tensor, "latent width"]:
        """Of each latent the longer one; the second where they are equal."""
        first, second = self.norms
        return torch.where((first > second)[:, None], self.first, self.second)

    @property
    def relative(self) -> Float[Tensor, " latent"]:
        """½ ((‖second‖ − ‖first‖) / max + 1): 0 where only the first model has the latent, 1 where only the second has, ½ where both have it alike."""
        first, second = self.norms
        return ((second - first) / torch.maximum(first, second).clamp(min=torch.finfo(first.dtype).tiny) + 1) / 2


@dataclass(frozen=True)
class ScalingSums:
    """Sums over tokens, of every latent; of two models where there are two rows.

    Attributes:
        tokens: Tokens that were read.
        active: ``(latent)``: tokens in which it is active.
        squares: ``(latent)``: Σ f².
        error: ``(model, latent)``: Σ f⟨x − x̂, v⟩.
        rebuilt: ``(model, latent)``: Σ f⟨x̂, v⟩.
    """

    tokens: int
    active: Int[Tensor, " latent"]
    squares: Float[Tensor, " latent"]
    error: Float[Tensor, "model latent"]
    rebuilt: Float[Tensor, "model latent"]

    __repr__ = by_shape

    @property
    def per_token(self) -> dict[str, Float[Tensor, " latent"]]:
        """In which share of all tokens each latent is active (`density`), and its mean f² (`squares`)."""
        return {"density": self.active / max(self.tokens, 1), "squares": self.squares / max(self.tokens, 1)}

    def __add__(self, other: ScalingSums) -> ScalingSums:
        return ScalingSums(
            self.tokens + other.tokens,
            *(getattr(self, name) + getattr(other, name) for name in ("active", "squares", "error", "rebuilt")),
        )


@torch.no_grad()
def scaling_sums(
    dictionary: Dictionary, inputs: Sequence[Float[Tensor, "token width"]]
) -> tuple[ScalingSums, Int[Tensor, " token"], Float[Tensor, "model sum token"]]:
    """Return the sums of some tokens; of every token its active latents, and of every model ‖x − x̂‖² and ‖x‖² in the units of the tensors.

    Args:
        dictionary: A crosscoder of two models.
        inputs: What stands at its places, in the models' units.

    Raises:
        ModelError: It is no such crosscoder, or the inputs do not fit.
    """
    aim = dictionary.aim(inputs)
    codes = dictionary.encode(inputs)
    longer = Decoders.of(dictionary).longer.contiguous()
    rebuilt = decoded(dictionary.layout, dictionary.tensors, codes)
    width = longer.shape[1]
    f = codes.values.double()
    sums: dict[str, list[Tensor]] = {"error": [], "rebuilt": []}
    fit = []
    for x, y in zip(aim.split(width, dim=1), rebuilt.split(width, dim=1), strict=True):
        for name, value in (("error", x - y), ("rebuilt", y)):
            sums[name].append(codes.total(f * codes.inner(value.contiguous(), longer).double()).cpu())
        fit.append(torch.stack([(x - y).double().square().sum(1), x.double().square().sum(1)]).cpu())
    active = torch.bincount(codes.latents, minlength=dictionary.latents).cpu()
    found = ScalingSums(len(aim), active, codes.total(f.square()).cpu(), torch.stack(sums["error"]), torch.stack(sums["rebuilt"]))
    return found, codes.counts.cpu(), torch.stack(fit)


def scaled_latents(dictionary: Dictionary, sums: ScalingSums) -> pd.DataFrame:
    """Return one row per latent: how often it is active, how long its decoders are, and ν.

    Returns:
        `latent`, `tokens` (in which it is active), `density`, `squares` (Σ f² per token), `energy` (that times ‖D‖² over both models), `norm_first`,
        `norm_second`, `relative_norm`, `beta_error` and `beta_reconstruction` (of the model with the longer decoder), `nu_error`, `nu_reconstruction` (NaN
        where the latent is silent, or the model with the longer decoder does not hold it either: β not above zero).
    """
    decoders = Decoders.of(dictionary)
    first, second = (each.double().cpu() for each in (decoders.first, decoders.second))
    longer = decoders.longer.double().cpu()
    sizes = longer.square().sum(1)
    one, two = first.norm(dim=1), second.norm(dim=1)
    own = torch.stack([(first * longer).sum(1), (second * longer).sum(1)])
    scale = sums.squares * sizes
    betas = {"error": (sums.error + sums.squares * own) / scale, "reconstruction": sums.rebuilt / scale}
    which = (one > two).long()  # the row of the model with the shorter decoder
    columns: dict[str, Tensor] = {
        "latent": torch.arange(dictionary.latents),
        "tokens": sums.active,
        **sums.per_token,
        "energy": sums.per_token["squares"] * (one.square() + two.square()),
        "norm_first": one,
        "norm_second": two,
        "relative_norm": decoders.relative.double().cpu(),
    }
    for name, beta in betas.items():
        shorter, mine = (beta.gather(0, row[None])[0] for row in (which, 1 - which))
        columns[f"beta_{name}"] = mine
        columns[f"nu_{name}"] = torch.where(mine > 0, shorter / mine, torch.nan)
    return pd.DataFrame({name: value.numpy() for name, value in columns.items()})


def latent_scaling(
    models: Models,
    dictionary: Dictionary,
    texts: Pairs,
    *,
    tokens: TokenSettings | None = None,
    other_model: bool = False,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Measure how much of each latent of a crosscoder is in what each of its two models holds.

    Args:
        models: The two models by name.
        dictionary: A crosscoder of them.
        texts: Any texts; their clean versions are read.
        tokens: Which tokens are left out; None for those that its training left out, or the defaults where that is not known.
        other_model: Allow a dictionary of models with other weights.
        execution: Tokens of a batch, progress.

    Returns:
        The table of `scaled_latents`.

    Raises:
        MechscopeError: The dictionary or the texts do not fit, or no token is left.
    """
    Decoders.of(dictionary)
    reader = reader_of(models, dictionary, texts, tokens, other_model=other_model, execution=execution)

    def work(batch: PairBatch) -> ScalingSums:
        rows = reader.rows(batch)
        return scaling_sums(dictionary, [rows.values[place].to(dictionary.device, dictionary.dtype) for place in dictionary.layout.inputs])[
            0
        ]

    parts = (sums for _, sums in over_texts(texts, work, execution, tokens=TOKENS_PER_BATCH, label="latent scaling"))
    found = reduce(operator.add, parts)
    require_rows(found.tokens, texts, reader.tokens)
    return scaled_latents(dictionary, found)
