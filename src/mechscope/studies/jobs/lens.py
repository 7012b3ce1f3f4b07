"""`mechscope lens`: what each layer already says of the next token, and which parts put the answer there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mechscope.choices import LensNorm
from mechscope.errors import DataError
from mechscope.settings import Number, nested, setting
from mechscope.settings.lens import TunedLensSettings
from mechscope.studies.groups import ModelAndTuned
from mechscope.studies.inputs import MODELS, read_documents
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import Input, JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts, metric_of, sites_of

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs


@dataclass(frozen=True, kw_only=True)
class LensSettings(ModelAndTuned, Texts):
    """Which models, texts and places."""

    panel: ClassVar[str] = "Lens"

    sites: str = setting("residual", "Where to read, joined by commas: residual, attention_output, mixer_output, mlp_output, head_output.")
    norm: LensNorm = setting("applied", "The final norm: applied to what is read, or with the final stream's scale.")
    top: Number = setting(5, "Tokens kept per place.")
    grid_texts: Number = setting(3, "Texts that are kept token by token.")
    attribution: bool = setting(True, "Direct logit attribution: what every head and MLP adds to the answer, or to the summary.")
    lens_data: str | None = setting(None, "Documents to train a tuned lens on, for each model, and to read with it too.")
    lens_documents: Number = setting(200, "Documents to train the tuned lens on.")
    training: TunedLensSettings = nested(TunedLensSettings, prefix="lens_")

    def __post_init__(self) -> None:
        """Refuse sites that there are not.

        Raises:
            SettingsError: There is not one source of texts, or a site is not known.
        """
        super().__post_init__()
        sites_of(self.sites)


def _training(run: JobRun[LensSettings]) -> Pairs | None:
    """Return the documents that a tuned lens learns from: none of those that are read with it."""
    from mechscope.data.pairs import Pairs

    settings, texts, source = run.settings, run[TEXTS], run.settings.lens_data
    if source is None:
        return None
    documents = read_documents(settings, source, settings.lens_documents + len(texts), run.first)
    known = {pair.clean for pair in texts}
    kept = tuple(pair for pair in documents.pairs if pair.clean not in known)
    if len(kept) < 2:
        raise DataError(f"{source}: {len(kept)} documents are left to train the tuned lens on, besides those it reads: give more")
    return Pairs(kept[: settings.lens_documents], documents.corpus.source)


TRAINING: Input[Pairs | None] = Input("training", _training, lambda texts: None if texts is None else texts.hash)
"""What a tuned lens is trained on; None where there is none."""


def _check(run: JobRun[LensSettings]) -> None:
    from mechscope.data.scoring import check_fits

    for subject in run[MODELS].values():
        for texts in (run[TEXTS], run[TRAINING]):
            if texts is not None:
                check_fits(subject, texts)


def _train(run: JobRun[LensSettings]) -> Tables:
    import pandas as pd

    from mechscope.lens import train_tuned_lens

    training, curves = run[TRAINING], []
    if training is None:
        raise RuntimeError("a tuned lens is trained without texts")
    for label, subject in run[MODELS].items():
        trained = train_tuned_lens(subject, training, settings=run.settings.training, execution=run.execution)
        trained.translators.save(_file(run, label))
        run.stage.add(_file(run, label))
        curves.append(trained.curve.assign(model=label))
    return {"lens_training": pd.concat(curves, ignore_index=True)}


def _read(run: JobRun[LensSettings]) -> Tables:
    from mechscope.lens.translators import Translators
    from mechscope.studies.lens import LensRequest, lens_tables

    settings, models, texts = run.settings, run[MODELS], run[TEXTS]
    request = LensRequest(
        texts,
        sites=sites_of(settings.sites),
        norm=settings.norm,
        top=settings.top,
        grid_texts=settings.grid_texts,
        attribution=metric_of(texts) if settings.attribution else None,
    )
    translators = None
    if settings.lens_data is not None:
        translators = {label: Translators.load(_file(run, label), subject) for label, subject in models.items()}
    return lens_tables(models, request, translators=translators, execution=run.execution)


def _judge(run: JobRun[LensSettings]) -> Tables:
    import pandas as pd

    from mechscope.lens import Translators, evaluate_lens, with_training

    curves, judged = run.table("lens_training"), []
    for label, subject in run[MODELS].items():
        table = evaluate_lens(subject, run[TEXTS], Translators.load(_file(run, label), subject), execution=run.execution)
        judged.append(with_training(table, curves[curves["model"] == label]).assign(model=label))
    return {"lens_judged": pd.concat(judged, ignore_index=True)}


def _file(run: JobRun[LensSettings], label: str) -> Path:
    return run.folder.path / "lenses" / f"{label}.safetensors"


TUNED_LENS = Stage(
    name="tuned-lens",
    work=_train,
    hangs_on=("training", "seed"),
    inputs=(MODELS, TRAINING),
    when=lambda settings: settings.lens_data is not None,
)
TUNED_LENS_JUDGED = Stage(
    name="tuned-lens-judged",
    work=_judge,
    hangs_on=(),
    inputs=(MODELS, TEXTS),
    after=(TUNED_LENS,),
    when=lambda settings: settings.lens_data is not None,
)
LENS = Stage(
    name="lens",
    work=_read,
    hangs_on=("sites", "norm", "top", "grid_texts", "attribution"),
    inputs=(MODELS, TEXTS),
    after=(TUNED_LENS,),
)


def _title(names: Mapping[str, str]) -> str:
    if "tuned" in names:
        return f"Layer by layer: {names['base']} before and after fine-tuning"
    return f"What {names['model']} predicts, layer by layer"


JOB = Job(
    name="lens",
    help="What each layer already says of the next token, and which parts put the answer there.",
    panel="read",
    example='mechscope lens gpt2 --text "The Eiffel Tower stands in the city of Paris" --out runs/lens',
    settings=LensSettings,
    arguments=("model", "tuned"),
    inputs=(MODELS, TEXTS, TRAINING),
    stages=(TUNED_LENS, TUNED_LENS_JUDGED, LENS),
    sections=("lens", "tuned-lens", "attribution"),
    title=_title,
    check=_check,
    function="read_lens",
)
