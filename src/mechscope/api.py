"""The same jobs from Python, in a few lines that fit a notebook.

Models may be given as sources (hub id, directory, adapter), as loaded `Subject`s or as modules in memory; documents as a source, a `Corpus`, or a list
of `Document`s. Results are DataFrames in frozen dataclasses; nothing is written unless a folder is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mechscope.adapt.training import Tuned
from mechscope.data.documents import Corpus, Document
from mechscope.data.prompt import Encoded
from mechscope.difference import Difference, difference
from mechscope.errors import DataError
from mechscope.instrument import Check, Edit, Knockout, intervene, load, load_pair, record
from mechscope.instrument import check_subject as check
from mechscope.progress import Progress
from mechscope.studies.corpora import encode_for, load_corpus
from mechscope.studies.resolving import resolve
from mechscope.studies.settings import BakeOffSettings, DiffSettings, StudySettings, TuneSettings
from mechscope.studies.summarization import Study, bakeoff_run, document_split
from mechscope.studies.summarization import study as run_study
from mechscope.studies.tuning import tune_run
from mechscope.subject import Pair, Subject, pair

__all__ = ["Check", "Edit", "Knockout", "bakeoff", "check", "diff", "intervene", "load", "record", "study", "tune"]

Model = str | Path | Subject | nn.Module
Documents = str | Path | Corpus | Encoded | Sequence[Document]


def diff(
    base: Model, tuned: Model, data: Documents, *, tokenizer: Any = None, progress: Progress | None = None, **settings: Any
) -> Difference:
    """Measure what fine-tuning changed between two models.

    Args:
        base: The pre-trained model.
        tuned: The fine-tuned model or adapter.
        data: Documents with summaries.
        tokenizer: For models in memory that come without one.
        progress: Called with a label, what is done and how much there is.
        settings: Any field of `mechscope.studies.settings.DiffSettings`, for example `documents=100`, `max_tokens=512`.

    Returns:
        Tables of heads, layers, weights and outputs.

    Raises:
        MechscopeError: Models, documents or settings cannot be used.
    """
    resolved = resolve(
        DiffSettings, base=str(base), tuned=str(tuned), data=data if isinstance(data, str) else "given in memory", **settings
    )
    compared = _pair(base, tuned, tokenizer, resolved)
    encoded = data if isinstance(data, Encoded) else encode_for(resolved, _corpus(data, resolved), compared.base)
    return difference(
        compared,
        encoded,
        tokens_per_batch=resolved.tokens_per_batch,
        gini=resolved.gini,
        replicates=resolved.replicates,
        geometry_documents=resolved.geometry_documents,
        seed=resolved.seed,
        progress=progress,
    )


def tune(base: str | Path, data: str | Path, out: str | Path, *, progress: Progress | None = None, **settings: Any) -> Tuned:
    """Fine-tune a model to summarize, fully or by LoRA at chosen places.

    Args:
        base: The pre-trained model's source.
        data: Source of the documents.
        out: Folder for the model or adapter.
        progress: Called with a label, what is done and how much there is.
        settings: Any field of `mechscope.studies.settings.TuneSettings`, for example `method="lora"`, `targets="layers:2,3,5"`.

    Raises:
        MechscopeError: Model, documents or settings cannot be used.
    """
    return tune_run(resolve(TuneSettings, base=str(base), data=str(data), **settings), out, progress=progress)


def bakeoff(base: str | Path, data: str | Path, out: str | Path, *, progress: Progress | None = None, **settings: Any) -> Study:
    """Compare LoRA at chosen layers and heads with LoRA everywhere, at random places, and full fine-tuning.

    Arguments as for `tune`, with the fields of `mechscope.studies.settings.BakeOffSettings`; `out` is a run folder.
    """
    return bakeoff_run(resolve(BakeOffSettings, base=str(base), data=str(data), **settings), out, progress=progress)


def study(base: str | Path, data: str | Path, out: str | Path, *, progress: Progress | None = None, **settings: Any) -> Study:
    """Run the whole summarization study into a run folder, or continue it.

    Arguments as for `tune`, with the fields of `mechscope.studies.settings.StudySettings`, for example `tuned="my-model"`.
    """
    return run_study(resolve(StudySettings, base=str(base), data=str(data), **settings), out, progress=progress)


def _pair(base: Model, tuned: Model, tokenizer: Any, settings: DiffSettings) -> Pair:
    options = {"dtype": settings.dtype, "device": settings.device, "unsafe": settings.unsafe, "tokenizer": tokenizer}
    if isinstance(base, str | Path) and isinstance(tuned, str | Path):
        return load_pair(base, tuned, resize=settings.resize, **options)
    sides = [side if isinstance(side, Subject) else load(side, **options) for side in (base, tuned)]
    return pair(sides[0], sides[1], resize=settings.resize)


def _corpus(data: Documents, settings: DiffSettings) -> Corpus:
    if isinstance(data, Corpus):
        return data
    if isinstance(data, str | Path):
        return load_corpus(settings, str(data), split=document_split(settings, str(data)), limit=settings.documents, name="documents")
    if isinstance(data, Encoded):
        raise DataError("these documents are encoded already: give the corpus they came from")
    return Corpus(tuple(data), source="given in memory")
