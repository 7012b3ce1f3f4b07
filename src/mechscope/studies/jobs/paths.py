"""`mechscope paths`: path patching, the effect of a sender on a receiver along chosen paths only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from mechscope.choices import MetricName
from mechscope.settings import setting
from mechscope.studies.groups import OneModel, PromptPairs
from mechscope.studies.inputs import MODELS, PAIRS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs, split_names
from mechscope.studies.run import JobRun, Tables


@dataclass(frozen=True, kw_only=True)
class PathSettings(OneModel, PromptPairs):
    """Which paths are patched."""

    panel: ClassVar[str] = "Paths"

    receivers: str = setting(
        ..., 'What the paths lead to, all at once: heads\' inputs, MLPs, logits; e.g. "a5.h1<q>,a5.h1<k>", "m7,logits".'
    )
    senders: str | None = setting(None, 'Where they begin, one at a time: e.g. "a3.h5,m3" or "layers:0-3"; by default every head and MLP.')
    through_mlps: bool = setting(False, "Let the paths lead through the MLPs between sender and receiver; by default the direct path only.")
    together: bool = setting(False, "Patch the paths of all senders at once.")
    direction: Literal["denoise", "noise"] = setting("noise", "Corrupt senders in the clean run (noise) or the reverse (denoise).")
    metric: MetricName = setting("logit-diff", "What is measured; loss is of a target span, kl compares with the clean run.")


def _check(run: JobRun[PathSettings]) -> None:
    check_pairs(run.first, run[PAIRS], metric=run.settings.metric)


def _patched(run: JobRun[PathSettings]) -> Tables:
    from mechscope.causal import path_patch

    settings = run.settings
    effects = path_patch(
        run.first,
        run[PAIRS],
        settings.senders,
        split_names(settings.receivers),
        direction=settings.direction,
        metric=settings.metric,
        through_mlps=settings.through_mlps,
        together=settings.together,
        execution=run.execution,
    )
    run.folder.record("notes", effects.notes)
    return {"paths": effects.table}


def _title(names: Mapping[str, str]) -> str:
    return f"Paths through {names['model']}"


JOB = Job(
    name="paths",
    help="Path patching: what heads and MLPs tell a chosen receiver, along the paths to it only (Wang et al. 2022).",
    panel="intervene",
    example='mechscope paths gpt2 --pairs ioi --receivers "a9.h9<q>,a10.h0<q>" --out runs/paths-ioi',
    settings=PathSettings,
    arguments=("model",),
    inputs=(MODELS, PAIRS),
    stages=(
        Stage(
            name="paths",
            work=_patched,
            hangs_on=("receivers", "senders", "through_mlps", "together", "direction", "metric", "seed"),
            inputs=(MODELS, PAIRS),
        ),
    ),
    sections=("paths",),
    title=_title,
    check=_check,
)
