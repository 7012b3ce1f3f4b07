"""`mechscope trace`: causal tracing, where a fact is recalled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from mechscope.choices import MetricName
from mechscope.settings import Number, Rate, setting
from mechscope.studies.groups import OneModel, PromptPairs
from mechscope.studies.inputs import MODELS, PAIRS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs
from mechscope.studies.run import JobRun, Tables


@dataclass(frozen=True, kw_only=True)
class TraceSettings(OneModel, PromptPairs):
    """What is corrupted, and what is restored."""

    panel: ClassVar[str] = "Tracing"

    site: Literal["residual", "mlp", "attention", "mixer"] = setting("residual", "What is restored.")
    segment: str = setting(
        "subject", "Segment whose embeddings are corrupted; facts:FILE has `subject`, generated tasks have segments of their own."
    )
    noise: Rate = setting(3.0, "Standard deviation of the noise, in standard deviations of the texts' embeddings.")
    samples: Number = setting(10, "Draws of noise per text; results are their mean.")
    window: Number = setting(1, "Layers restored together, around each layer; the paper takes 10 for MLPs and attention.")
    metric: MetricName = setting("probability", "What is measured; probability in the paper.")


def _check(run: JobRun[TraceSettings]) -> None:
    from mechscope.causal.tracing import role_of

    check_pairs(run.first, run[PAIRS], metric=run.settings.metric)
    for pair in run[PAIRS]:
        role_of(pair, run.settings.segment)


def _traced(run: JobRun[TraceSettings]) -> Tables:
    from mechscope.causal import causal_trace

    settings = run.settings
    effects = causal_trace(
        run.first,
        run[PAIRS],
        site=settings.site,
        segment=settings.segment,
        noise=settings.noise,
        samples=settings.samples,
        window=settings.window,
        metric=settings.metric,
        execution=run.execution,
    )
    run.folder.record("notes", effects.notes)
    return {"trace": effects.table}


def _title(names: Mapping[str, str]) -> str:
    return f"Where {names['model']} recalls facts"


JOB = Job(
    name="trace",
    help="Causal tracing: blur a fact's subject with noise, restore one place at a time, and see where the answer returns (Meng et al. 2022).",
    panel="intervene",
    example="mechscope trace gpt2 --pairs facts:facts.jsonl --site mlp --window 5 --out runs/trace",
    settings=TraceSettings,
    arguments=("model",),
    inputs=(MODELS, PAIRS),
    stages=(
        Stage(
            name="trace",
            work=_traced,
            hangs_on=("site", "segment", "noise", "samples", "window", "metric", "seed"),
            inputs=(MODELS, PAIRS),
        ),
    ),
    sections=("trace",),
    title=_title,
    check=_check,
)
