"""`mechscope attention-lens`: for every head a trained map from what it writes to the model's prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Gt, Lt

from mechscope.data.splits import held_out
from mechscope.settings import Number, nested, setting
from mechscope.settings.lens import TunedLensSettings
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import layers_of
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs


@dataclass(frozen=True, kw_only=True)
class AttentionLensSettings(OneModel, Texts):
    """Which heads, and on which texts their maps are learned and judged."""

    panel: ClassVar[str] = "Attention lens"

    layers: str | None = setting(None, 'Layers whose heads get a map, such as "0-5,11"; by default all.')
    documents: Number = setting(200, "Documents or prompts: those that are learned from and those that are judged on.")
    test_share: Annotated[float, Gt(0), Lt(1)] = setting(0.2, "Share of the texts that are judged on and not learned from.")
    training: TunedLensSettings = nested(TunedLensSettings)


def _split(run: JobRun[AttentionLensSettings]) -> tuple[Pairs, Pairs]:
    return held_out(run[TEXTS], run.settings.test_share, run.settings.seed)


def _file(run: JobRun[AttentionLensSettings]) -> Path:
    return run.folder.path / "lenses" / "attention.safetensors"


def _check(run: JobRun[AttentionLensSettings]) -> None:
    from mechscope.data.scoring import check_fits

    check_fits(run.first, run[TEXTS])
    layers_of(run.settings.layers, run.first.anatomy)
    _split(run)


def _train(run: JobRun[AttentionLensSettings]) -> Tables:
    from mechscope.lens import train_attention_lens

    texts, _ = _split(run)
    trained = train_attention_lens(
        run.first,
        texts,
        layers=layers_of(run.settings.layers, run.first.anatomy),
        settings=run.settings.training,
        execution=run.execution,
    )
    trained.translators.save(_file(run))
    run.stage.add(_file(run))
    return {"attention_lens_training": trained.curve}


def _evaluate(run: JobRun[AttentionLensSettings]) -> Tables:
    from mechscope.lens import Translators, evaluate_lens, with_training

    _, texts = _split(run)
    translators = Translators.load(_file(run), run.first)
    judged = evaluate_lens(run.first, texts, translators, execution=run.execution)
    return {"attention_lens": with_training(judged, run.table("attention_lens_training"))}


TRAINING = Stage(name="training", work=_train, hangs_on=("layers", "test_share", "training", "seed"), inputs=(MODELS, TEXTS))
EVALUATION = Stage(name="evaluation", work=_evaluate, hangs_on=("test_share", "seed"), inputs=(MODELS, TEXTS), after=(TRAINING,))


def _title(names: Mapping[str, str]) -> str:
    return f"What the heads of {names['model']} say of the next token"


JOB = Job(
    name="attention-lens",
    help="The attention lens: train a map per head from what it writes to the model's prediction, judged on held-out texts (Sakarvadia et al. 2023).",
    panel="read",
    example="mechscope attention-lens gpt2 --data articles.jsonl --layers 8-11 --out runs/attention-lens",
    settings=AttentionLensSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS),
    stages=(TRAINING, EVALUATION),
    sections=("attention-lens",),
    title=_title,
    check=_check,
)
