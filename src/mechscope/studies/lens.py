"""Lenses into a run folder: `mechscope lens`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mechscope.data.pairs import Pairs, PromptPair, from_examples
from mechscope.errors import DataError, SettingsError
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.studies import stages
from mechscope.studies.heads import read_documents, read_models, record_reading
from mechscope.studies.interventions import load_pairs
from mechscope.studies.lens_stages import Asked, lens_stage, translators_stage
from mechscope.studies.pair_settings import PairsSettings
from mechscope.studies.reading_settings import LensSettings
from mechscope.studies.settings import VOLATILE
from mechscope.studies.summarization import Study, record_command
from mechscope.subject import Subject


def lens_run(settings: LensSettings, out: str | Path, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> Study:
    """Read every layer of a model, or of a base and a tuned model, as if it were the last.

    Args:
        settings: Which models, texts and places.
        out: The run folder.
        command: The command line that asked for it, for the report.
        progress: Called with a label, what is done and how much there is.

    Raises:
        MechscopeError: Models, texts or settings cannot be used, or the folder belongs to another run.
    """
    if sum(source is not None for source in (settings.text, settings.data, settings.pairs)) != 1:
        raise SettingsError("give one of text (a text), data (documents with summaries) or pairs (prompts with answers) to read")
    with RunFolder.open(out, asdict(settings), kind="lens", volatile=VOLATILE) as run:
        record_command(run, command)
        subjects = read_models(settings)
        first = next(iter(subjects.values()))
        texts = _texts(settings, first)
        record_reading(run, subjects, settings, None)
        run.record("data", {"source": texts.source, "texts": len(texts), "problems": texts.problems, "hash": texts.hash})
        translators = None
        if settings.lens_data is not None:
            training = _training(settings, settings.lens_data, first, texts)
            translators = translators_stage(run, subjects, training, steps=settings.lens_steps, seed=settings.seed, progress=progress)
        asked = Asked(
            texts,
            sites=tuple(site.strip() for site in settings.sites.split(",") if site.strip()),
            norm=settings.norm,
            top=settings.top,
            grid_texts=settings.grid_texts,
            attribution=_metric(texts) if settings.attribution else None,
            tokens_per_batch=settings.tokens_per_batch,
        )
        lens_stage(run, subjects, asked, translators=translators, progress=progress)
        return Study.of(run, stages.report_stage(run))


def _texts(settings: LensSettings, subject: Subject) -> Pairs:
    """Read or make the texts; each is cut to what the model can read, and of a bare text every token is predicted."""
    if settings.pairs is not None:
        asked = PairsSettings(
            pairs=settings.pairs,
            limit=settings.documents,
            max_tokens=settings.max_tokens,
            on_problem=settings.on_problem,
            seed=settings.seed,
        )
        return load_pairs(asked, subject).first(settings.documents)
    if settings.data is not None:
        read = read_documents(settings, settings.data, settings.documents, subject)
        problems = {**read.corpus.problems, **read.encoded.problems}
        return replace(from_examples(read.encoded, read.corpus.source), problems=problems)
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which a text needs: load it with one")
    ids = tuple(subject.tokenizer(settings.text)["input_ids"][: min(settings.max_tokens, subject.anatomy.max_positions)])
    if len(ids) < 2:
        raise DataError(f"the text {settings.text!r} has {len(ids)} tokens: give at least two, so that one is predicted")
    return Pairs((PromptPair("text", ids, ids, target=(1, len(ids))),), "text")


def _metric(texts: Pairs) -> str:
    """Return what is attributed: the logit difference where all texts have right and wrong answers, else the logit of what comes next."""
    return "logit-diff" if all(pair.answers and pair.wrong_answers for pair in texts) else "target-logit"


def _training(settings: LensSettings, source: str, subject: Subject, texts: Pairs) -> Pairs:
    """Return the documents that a tuned lens learns from: none of those that are read with it."""
    read = read_documents(settings, source, settings.lens_documents + len(texts), subject)
    known = {pair.clean for pair in texts}
    kept = tuple(pair for pair in from_examples(read.encoded, read.corpus.source) if pair.clean not in known)
    if len(kept) < 2:
        raise DataError(f"{source}: {len(kept)} documents are left to train the tuned lens on, besides those it reads: give more")
    return Pairs(kept[: settings.lens_documents], read.corpus.source)
