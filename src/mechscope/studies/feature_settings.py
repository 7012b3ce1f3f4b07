"""Settings of a comparison of two models by dictionaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mechscope.settings import Number, Settings, nested, setting
from mechscope.settings.diffing import ExclusiveSettings, PlantSettings
from mechscope.settings.features import FeatureTraining, HarvestSettings, Objective
from mechscope.studies.dictionaries import LatentSettings


@dataclass(frozen=True, kw_only=True)
class DictionaryComparison(Settings):
    """Which dictionaries, which controls, and what they are judged by."""

    panel: ClassVar[str] = "Dictionaries"

    places: str | None = setting(
        None,
        "Where the models are compared, such as resid6; several joined by commas are read together by one crosscoder. By default the residual stream in the "
        "middle.",
    )
    latents: Number = setting(4096, "Latents of a dictionary.")
    rule: Literal["batchtopk", "relu"] = setting(
        "batchtopk", "Which latents are active: batchtopk, or relu with an L1 penalty (--sparsity)."
    )
    k: Number = setting(32, "Active latents of a token, for batchtopk.")
    difference: bool = setting(True, "Also train a dictionary of the difference of the two models' activations.")
    own_controls: str = setting(
        "same,half,planted,shuffled",
        "Controls that need no other model, each one more training: same (base against base, from decoders that start apart), half (the other half of the "
        "documents, which the models' own crosscoder then does not see), planted (an effect of known truth), shuffled (tokens that do not belong together); "
        "none for none.",
    )
    live: bool = setting(False, "Keep no activations on disk: the models run again in every round of the training.")
    causal_documents: Number = setting(48, "Documents, of those, on whose summaries it is tested what latents carry.")
    random_draws: Number = setting(5, "Draws of as many other latents, and of random vectors, beside them.")
    objective: Objective = nested(Objective)
    training: FeatureTraining = nested(FeatureTraining)
    harvest: HarvestSettings = nested(HarvestSettings)
    exclusive: ExclusiveSettings = nested(ExclusiveSettings)
    plant: PlantSettings = nested(PlantSettings, prefix="plant_")
    latent: LatentSettings = nested(LatentSettings)
