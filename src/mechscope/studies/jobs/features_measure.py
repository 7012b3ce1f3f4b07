"""`mechscope features measure`: what dictionaries keep of a model on texts, beside controls, and what their latents stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mechscope.errors import SettingsError
from mechscope.settings import nested, setting
from mechscope.studies import concepts
from mechscope.studies.concepts import LABELLED, Concepts
from mechscope.studies.dictionaries import Judged, LatentSettings, described, same_places, stages
from mechscope.studies.dictionary_files import AGAINST, DICTIONARIES, DictionaryFiles, LeftOutTokens, left_out
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts


@dataclass(frozen=True, kw_only=True)
class FeaturesMeasureSettings(OneModel, DictionaryFiles, LeftOutTokens, Texts, Concepts):
    """On which texts, and what is shown."""

    panel: ClassVar[str] = "Dictionaries"

    against: str | None = setting(
        None,
        "Dictionaries of the same places that these are compared with, of the same --format: measures on the same texts, and latents found again.",
    )
    latent: LatentSettings = nested(LatentSettings)


def _check(run: JobRun[FeaturesMeasureSettings]) -> None:
    from mechscope.data.scoring import check_fits

    check_fits(run.first, run[TEXTS])
    own, others = run[DICTIONARIES], run[AGAINST]
    for dictionary in (*own.values(), *others.values()):
        dictionary.check(run.first, other_model=run.settings.other_model)
    if twice := sorted(own.keys() & others.keys()):
        raise SettingsError(f"settings 'dictionary' and 'against' both name {', '.join(twice)}: give their files different names")
    if others and not any(same_places(one, other) for one in own.values() for other in others.values()):
        raise SettingsError("none of the dictionaries of setting 'against' reads and writes the places of one of setting 'dictionary'")


def _describe(run: JobRun[FeaturesMeasureSettings]) -> Tables:
    import pandas as pd

    own, others = run[DICTIONARIES], run[AGAINST]
    return {"dictionaries": pd.DataFrame([described(name, each) for name, each in {**own, **others}.items()])}


def _judged(run: JobRun[FeaturesMeasureSettings]) -> Judged:
    own, others = run[DICTIONARIES], run[AGAINST]
    every = {name: each.to(run.first.device) for name, each in {**own, **others}.items()}
    return Judged(every, run[TEXTS], left_out(run.settings), tuple(others))


DESCRIPTION = Stage(name="description", work=_describe, inputs=(DICTIONARIES, AGAINST), alone=True)
_OWN: dict[str, Any] = {"hangs_on": ("first", "outlier"), "inputs": (DICTIONARIES, AGAINST)}
MEASURES, LATENTS = stages(_judged, **_OWN)
# its controls are made of the texts that are measured
CONCEPTS, SPLITTING = concepts.stages(_judged, hangs_on=("first", "outlier"), inputs=(TEXTS, DICTIONARIES, AGAINST))


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
    inputs=(MODELS, TEXTS, DICTIONARIES, AGAINST, LABELLED),
    stages=(DESCRIPTION, MEASURES, CONCEPTS, SPLITTING, LATENTS),
    sections=("dictionaries", "concepts", "splitting"),
    title=_title,
    check=_check,
)
