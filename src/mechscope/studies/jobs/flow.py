"""`mechscope flow`: attention cut between every two segments of a text, the way information takes through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mechscope.choices import MetricName
from mechscope.settings import Number, setting
from mechscope.studies.groups import OneModel, PromptPairs
from mechscope.studies.inputs import MODELS, PAIRS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs, split_names
from mechscope.studies.run import JobRun, Tables


@dataclass(frozen=True, kw_only=True)
class FlowSettings(OneModel, PromptPairs):
    """Between which segments attention is cut, and where."""

    panel: ClassVar[str] = "Flow"

    segments: str = setting(..., "Segments of the texts, joined by commas; last, target and changed serve too.")
    window: Number = setting(1, "Layers that are cut together, around each layer; cut short at the model's ends.")
    heads: str | None = setting(None, 'Cut only these heads of a window, e.g. "a3.h5,a4.h1"; by default all.')
    components: str | None = setting(None, 'Only windows around these layers, e.g. "layers:2-4"; by default all.')
    metric: MetricName = setting("logit-diff", "What is measured; loss is of a target span, kl compares with the whole model.")


def _check(run: JobRun[FlowSettings]) -> None:
    settings = run.settings
    check_pairs(run.first, run[PAIRS], metric=settings.metric, positions=tuple(split_names(settings.segments)))


def _cut(run: JobRun[FlowSettings]) -> Tables:
    from mechscope.causal import attention_flow

    settings = run.settings
    effects = attention_flow(
        run.first,
        run[PAIRS],
        split_names(settings.segments),
        window=settings.window,
        heads=settings.heads,
        components=settings.components,
        metric=settings.metric,
        execution=run.execution,
    )
    run.folder.record("notes", effects.notes)
    return {"flow": effects.table}


def _title(names: Mapping[str, str]) -> str:
    return f"The flow of information through {names['model']}"


JOB = Job(
    name="flow",
    help="Attention flow: cut attention from every segment of a text to every other, layer by layer: the way information takes (Geva et al. 2023).",
    panel="intervene",
    example="mechscope flow gpt2 --pairs ioi --segments io,s1,s2,last --window 3 --out runs/flow-ioi",
    settings=FlowSettings,
    arguments=("model",),
    inputs=(MODELS, PAIRS),
    stages=(
        Stage(
            name="flow",
            work=_cut,
            hangs_on=("segments", "window", "heads", "components", "metric", "seed"),
            inputs=(MODELS, PAIRS),
        ),
    ),
    sections=("flow",),
    title=_title,
    check=_check,
)
