"""How two models are compared by dictionaries: from where on a latent is one model's alone, and the effect that is planted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Lt

from mechscope.settings import Number, Rate, Settings, setting


@dataclass(frozen=True, kw_only=True)
class ExclusiveSettings(Settings):
    """From where on a latent counts as one model's alone; the same for every comparison."""

    panel: ClassVar[str] = "Classes"

    exclusive: Annotated[float, Gt(0.5), Lt(1)] = setting(
        0.9, "Relative decoder norm above which a latent is the tuned model's alone; below 1 minus it the base's."
    )
    shared: Annotated[float, Gt(0.5), Lt(1)] = setting(0.6, "Relative decoder norm up to which a latent is shared, and down to 1 minus it.")
    nu_error: Rate = setting(0.2, "The ν of the error from which an exclusive latent counts as shrunk.")
    nu_reconstruction: Rate = setting(0.5, "The ν of the reconstruction from which it counts as decoupled.")
    recurs: Annotated[float, Gt(0), Lt(1)] = setting(
        0.7, "Cosine from which a latent's decoder counts as found again in another dictionary."
    )
    least_tokens: Number = setting(16, "Tokens in which a latent must be active to be judged.")


@dataclass(frozen=True, kw_only=True)
class PlantSettings(Settings):
    """The planted effect, of which the truth is known."""

    panel: ClassVar[str] = "Planted effect"

    directions: Number = setting(4, "Directions that are planted.")
    share: Annotated[float, Gt(0), Lt(0.5)] = setting(0.02, "Share of the tokens on which each is written.")
    strength: Rate = setting(0.5, "Its length, as a share of the root mean square norm of the base's activations.")
