"""Head roles into a run folder: `mechscope heads`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mechscope.data.sources import is_file_source
from mechscope.data.template import Template
from mechscope.instrument import load, load_pair
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.studies import stages
from mechscope.studies.corpora import encode_for, load_corpus
from mechscope.studies.reading_settings import HeadsSettings, ReadModelsSettings
from mechscope.studies.role_stages import Documents, attention_stage, chosen_heads, roles_stage
from mechscope.studies.settings import VOLATILE, DocumentSettings
from mechscope.studies.summarization import Study, record_command
from mechscope.subject import Subject


def heads_run(settings: HeadsSettings, out: str | Path, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> Study:
    """Score the roles of a model's heads, or of a base and a tuned model's, and show what chosen heads attend to.

    Args:
        settings: Which models, documents and heads.
        out: The run folder.
        command: The command line that asked for it, for the report.
        progress: Called with a label, what is done and how much there is.

    Raises:
        MechscopeError: Models, documents or settings cannot be used, or the folder belongs to another run.
    """
    with RunFolder.open(out, asdict(settings), kind="heads", volatile=VOLATILE) as run:
        record_command(run, command)
        subjects = read_models(settings)
        first = next(iter(subjects.values()))
        read = None if settings.data is None else read_documents(settings, settings.data, settings.documents, first)
        record_reading(run, subjects, settings, read)
        roles_stage(run, subjects, read, probes=settings.probes, seed=settings.seed, progress=progress)
        shown = read
        if shown is None and first.tokenizer is not None:
            shown = read_documents(settings, "newsroom", settings.show_texts, first)
        if shown is not None:
            attention_stage(
                run, subjects, shown.encoded.examples[: settings.show_texts], chosen_heads(run, settings.show), progress=progress
            )
        return Study.of(run, stages.report_stage(run))


def read_models(settings: ReadModelsSettings) -> dict[str, Subject]:
    """Load the one model as `model`, or both as `base` and `tuned`."""
    loading: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "unsafe": settings.unsafe}
    if settings.tuned is None:
        return {"model": load(settings.model, **loading)}
    pair = load_pair(settings.model, settings.tuned, **loading)
    return {"base": pair.base, "tuned": pair.tuned}


def read_documents(settings: DocumentSettings, source: str, number: int, subject: Subject) -> Documents:
    """Load and encode some documents; of a hub data set or the generated corpus those held out for testing."""
    corpus = load_corpus(settings, source, split=None if is_file_source(source) else "test", limit=number, name="documents")
    return Documents(corpus, encode_for(settings, corpus, subject), Template(settings.template))


def record_reading(run: RunFolder, subjects: Mapping[str, Subject], settings: DocumentSettings, read: Documents | None) -> None:
    """Keep models, documents and seed in the manifest."""
    run.record(
        "models",
        {
            name: {"source": subject.source, "family": subject.family, "fingerprint": subject.fingerprint}
            for name, subject in subjects.items()
        },
    )
    if read is not None:
        problems = {**read.corpus.problems, **read.encoded.problems}
        data = {"source": read.corpus.source, "documents": len(read.encoded), "problems": problems, "hash": read.encoded.hash}
        run.record("data", data)
    run.record("seeds", {"study": settings.seed})
