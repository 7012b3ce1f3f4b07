"""`mechscope features shift`: take out of a model the latents that a biased classifier should not use, and see what it then tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Gt, Lt

from mechscope.errors import DataError, SettingsError
from mechscope.settings import Count, Number, setting
from mechscope.studies.dictionary_files import DICTIONARIES, DictionaryFiles, autoencoders
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.data.two_labels import TwoLabels
    from mechscope.features import Node, Place


@dataclass(frozen=True, kw_only=True)
class FeaturesShiftSettings(OneModel, DictionaryFiles):
    """Which texts, which classifier, which latents."""

    panel: ClassVar[str] = "SHIFT"

    data: str = setting(
        "newsroom",
        "Texts with two labels: a JSONL, CSV or Parquet file with the columns text, intended and unintended, or newsroom: articles dated by a weekday or a "
        "date (intended), about a vote or an opening (unintended).",
    )
    texts: Number = setting(600, "Texts at most.")
    max_tokens: Number = setting(256, "Most tokens of a text; lowered to what the model can read.")
    probe: str | None = setting(
        None, "The residual stream that the classifier reads, such as resid6; by default behind the last dictionary's block."
    )
    unintended: str | None = setting(
        None, "A file with the latents judged unintended, one per line; by default they are judged by the labels of balanced texts."
    )
    latents: Number = setting(50, "Latents that are judged: those with the largest effects on the classifier.")
    filling: Literal["mean", "zero"] = setting("mean", "What ablated latents become: their mean over the training texts, or zero.")
    draws: Count = setting(5, "Sets of random latents, as many at each place: the control.")
    test_share: Annotated[float, Gt(0), Lt(1)] = setting(0.5, "Share of the smallest group of labels that is tested on.")
    tokens_per_batch: Number | None = setting(2048, "Most tokens of a batch of texts, padding included; decides the memory.")


def _labelled(run: JobRun[FeaturesShiftSettings]) -> TwoLabels:
    from mechscope.data.two_labels import newsroom_two_labels, read_two_labels

    settings, subject = run.settings, run.first
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which texts need")
    longest = min(settings.max_tokens, subject.anatomy.max_positions)
    if settings.data == "newsroom":
        return newsroom_two_labels(settings.texts, subject.tokenizer, max_tokens=longest, seed=settings.seed)
    return read_two_labels(settings.data, subject.tokenizer, limit=settings.texts, max_tokens=longest)


LABELLED: Input[TwoLabels] = Input(
    "labelled",
    _labelled,
    lambda found: [found.texts.hash, found.intended.tolist(), found.unintended.tolist()],
    lambda found: {"data": {"source": found.texts.source, "texts": len(found), "hash": found.texts.hash}},
)


def _by_hand(run: JobRun[FeaturesShiftSettings]) -> list[Node] | None:
    from mechscope.features import Node

    if run.settings.unintended is None:
        return None
    try:
        text = Path(run.settings.unintended).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"setting 'unintended' is {run.settings.unintended!r}, which cannot be read: {error}; give a text file in UTF-8, a latent per line"
        ) from error
    lines = text.replace(",", "\n").splitlines()
    found = [Node.parse(line.strip()) for line in lines if line.strip()]
    if not found:
        raise SettingsError(
            f"setting 'unintended' is {run.settings.unintended!r}, which names no latent: write one per line, such as resid6.f10"
        )
    return found


JUDGED: Input[Any] = Input("judged", _by_hand, lambda nodes: None if nodes is None else [node.name for node in nodes])
"""Latents judged by hand; None where the labels judge."""


def _place(run: JobRun[FeaturesShiftSettings]) -> Place:
    from mechscope.features import Place

    if run.settings.probe is not None:
        return Place.parse(run.settings.probe)
    return Place("residual", max(each.place.layer for each in autoencoders(run)))


def _check(run: JobRun[FeaturesShiftSettings]) -> None:
    from mechscope.data.two_labels import biased_split
    from mechscope.features.shift import check_judged, check_shift

    check_shift(run.first, autoencoders(run), _place(run), run.settings.filling)
    check_judged(autoencoders(run), run[JUDGED] or ())
    biased_split(run[LABELLED], test_share=run.settings.test_share, seed=run.settings.seed)


def _shifted(run: JobRun[FeaturesShiftSettings]) -> Tables:
    from mechscope.data.two_labels import biased_split
    from mechscope.features import shift

    settings, place = run.settings, _place(run)
    found = shift(
        run.first,
        autoencoders(run),
        biased_split(run[LABELLED], test_share=settings.test_share, seed=settings.seed),
        place,
        unintended=run[JUDGED],
        most=settings.latents,
        filling=settings.filling,
        draws=settings.draws,
        execution=run.execution,
    )
    by = "labels" if settings.unintended is None else "hand"
    return {
        "shift_latents": found.latents.assign(by=by),
        "shift_groups": found.groups,
        "shift_methods": found.methods.assign(probe=place.name),
    }


_INPUTS = (MODELS, LABELLED, DICTIONARIES, JUDGED)
SHIFTED = Stage(name="shift", work=_shifted, hangs_on=("probe", "latents", "filling", "draws", "test_share", "seed"), inputs=_INPUTS)


def _title(names: Mapping[str, str]) -> str:
    return f"A biased classifier on {names['model']}, without unintended latents"


JOB = Job(
    name="features-shift",
    help="SHIFT: ablate the latents that a biased classifier should not use, beside erasing the unintended label and random latents (Marks et al. 2024).",
    panel="features",
    group="features",
    example="mechscope features shift gpt2 --dictionary runs/features/dictionaries/resid6-4096.safetensors --data labelled.jsonl --out runs/shift",
    settings=FeaturesShiftSettings,
    arguments=("model",),
    inputs=_INPUTS,
    stages=(SHIFTED,),
    sections=("shift",),
    title=_title,
    check=_check,
)
