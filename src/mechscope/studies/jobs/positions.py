"""`mechscope positions`: how much heads look for a key by where it stands, read off their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from mechscope.errors import SettingsError
from mechscope.settings import Number, setting
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import JobRun, Tables


@dataclass(frozen=True, kw_only=True)
class PositionsSettings(OneModel):
    """Which heads, and how far back."""

    panel: ClassVar[str] = "Positions"

    components: str | None = setting(None, 'Only these heads, such as "a3.h5,a4.h1" or "layers:0-3"; by default all.')
    offsets: Number = setting(16, "Distances from query to key, from 0 (the query's own position) on, in tokens.")
    embedding: Literal["normalised", "raw"] = setting(
        "normalised", "How positions (of rotary models: tokens) are read: through the layer's norm, each by itself, or raw."
    )


def _check(run: JobRun[PositionsSettings]) -> None:
    from mechscope.subject.components import chosen_heads

    anatomy = run.first.anatomy
    chosen_heads(anatomy, run.settings.components)
    if run.settings.offsets > anatomy.max_positions:
        raise SettingsError(f"setting 'offsets' is {run.settings.offsets}: the model has {anatomy.max_positions} positions")


def _scores(run: JobRun[PositionsSettings]) -> Tables:
    import numpy as np

    from mechscope.weights import position_scores

    settings, subject = run.settings, run.first
    table = position_scores(subject, heads=settings.components, offsets=settings.offsets, embedding=settings.embedding)
    # the queries that `share` is over see `offsets` keys or more
    visible = np.arange(settings.offsets, subject.anatomy.max_positions + 1)
    return {"positions": table.assign(chance=np.where(table["space"] == "learned", (1 / visible).mean(), np.nan))}


def _title(names: Mapping[str, str]) -> str:
    return f"How heads of {names['model']} attend by position"


JOB = Job(
    name="positions",
    help="How much every head looks for a key by its distance, read off the weights, as if blocks before it wrote nothing (Elhage et al. 2021).",
    panel="read",
    example="mechscope positions gpt2 --offsets 8 --out runs/positions",
    settings=PositionsSettings,
    arguments=("model",),
    inputs=(MODELS,),
    stages=(Stage(name="positions", work=_scores, hangs_on=("components", "offsets", "embedding"), inputs=(MODELS,)),),
    sections=("positions",),
    title=_title,
    check=_check,
)
