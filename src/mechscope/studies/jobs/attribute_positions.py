"""`mechscope attribute-positions`: what every part adds to every prediction of a text."""

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
from mechscope.studies.texts import TEXTS, Texts, check_attributed, means_over_texts

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class AttributePositionsSettings(OneModel, Texts):
    """Which texts, and what of their predictions is attributed."""

    panel: ClassVar[str] = "Attribution"

    metric: LogitMetric = setting(
        "target-logit",
        "What is attributed: target-logit is the logit of each token of the target (of a text: of every token) over the vocabulary's mean, at every position; "
        "logit-diff is right minus wrong answer after the last token.",
    )
    documents: Number = setting(4, "Documents or prompts to read; every predicted token of each is kept with every part of the model.")
    max_tokens: Number = setting(128, "Most tokens of a text; lowered to what the model can read.")
    tokens_per_batch: Number | None = setting(1024, "Most tokens of a batch of texts, padding included; decides the memory.")


def _check(run: JobRun[AttributePositionsSettings]) -> None:
    check_attributed(run.first, run[TEXTS], run.settings.metric)


def _attributed(run: JobRun[AttributePositionsSettings]) -> Tables:
    from mechscope.lens import attribute_positions

    table = attribute_positions(run.first, run[TEXTS], metric=run.settings.metric, execution=run.execution)
    return {"attribute_positions": table, "attribute_positions_summary": _summary(table).assign(metric=run.settings.metric)}


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return each part's mean over texts, and at what share of a text's positions it is the part that adds most."""
    best = table.groupby(["text", "position"], sort=False)["effect"].transform("max")
    ranked = table.assign(largest=(table["effect"] == best).astype(float))
    return means_over_texts(ranked, ["component", "kind", "layer", "head"], "effect", "largest")


def _title(names: Mapping[str, str]) -> str:
    return f"What the parts of {names['model']} add to every prediction"


JOB = Job(
    name="attribute-positions",
    help="Direct logit attribution token by token: what every head and MLP adds to each prediction of a text (Elhage et al. 2021).",
    panel="read",
    example='mechscope attribute-positions gpt2 --text "The Eiffel Tower stands in the city of Paris" --out runs/positions-attributed',
    settings=AttributePositionsSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS),
    stages=(Stage(name="attribute-positions", work=_attributed, hangs_on=("metric",), inputs=(MODELS, TEXTS)),),
    sections=("attribute-positions",),
    title=_title,
    check=_check,
)
