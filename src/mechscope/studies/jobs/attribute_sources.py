"""`mechscope attribute-sources`: from which tokens heads bring what they add to an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mechscope.choices import LogitMetric
from mechscope.settings import Number, setting
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts, check_attributed, means_over_texts, metric_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class AttributeSourcesSettings(OneModel, Texts):
    """Which heads on which texts, and what is attributed."""

    panel: ClassVar[str] = "Attribution"

    components: str = setting(..., 'Heads that are split by source token, such as "a9.h6,a9.h9" or "layers:9-10".')
    metric: LogitMetric | None = setting(
        None,
        "What is attributed: logit-diff (right minus wrong answer) or target-logit (the logit of what comes next over the vocabulary's mean); by default "
        "logit-diff where all texts have right and wrong answers.",
    )
    documents: Number = setting(16, "Documents or prompts to read.")
    max_tokens: Number = setting(256, "Most tokens of a text; lowered to what the model can read.")
    tokens_per_batch: Number | None = setting(1024, "Most tokens of a batch of texts, padding included; decides the memory.")


def _metric(run: JobRun[AttributeSourcesSettings]) -> LogitMetric:
    return run.settings.metric or metric_of(run[TEXTS])


def _check(run: JobRun[AttributeSourcesSettings]) -> None:
    from mechscope.subject.components import chosen_heads

    check_attributed(run.first, run[TEXTS], _metric(run))
    chosen_heads(run.first.anatomy, run.settings.components)


def _split(run: JobRun[AttributeSourcesSettings]) -> Tables:
    from mechscope.lens import attribute_sources

    metric = _metric(run)
    table = attribute_sources(run.first, run[TEXTS], run.settings.components, metric=metric, execution=run.execution)
    return {"attribute_sources": table, "attribute_sources_summary": _summary(table).assign(metric=metric)}


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return each head's whole effect, and what comes from the token that each query attends to most, its own effect left aside in the choice."""
    names, by = ["component", "layer", "head"], ["component", "layer", "head", "text"]
    most = table.loc[table.groupby([*by, "query"], sort=False)["attention"].idxmax()]
    of_texts = table.groupby(by, sort=False)["effect"].sum().to_frame()
    of_texts["attended_effect"] = most.groupby(by, sort=False)["effect"].sum()
    of_texts["attended"] = most.groupby(by, sort=False)["attention"].mean()
    return means_over_texts(of_texts.reset_index(), names, "effect", "attended_effect", "attended")


def _title(names: Mapping[str, str]) -> str:
    return f"From where heads of {names['model']} bring the answer"


JOB = Job(
    name="attribute-sources",
    help="Split what heads add to an answer by the tokens they attend to (Elhage et al. 2021).",
    panel="read",
    example="mechscope attribute-sources gpt2 --pairs ioi --components a9.h6,a9.h9,a10.h0 --out runs/sources",
    settings=AttributeSourcesSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS),
    stages=(Stage(name="attribute-sources", work=_split, hangs_on=("components", "metric"), inputs=(MODELS, TEXTS)),),
    sections=("attribute-sources",),
    title=_title,
    check=_check,
)
