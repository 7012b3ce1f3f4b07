"""`mechscope knockout`: attention cut between tokens, one window of layers or one head at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mechscope.choices import MetricName
from mechscope.errors import SettingsError
from mechscope.settings import Number, setting
from mechscope.studies.groups import OneModel, PromptPairs
from mechscope.studies.inputs import MODELS, PAIRS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs, one_position
from mechscope.studies.run import JobRun, Tables


@dataclass(frozen=True, kw_only=True)
class KnockoutSettings(OneModel, PromptPairs):
    """Between which tokens attention is cut, and where."""

    panel: ClassVar[str] = "Knockout"

    keys: str = setting(..., "Tokens that are not seen: a segment, changed, last, or numbers joined by commas.")
    queries: str = setting("last", "Tokens that may not look at them; named as --keys.")
    window: Number = setting(1, "Layers that are cut together, around each layer; cut short at the model's ends.")
    heads: str | None = setting(None, 'Cut only these heads of a window, e.g. "a3.h5,a4.h1"; by default all.')
    each_head: bool = setting(False, "Cut one head of one layer at a time instead of windows.")
    components: str | None = setting(None, 'Only windows around these layers ("layers:2-4"), or with --each-head only these heads.')
    metric: MetricName = setting("logit-diff", "What is measured; loss is of a target span, kl compares with the whole model.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.each_head and self.heads is not None:
            raise SettingsError(
                "--heads chooses what is cut in a window of layers, --each-head cuts single heads: choose those by --components"
            )
        if self.each_head and self.window > 1:
            raise SettingsError(f"--each-head cuts one head of one layer at a time, --window is {self.window}: leave one of them out")


def _check(run: JobRun[KnockoutSettings]) -> None:
    settings = run.settings
    check_pairs(run.first, run[PAIRS], metric=settings.metric, positions=(settings.keys, settings.queries))


def _cut(run: JobRun[KnockoutSettings]) -> Tables:
    from mechscope.causal import attention_knockout

    settings = run.settings
    effects = attention_knockout(
        run.first,
        run[PAIRS],
        keys=one_position(settings.keys),
        queries=one_position(settings.queries),
        window=settings.window,
        heads=settings.heads,
        each_head=settings.each_head,
        components=settings.components,
        metric=settings.metric,
        execution=run.execution,
    )
    run.folder.record("notes", effects.notes)
    return {"knockout": effects.table}


def _title(names: Mapping[str, str]) -> str:
    return f"Attention knockout in {names['model']}"


JOB = Job(
    name="knockout",
    help="Attention knockout: cut attention between tokens, layer by layer, and see what the answer loses (Geva et al. 2023).",
    panel="intervene",
    example="mechscope knockout gpt2 --pairs ioi --keys io --queries last --window 3 --out runs/knockout-ioi",
    settings=KnockoutSettings,
    arguments=("model",),
    inputs=(MODELS, PAIRS),
    stages=(
        Stage(
            name="knockout",
            work=_cut,
            hangs_on=("keys", "queries", "window", "heads", "each_head", "components", "metric", "seed"),
            inputs=(MODELS, PAIRS),
        ),
    ),
    sections=("knockout",),
    title=_title,
    check=_check,
)
