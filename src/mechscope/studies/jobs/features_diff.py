"""`mechscope features diff`: what fine-tuning added, as latents that only the tuned model has, beside controls; and what they carry of its gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Lt

from mechscope.settings import Number, nested, setting
from mechscope.settings.diffing import ExclusiveSettings, PlantSettings
from mechscope.settings.features import FeatureTraining, HarvestSettings, Objective
from mechscope.studies.controls import NamedControls, controls_input
from mechscope.studies.dictionaries import LatentSettings
from mechscope.studies.feature_difference import check, train_all
from mechscope.studies.groups import OneCorpus, TwoModels
from mechscope.studies.inputs import CORPUS, MODELS, PAIR
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import JobRun, Tables


@dataclass(frozen=True, kw_only=True)
class FeaturesDiffSettings(TwoModels, OneCorpus, NamedControls):
    """Which models, which documents, which dictionaries, and what they are compared with."""

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
    documents: Number = setting(2000, "Documents: those that are learned from and those that are judged on.")
    test_share: Annotated[float, Gt(0), Lt(1)] = setting(0.1, "Share of the documents that are judged on and not learned from.")
    causal_documents: Number = setting(48, "Documents, of those, on whose summaries it is tested what latents carry.")
    random_draws: Number = setting(5, "Draws of as many other latents, and of random vectors, beside them.")
    objective: Objective = nested(Objective)
    training: FeatureTraining = nested(FeatureTraining)
    harvest: HarvestSettings = nested(HarvestSettings)
    exclusive: ExclusiveSettings = nested(ExclusiveSettings)
    plant: PlantSettings = nested(PlantSettings, prefix="plant_")
    latent: LatentSettings = nested(LatentSettings)


def _judge(run: JobRun[FeaturesDiffSettings]) -> Tables:
    from mechscope.studies.feature_judgement import judge_all

    return judge_all(run)


def _carry(run: JobRun[FeaturesDiffSettings]) -> Tables:
    from mechscope.studies.feature_carried import carry_all

    return carry_all(run)


def _show(run: JobRun[FeaturesDiffSettings]) -> Tables:
    from mechscope.studies.feature_judgement import show_candidates

    return show_candidates(run)


OTHERS = controls_input(PAIR)
_PLANS = ("places", "latents", "rule", "k", "difference", "own_controls", "live", "objective", "training", "harvest", "plant")
_SPLIT = ("test_share", "seed")
_INPUTS = (PAIR, CORPUS, OTHERS)
TRAINING = Stage(name="training", work=train_all, hangs_on=(*_PLANS, *_SPLIT), inputs=_INPUTS, alone=True)
JUDGEMENT = Stage(name="judgement", work=_judge, hangs_on=("exclusive", *_SPLIT), inputs=_INPUTS, after=(TRAINING,), alone=True)
CARRIED = Stage(
    name="carried",
    work=_carry,
    hangs_on=("causal_documents", "random_draws", *_SPLIT),
    inputs=(PAIR, CORPUS),
    after=(TRAINING, JUDGEMENT),
    alone=True,
)
CANDIDATES = Stage(
    name="candidates",
    work=_show,
    hangs_on=("latent", *_SPLIT),
    inputs=(PAIR, CORPUS),
    after=(TRAINING, JUDGEMENT),
    when=lambda settings: settings.latent.latents_shown > 0,
    alone=True,
)

JOB = Job(
    name="features-diff",
    help="Find what fine-tuning added: latents of a crosscoder that only the tuned model has, beside controls, and what they carry of its gain.",
    panel="features",
    group="features",
    example="mechscope features diff gpt2 my-tuned-gpt2 --data articles.jsonl --places resid6 --out runs/added",
    settings=FeaturesDiffSettings,
    arguments=("base", "tuned"),
    inputs=(MODELS, PAIR, CORPUS, OTHERS),
    stages=(TRAINING, JUDGEMENT, CARRIED, CANDIDATES),
    sections=("feature-difference", "feature-carried", "feature-candidates", "dictionaries"),
    title=lambda names: f"What fine-tuning added to {names['base']}",
    check=check,
)
