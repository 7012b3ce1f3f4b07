"""Single sweeps into a run folder: `mechscope patch` and `mechscope ablate`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mechscope.causal import Effects, ablate, attribute, mean_of, patch
from mechscope.causal.patching import Positions
from mechscope.causal.places import site_named
from mechscope.data.documents import load_documents
from mechscope.data.newsroom import newsroom_pairs
from mechscope.data.pair_files import read_pairs
from mechscope.data.pairs import Pairs, from_examples
from mechscope.data.prompt import encode
from mechscope.data.salience import salience_pairs
from mechscope.data.tasks import TASKS, generate_pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import load
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.studies import stages
from mechscope.studies.pair_settings import AblateSettings, PairSettings, PairsSettings, PatchSettings
from mechscope.studies.settings import VOLATILE, deciding
from mechscope.studies.summarization import Study, record_command
from mechscope.subject import Subject

_GENERATED = 100


def patch_run(settings: PatchSettings, out: str | Path, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> Study:
    """Patch every place of a site into a run folder: the table `effects`, heatmaps, report.

    Args:
        settings: What to patch and how.
        out: The run folder.
        command: The command line that asked for it, for the report.
        progress: Called with a label, what is done and how much there is.

    Raises:
        MechscopeError: Model, pairs or settings cannot be used, or the folder belongs to another run.
    """
    with RunFolder.open(out, asdict(settings), kind="patch", volatile=VOLATILE) as run:
        record_command(run, command)
        subject = _load(settings)
        pairs = load_pairs(settings, subject)
        _record(run, subject, pairs, settings)
        options: dict[str, Any] = {
            name: getattr(settings, name) for name in ("site", "metric", "direction", "components", "tokens_per_batch", "seed")
        }
        options["positions"] = parse_positions(settings.positions)
        with run.stage("effects", {"model": subject.fingerprint, "pairs": pairs.hash, **deciding(settings)}) as stage:
            if not stage.done:
                if settings.method == "exact":
                    found = patch(subject, pairs, **options, progress=progress)
                else:
                    found = attribute(subject, pairs, **options, check=settings.check, progress=progress)
                _write(run, stage, found)
        return Study.of(run, stages.report_stage(run))


def ablate_run(
    settings: AblateSettings, out: str | Path, *, command: Sequence[str] | None = None, progress: Progress | None = None
) -> Study:
    """Ablate places one at a time into a run folder; arguments and errors as for `patch_run`."""
    if (settings.pairs is None) is (settings.data is None):
        raise SettingsError("give either pairs (a file or a task) or data (documents with summaries) to ablate on")
    with RunFolder.open(out, asdict(settings), kind="ablate", volatile=VOLATILE) as run:
        record_command(run, command)
        subject = _load(settings)
        texts = load_pairs(settings, subject) if settings.data is None else _documents(settings.data, settings, subject)
        _record(run, subject, texts, settings)
        sites = [site.strip() for site in settings.sites.split(",")]
        inputs = {"model": subject.fingerprint, "texts": texts.hash, **deciding(settings)}
        if settings.source == "resample":  # draws among a batch's texts
            inputs["tokens_per_batch"] = settings.tokens_per_batch
        with run.stage("effects", inputs) as stage:
            if not stage.done:
                source = mean_of(subject, texts, [site_named(site) for site in sites]) if settings.source == "mean" else settings.source
                found = ablate(
                    subject,
                    texts,
                    sites=sites,
                    source=source,
                    mode=settings.mode,
                    metric=settings.metric or ("loss" if settings.data is not None else "logit-diff"),
                    components=settings.components,
                    tokens_per_batch=settings.tokens_per_batch,
                    seed=settings.seed,
                    progress=progress,
                )
                _write(run, stage, found)
        return Study.of(run, stages.report_stage(run))


def load_pairs(settings: PairsSettings, subject: Subject) -> Pairs:
    """Read or generate the prompt pairs that a command names.

    Raises:
        MechscopeError: No pairs are named, the name is not known, or they cannot be used with this model.
    """
    source = settings.pairs
    if source is None:
        raise SettingsError(f"no pairs were given: name a JSONL file, a task ({', '.join(TASKS)}), newsroom:ROLE or salience:DOCUMENTS")
    number = settings.limit or _GENERATED
    if source == "induction" and subject.tokenizer is None:
        return TASKS["induction"](subject.anatomy.vocab_size, number, seed=settings.seed)
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which text pairs need; only the task 'induction' works without")
    if source in TASKS:
        return generate_pairs(source, subject.tokenizer, number, seed=settings.seed)
    if source.startswith("salience:"):
        # more documents than pairs: some have no sentence that is salient
        corpus = load_documents(source.removeprefix("salience:"), limit=2 * number, seed=settings.seed)
        longest = min(settings.max_tokens, subject.anatomy.max_positions)
        return salience_pairs(corpus, subject.tokenizer, max_tokens=longest, seed=settings.seed).first(number)
    if match := re.fullmatch(r"newsroom(?::(\w+))?", source):
        role: Any = match[1] or "where"
        return newsroom_pairs(number, seed=settings.seed, role=role, tokenizer=subject.tokenizer)
    return read_pairs(source, subject.tokenizer, limit=settings.limit, on_problem=settings.on_problem)


def parse_positions(text: str) -> Positions:
    """Read positions as a command line gives them: a name, names, or numbers, joined by commas."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise SettingsError("positions are empty: use all, last, changed, each, a segment or numbers")
    if all(re.fullmatch(r"-?\d+", part) for part in parts):
        return [int(part) for part in parts]
    return parts[0] if len(parts) == 1 else parts


def _load(settings: PairSettings) -> Subject:
    return load(settings.model, dtype=settings.dtype, device=settings.device, unsafe=settings.unsafe)


def _documents(data: str, settings: AblateSettings, subject: Subject) -> Pairs:
    corpus = load_documents(data, limit=settings.documents, seed=settings.seed)
    encoded = encode(corpus, subject.tokenizer, max_tokens=min(settings.max_tokens, subject.anatomy.max_positions))
    return from_examples(encoded, data)


def _record(run: RunFolder, subject: Subject, pairs: Pairs, settings: PairSettings) -> None:
    run.record("models", {"model": {"source": subject.source, "family": subject.family, "fingerprint": subject.fingerprint}})
    run.record("data", {"source": pairs.source, "pairs": len(pairs), "problems": pairs.problems, "hash": pairs.hash})
    run.record("seeds", {"study": settings.seed})


def _write(run: RunFolder, stage: Any, found: Effects) -> None:
    """Write the table; what the sweep says of itself goes into the manifest."""
    stage.write_table("effects", found.table)
    run.record("notes", found.notes)
