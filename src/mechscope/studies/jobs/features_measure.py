"""`mechscope features measure`: what dictionaries keep of a model on texts, beside controls, and what their latents stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mechscope.settings import nested
from mechscope.studies.dictionaries import Judged, LatentSettings, described, stages
from mechscope.studies.dictionary_files import DICTIONARIES, DictionaryFiles, LeftOutTokens, left_out
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts


@dataclass(frozen=True, kw_only=True)
class FeaturesMeasureSettings(OneModel, DictionaryFiles, LeftOutTokens, Texts):
    """On which texts, and what is shown."""

    panel: ClassVar[str] = "Dictionaries"

    latent: LatentSettings = nested(LatentSettings)


def _check(run: JobRun[FeaturesMeasureSettings]) -> None:
    from mechscope.data.scoring import check_fits

    check_fits(run.first, run[TEXTS])
    for dictionary in run[DICTIONARIES].values():
        dictionary.check(run.first, other_model=run.settings.other_model)


def _describe(run: JobRun[FeaturesMeasureSettings]) -> Tables:
    import pandas as pd

    return {"dictionaries": pd.DataFrame([described(name, each) for name, each in run[DICTIONARIES].items()])}


def _judged(run: JobRun[FeaturesMeasureSettings]) -> Judged:
    return Judged({name: each.to(run.first.device) for name, each in run[DICTIONARIES].items()}, run[TEXTS], left_out(run.settings))


DESCRIPTION = Stage(name="description", work=_describe, inputs=(DICTIONARIES,), alone=True)
MEASURES, LATENTS = stages(_judged, hangs_on=("first", "outlier"), inputs=(DICTIONARIES,))


def _title(names: Mapping[str, str]) -> str:
    return f"Dictionaries of features in {names['model']}"


JOB = Job(
    name="features-measure",
    help="Measure dictionaries of features on texts, beside controls, and list what their latents stand for; reads five formats of other libraries.",
    panel="features",
    group="features",
    example="mechscope features measure gpt2 --dictionary runs/features/dictionaries/resid6-4096.safetensors --data articles.jsonl",
    settings=FeaturesMeasureSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS, DICTIONARIES),
    stages=(DESCRIPTION, MEASURES, LATENTS),
    sections=("dictionaries",),
    title=_title,
    check=_check,
)
