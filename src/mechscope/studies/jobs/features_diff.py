"""`mechscope features diff`: what fine-tuning added, as latents that only the tuned model has, beside controls; and what they carry of its gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Gt, Lt

from mechscope.data.splits import held_out
from mechscope.settings import Number, setting
from mechscope.studies.controls import NamedControls, controls_input
from mechscope.studies.feature_settings import DictionaryComparison
from mechscope.studies.feature_stages import stages
from mechscope.studies.groups import OneCorpus, TwoModels
from mechscope.studies.inputs import CORPUS, MODELS, PAIR
from mechscope.studies.job import Job
from mechscope.studies.run import JobRun

if TYPE_CHECKING:
    from mechscope.studies.feature_difference import Request


@dataclass(frozen=True, kw_only=True)
class FeaturesDiffSettings(TwoModels, OneCorpus, NamedControls, DictionaryComparison):
    """Which models, which documents, which dictionaries, and what they are compared with."""

    panel: ClassVar[str] = "Dictionaries"

    documents: Number = setting(2000, "Documents: those that are learned from and those that are judged on.")
    test_share: Annotated[float, Gt(0), Lt(1)] = setting(0.1, "Share of the documents that are judged on and not learned from.")


def _request(run: JobRun[Any]) -> Request:
    from mechscope.studies.feature_difference import Request

    learned, judged = held_out(run[CORPUS].pairs, run.settings.test_share, run.settings.seed)
    return Request(run, run.settings, run[PAIR], learned, judged)


def _check(run: JobRun[Any]) -> None:
    from mechscope.studies.feature_difference import check

    check(_request(run))


OTHERS = controls_input(PAIR)

JOB = Job(
    name="features-diff",
    help="Find what fine-tuning added: latents of a crosscoder that only the tuned model has, beside controls, and what they carry of its gain.",
    panel="features",
    group="features",
    example="mechscope features diff gpt2 my-tuned-gpt2 --data articles.jsonl --places resid6 --out runs/added",
    settings=FeaturesDiffSettings,
    arguments=("base", "tuned"),
    inputs=(MODELS, PAIR, CORPUS, OTHERS),
    stages=stages(_request, inputs=(PAIR, CORPUS, OTHERS), split=("test_share",)),
    sections=("feature-difference", "feature-carried", "feature-candidates", "dictionaries"),
    title=lambda names: f"What fine-tuning added to {names['base']}",
    check=_check,
)
