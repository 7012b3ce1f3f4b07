"""`mechscope routing`: how a mixture of experts shares tokens out among its experts, and what fine-tuning did to that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mechscope.studies.groups import ModelAndTuned
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job
from mechscope.studies.routing import routing_stage
from mechscope.studies.run import JobRun
from mechscope.studies.texts import TEXTS, Texts


@dataclass(frozen=True, kw_only=True)
class RoutingSettings(ModelAndTuned, Texts):
    """Which models and texts."""

    panel: ClassVar[str] = "Models"


def _check(run: JobRun[RoutingSettings]) -> None:
    from mechscope.data.scoring import check_fits
    from mechscope.instrument.routers import mixtures

    for subject in run[MODELS].values():
        mixtures(subject)
        check_fits(subject, run[TEXTS])


def _title(names: Mapping[str, str]) -> str:
    if "tuned" in names:
        return f"How {names['base']} routes tokens to its experts, before and after fine-tuning"
    return f"How {names['model']} routes tokens to its experts"


JOB = Job(
    name="routing",
    help="Mixtures of experts: the load of every expert, the entropy of every router, and how fine-tuning changed routing and experts.",
    panel="read",
    example="mechscope routing allenai/OLMoE-1B-7B-0924 --data articles.jsonl --out runs/routing",
    settings=RoutingSettings,
    arguments=("model", "tuned"),
    inputs=(MODELS, TEXTS),
    stages=(routing_stage(TEXTS),),
    sections=("routing",),
    title=_title,
    check=_check,
)
