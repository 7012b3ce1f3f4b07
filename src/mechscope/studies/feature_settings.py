"""Settings of a comparison of two models by dictionaries, and the stages that it takes; light, so that jobs can name them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mechscope.settings import Number, Settings, nested, setting
from mechscope.settings.diffing import ExclusiveSettings, PlantSettings
from mechscope.settings.features import FeatureTraining, HarvestSettings, Objective
from mechscope.studies.dictionaries import LatentSettings
from mechscope.studies.job import Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.studies.feature_difference import Request


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
        "Controls that need no other model, each one more training: same (base against base), half (the other half of the documents, which the models' own "
        "crosscoder then does not see), planted (an effect of known truth), shuffled (tokens that do not belong together); none for none.",
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


def stages(
    request: Callable[[JobRun[Any]], Request],
    *,
    inputs: tuple[Input[Any], ...],
    settings: tuple[str, ...] | None = None,
    after: tuple[Stage, ...] = (),
    when: Callable[[Any], bool] = lambda settings: True,
) -> tuple[Stage, Stage, Stage, Stage]:
    """Return the stages that train dictionaries, judge their latents, test what these carry, and list them.

    Args:
        request: Returns what is compared.
        inputs: What is loaded and decides the result.
        settings: Settings that decide which dictionaries there are; by default the fields of `DictionaryComparison`, each for the stages that it is for.
        after: Stages that make the models.
        when: Whether any of it is done.
    """

    def trained(run: JobRun[Any]) -> Tables:
        from mechscope.studies.feature_difference import train_all

        return train_all(request(run))

    def judged(run: JobRun[Any]) -> Tables:
        from mechscope.studies.feature_judgement import judge_all

        return judge_all(request(run))

    def carried(run: JobRun[Any]) -> Tables:
        from mechscope.studies.feature_carried import carry_all

        return carry_all(request(run))

    def shown(run: JobRun[Any]) -> Tables:
        from mechscope.studies.feature_judgement import show_candidates

        return show_candidates(request(run))

    plans = ("places", "latents", "rule", "k", "difference", "own_controls", "live", "objective", "training", "harvest", "plant")
    own = (plans, ("exclusive",), ("causal_documents", "random_draws"), ("latent",))
    first, second, third, fourth = ((*(settings or names), "seed") for names in own)
    training = Stage(name="dictionaries", work=trained, hangs_on=first, inputs=inputs, after=after, when=when, alone=True)
    judgement = Stage(name="judgement", work=judged, hangs_on=second, inputs=inputs, after=(training,), when=when, alone=True)
    behind = (training, judgement)
    return (
        training,
        judgement,
        Stage(name="carried", work=carried, hangs_on=third, inputs=inputs, after=behind, when=when, alone=True),
        Stage(name="candidates", work=shown, hangs_on=fourth, inputs=inputs, after=behind, when=when, alone=True),
    )
