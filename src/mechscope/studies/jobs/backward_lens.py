"""`mechscope backward-lens`: what a training step on a text would write into weight matrices, in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mechscope.settings import Number, setting
from mechscope.studies.gradients import Gradients, check_gradients, matrices_of
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import layers_of
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.texts import TEXTS, means_over_texts

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.data.pairs import Pairs, PromptPair
    from mechscope.subject import Subject


@dataclass(frozen=True, kw_only=True)
class BackwardLensSettings(OneModel, Gradients):
    """Which texts and matrices."""

    panel: ClassVar[str] = "Backward lens"

    documents: Number = setting(8, "Documents or prompts to read; every token of each is a row of the table.")
    max_tokens: Number = setting(256, "Most tokens of a text; lowered to what the model can read.")


def _check(run: JobRun[BackwardLensSettings]) -> None:
    check_gradients(run.first, run[TEXTS], run.settings)


def _projected(run: JobRun[BackwardLensSettings]) -> Tables:
    from mechscope.lens import backward_lens

    settings, subject, texts = run.settings, run.first, run[TEXTS]
    table = backward_lens(
        subject,
        texts,
        matrices=matrices_of(settings.matrices),
        layers=layers_of(settings.layers, subject.anatomy),
        k=settings.top,
        execution=run.execution,
    )
    table = _judged(table, texts, subject)
    return {"backward_lens": table, "backward_lens_summary": _summary(table, chance=settings.top / subject.anatomy.vocab_size)}


def _wanted(pair: PromptPair) -> dict[int, tuple[int, ...]]:
    """Return the tokens that the loss wants next, by position."""
    if pair.target is not None:
        return {at - 1: (pair.clean[at],) for at in range(*pair.target)}
    return {len(pair.clean) - 1: pair.answers}


def _judged(table: pd.DataFrame, texts: Pairs, subject: Subject) -> pd.DataFrame:
    """Add what the loss wants next at each position, empty where it wants nothing there, and whether it is among the top tokens."""
    wanted = {(pair.id, at): ids for pair in texts for at, ids in _wanted(pair).items()}
    of_rows = [wanted.get(where, ()) for where in zip(table["text"], table["position"], strict=True)]
    return table.assign(
        target=[subject.spelling.token(ids[0]) if ids else "" for ids in of_rows],
        promoted=[bool(set(ids) & set(top)) for ids, top in zip(of_rows, table["top_ids"], strict=True)],
    )


def _summary(table: pd.DataFrame, *, chance: float) -> pd.DataFrame:
    by = ["layer", "matrix", "side"]
    sizes = means_over_texts(table, by, "update_norm")
    scored = table[table["target"] != ""].assign(promoted=lambda rows: rows["promoted"].astype(float))
    return sizes.merge(means_over_texts(scored, by, "promoted").drop(columns="n"), on=by, how="left").assign(chance=chance)


def _title(names: Mapping[str, str]) -> str:
    return f"What training would write into {names['model']}"


JOB = Job(
    name="backward-lens",
    help="The backward lens: what a step of training on a text would write into weights, token by token (Katz et al. 2024).",
    panel="read",
    example='mechscope backward-lens gpt2 --text "The Eiffel Tower stands in the city of Rome" --out runs/backward-lens',
    settings=BackwardLensSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS),
    stages=(Stage(name="backward-lens", work=_projected, hangs_on=("matrices", "layers", "top"), inputs=(MODELS, TEXTS)),),
    sections=("backward-lens",),
    title=_title,
    check=_check,
)
