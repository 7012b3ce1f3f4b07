"""`mechscope gradient-directions`: the leading directions of weight gradients, in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mechscope.data.splits import held_out
from mechscope.settings import Number, setting
from mechscope.studies.gradients import Gradients, check_gradients, matrices_of
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import layers_of
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.texts import TEXTS

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.data.pairs import Pairs


@dataclass(frozen=True, kw_only=True)
class GradientDirectionsSettings(OneModel, Gradients):
    """Which texts and matrices, and how many directions of each."""

    panel: ClassVar[str] = "Gradient directions"

    rank: Number = setting(5, "Directions of each matrix, the strongest first.")


def _check(run: JobRun[GradientDirectionsSettings]) -> None:
    check_gradients(run.first, run[TEXTS], run.settings)


def _directions(run: JobRun[GradientDirectionsSettings]) -> Tables:
    texts = run[TEXTS]
    table = _of(run, texts).assign(n=len(texts))
    if len({pair.clean for pair in texts}) > 1:
        halves = held_out(texts, 0.5, run.settings.seed, of_pairs=False)
        table["repeated"] = _repeated(table, [_of(run, half) for half in halves])
    return {"gradient_directions": table}


def _of(run: JobRun[GradientDirectionsSettings], texts: Pairs) -> pd.DataFrame:
    from mechscope.lens import gradient_directions

    settings = run.settings
    return gradient_directions(
        run.first,
        texts,
        matrices=matrices_of(settings.matrices),
        layers=layers_of(settings.layers, run.first.anatomy),
        rank=settings.rank,
        k=settings.top,
        execution=run.execution,
    )


def _repeated(table: pd.DataFrame, halves: list[pd.DataFrame]) -> list[float]:
    """Return of each direction's top tokens the share that is among the top tokens of some direction of that matrix in both halves of the texts."""
    known = [
        {module: {token for tokens in own["top_ids"] for token in tokens} for module, own in half.groupby("module", sort=False)}
        for half in halves
    ]
    return [
        sum(all(token in half.get(module, ()) for half in known) for token in top) / len(top)
        for module, top in zip(table["module"], table["top_ids"], strict=True)
    ]


def _title(names: Mapping[str, str]) -> str:
    return f"Directions in which training would change {names['model']}"


JOB = Job(
    name="gradient-directions",
    help="The leading directions of weight gradients, in tokens: what a step of training on texts would write most (Katz et al. 2024).",
    panel="read",
    example="mechscope gradient-directions gpt2 --data articles.jsonl --matrices mlp_down,attention_output --out runs/directions",
    settings=GradientDirectionsSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS),
    stages=(
        Stage(name="gradient-directions", work=_directions, hangs_on=("matrices", "layers", "rank", "top", "seed"), inputs=(MODELS, TEXTS)),
    ),
    sections=("gradient-directions",),
    title=_title,
    check=_check,
)
