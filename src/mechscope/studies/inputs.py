"""What jobs load: models, documents, prompt pairs; each with its fingerprint and what the manifest keeps of it.

Heavy imports stand inside the functions: jobs name inputs at import, and `--help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mechscope.errors import DataError
from mechscope.studies.groups import DEFAULT_TEMPLATE, DocumentFormat
from mechscope.studies.run import Input, JobRun

if TYPE_CHECKING:
    from mechscope.data.documents import Corpus
    from mechscope.data.pairs import Pairs
    from mechscope.data.prompt import Encoded
    from mechscope.data.template import Template
    from mechscope.studies.corpora import Splits
    from mechscope.subject import Pair, Subject

# pairs of a generated task where nobody says how many
_GENERATED = 100
# generated tasks that are made of token ids, not of words
_OF_TOKENS = ("induction", "repeated")


@dataclass(frozen=True)
class Documents:
    """Documents with summaries, as text and as tokens.

    Attributes:
        corpus: The texts.
        encoded: Their tokens.
        template: The template they were encoded with.
    """

    corpus: Corpus
    encoded: Encoded
    template: Template

    def first(self, n: int) -> Documents:
        """Return the first documents."""
        from mechscope.data.prompt import Encoded

        return replace(self, encoded=Encoded(self.encoded.examples[:n], self.encoded.problems))

    @property
    def pairs(self) -> Pairs:
        """The documents as texts whose target is the summary."""
        from mechscope.data.pairs import from_examples

        problems = {**self.corpus.problems, **self.encoded.problems}
        return replace(from_examples(self.encoded, self.corpus.source), problems=problems)


def loading(settings: Any) -> dict[str, Any]:
    """Return how models are loaded, as keywords of `load`."""
    return {"dtype": settings.dtype, "device": settings.device, "unsafe": settings.unsafe}


def load_subject(run: JobRun[Any], name: str, **options: Any) -> Subject:
    """Load the model that a setting names, or take the one that was given in memory."""
    from mechscope.instrument import load
    from mechscope.subject import Subject

    source = run.source(name)
    if isinstance(source, Subject):
        return source
    return load(source, **{**loading(run.settings), "tokenizer": tokenizer_of(run), **options})


def tokenizer_of(run: JobRun[Any]) -> Any:
    """Return the tokenizer that was given in memory, or the source of the one that is named; None for the model's own."""
    return run.given.get("tokenizer") or run.settings.tokenizer


def _models(run: JobRun[Any]) -> dict[str, Subject]:
    """Load the one model as `model`, or as `base` where a job makes others of it; two as `base` and `tuned`."""
    first = "model" if hasattr(run.settings, "model") else "base"
    if getattr(run.settings, "tuned", None) is None:
        return {first: load_subject(run, first)}
    both = load_both(run, first, "tuned")
    return {"base": both.base, "tuned": both.tuned}


def load_both(run: JobRun[Any], base: str, tuned: str) -> Pair:
    """Load a base and a tuned model by the names of their settings; an adapter's base is the same weights with the adapter off."""
    from mechscope.instrument import load_pair
    from mechscope.subject import pair

    resize: Literal["refuse", "truncate"] = getattr(run.settings, "resize", "refuse")
    if base in run.given or tuned in run.given:
        return pair(load_subject(run, base), load_subject(run, tuned), resize=resize)
    return load_pair(
        getattr(run.settings, base), getattr(run.settings, tuned), resize=resize, tokenizer=tokenizer_of(run), **loading(run.settings)
    )


def fingerprints(models: Mapping[str, Subject]) -> dict[str, list[str]]:
    """Return what of models decides a result: their weights and the type they are computed in."""
    return {label: [subject.fingerprint, str(subject.dtype)] for label, subject in models.items()}


def record_models(models: Mapping[str, Subject]) -> dict[str, Any]:
    """Describe models for the manifest."""
    return {
        "models": {
            label: {"source": subject.source, "family": subject.family, "fingerprint": subject.fingerprint}
            for label, subject in models.items()
        }
    }


MODELS: Input[Mapping[str, Subject]] = Input("models", _models, fingerprints, record_models)
"""The run's models by label: `model`, or `base` and `tuned`; `base` alone where others are made of it."""


def first_model(run: JobRun[Any]) -> Subject:
    """Return the first of the run's models: its tokenizer and longest text count unless the job says otherwise."""
    return next(iter(run[MODELS].values()))


def _pair(run: JobRun[Any]) -> Pair:
    from mechscope.subject import pair

    models = run[MODELS]
    return pair(models["base"], models["tuned"], resize=getattr(run.settings, "resize", "refuse"))


PAIR: Input[Pair] = Input(
    "pair", _pair, lambda both: {**fingerprints({"base": both.base, "tuned": both.tuned}), "vocab_size": both.vocab_size}
)
"""Base and tuned model, checked to belong together."""


def read_documents(settings: DocumentFormat, source: Any, number: int, subject: Subject, *, split: str | None = None) -> Documents:
    """Load and encode some documents; of a hub data set or the generated corpus those held out for testing unless a split is named.

    Args:
        settings: Columns, template, length.
        source: A source of documents, a `Corpus`, encoded documents or a list of `Document`.
        number: How many.
        subject: The model whose tokenizer and longest text count.
        split: Split of a hub data set.
    """
    from mechscope.data.documents import Corpus
    from mechscope.data.prompt import Encoded
    from mechscope.data.sources import is_file_source
    from mechscope.studies.corpora import encode_for, load_corpus, template_for

    template = template_for(settings, subject)
    if isinstance(source, Encoded):
        return Documents(Corpus((), source="given in memory"), source, template)
    if isinstance(source, str):
        split = split or (None if is_file_source(source) else "test")
        source = load_corpus(settings, source, split=split, limit=number, name="documents")
    corpus = source if isinstance(source, Corpus) else Corpus(tuple(source), source="given in memory")
    return Documents(corpus, encode_for(settings, corpus, subject), template)


def _corpus(run: JobRun[Any]) -> Documents:
    return read_documents(run.settings, run.source("data"), run.settings.documents, run.first, split=getattr(run.settings, "split", None))


def _record_documents(documents: Documents | None) -> dict[str, Any]:
    if documents is None:
        return {}
    problems = {**documents.corpus.problems, **documents.encoded.problems}
    encoded = documents.encoded
    return {"data": {"source": documents.corpus.source, "documents": len(encoded), "problems": problems, "hash": encoded.hash}}


DOCUMENTS: Input[Documents | None] = Input(
    "documents",
    lambda run: None if run.source("data") is None else _corpus(run),
    lambda documents: None if documents is None else documents.encoded.hash,
    _record_documents,
)
"""The documents that a job reads; None where it names none."""

CORPUS: Input[Documents] = Input("documents", _corpus, lambda documents: documents.encoded.hash, _record_documents)
"""The documents of a job that must name some."""


def _splits(run: JobRun[Any]) -> Splits:
    from mechscope.studies.corpora import load_splits

    return load_splits(run.settings, run.first)


SPLITS: Input[Splits] = Input(
    "splits",
    _splits,
    lambda splits: {name: encoded.hash for name, encoded in splits.encoded.items()},
    lambda splits: {"data": splits.record()},
)
"""Documents to train, validate and test on."""

TRAINING: Input[Splits] = Input(
    "training",
    lambda run: run[SPLITS],
    lambda splits: {name: splits.encoded[name].hash for name in ("train", "validation")},
)
"""The documents to train and validate on, of those: what a training hangs on."""


def _held_out(run: JobRun[Any]) -> Documents:
    from mechscope.studies.corpora import template_for

    splits = run[SPLITS]
    return Documents(splits.corpora["test"], splits.encoded["test"], template_for(run.settings, run.first))


HELD_OUT: Input[Documents] = Input("held_out", _held_out, lambda documents: documents.encoded.hash)
"""The held-out documents, of those."""


def read_prompt_pairs(
    source: str,
    subject: Subject,
    *,
    limit: int | None,
    max_tokens: int,
    on_problem: Literal["skip", "error"],
    seed: int,
    corrupt: bool = True,
    chat: bool = False,
) -> Pairs:
    """Read or generate prompt pairs.

    Args:
        source: A file, a generated task, `newsroom:ROLE`, `facts:FILE` or `salience:DOCUMENTS`.
        subject: The model whose tokenizer and longest text count.
        limit: Pairs at most; None for all of a file, or 100 that are made.
        max_tokens: Most tokens of a text that is made from a document and its summary.
        on_problem: What to do with pairs that cannot be used.
        seed: Of pairs that are made.
        corrupt: Whether the rows of a file need a corrupt text.
        chat: Whether prompts (or documents and summaries) stand in the turns of the tokenizer's chat template.

    Raises:
        MechscopeError: The source is not known, or the pairs cannot be used with this model.
    """
    from mechscope.data.chat import chat_template, in_turns
    from mechscope.data.documents import load_documents
    from mechscope.data.newsroom_pairs import newsroom_pairs
    from mechscope.data.pair_files import read_facts, read_pairs
    from mechscope.data.salience import salience_pairs
    from mechscope.data.tasks import TASKS, generate_pairs

    number = limit or _GENERATED
    if source in _OF_TOKENS and subject.tokenizer is None and not chat:
        return TASKS[source](subject.anatomy.vocab_size, number, seed=seed)
    if subject.tokenizer is None:
        raise DataError(
            f"model {subject.source!r} has no tokenizer, which text pairs need; only the tasks {' and '.join(map(repr, _OF_TOKENS))} work without"
        )
    if source.startswith("salience:"):
        # more documents than pairs: some have no sentence that is salient
        corpus = load_documents(source.removeprefix("salience:"), limit=2 * number, seed=seed)
        longest = min(max_tokens, subject.anatomy.max_positions)
        template = chat_template(DEFAULT_TEMPLATE, subject.tokenizer) if chat else None
        return salience_pairs(corpus, subject.tokenizer, template=template, max_tokens=longest, seed=seed).first(number)
    if source in TASKS:
        pairs = generate_pairs(source, subject.tokenizer, number, seed=seed)
    elif source.startswith("facts:"):
        pairs = read_facts(source.removeprefix("facts:"), subject.tokenizer, limit=limit, on_problem=on_problem)
    elif match := re.fullmatch(r"newsroom(?::(\w+))?", source):
        role: Any = match[1] or "where"
        pairs = newsroom_pairs(number, seed=seed, role=role, tokenizer=subject.tokenizer)
    else:
        pairs = read_pairs(source, subject.tokenizer, limit=limit, on_problem=on_problem, corrupt=corrupt)
    return in_turns(pairs, subject.tokenizer) if chat else pairs


def prompt_pairs(run: JobRun[Any], *, corrupt: bool = True) -> Pairs:
    """Return the prompt pairs that a job names, or those that were given in memory; without `corrupt` only the clean side of a file's rows is read."""
    from mechscope.data.pairs import Pairs

    source, settings = run.source("pairs"), run.settings
    if isinstance(source, Pairs):
        return source
    return read_prompt_pairs(
        source,
        run.first,
        limit=settings.limit,
        max_tokens=settings.max_tokens,
        on_problem=settings.on_problem,
        seed=settings.seed,
        corrupt=corrupt,
        chat=settings.chat,
    )


def record_pairs(pairs: Pairs) -> dict[str, Any]:
    """Describe texts for the manifest."""
    return {"data": {"source": pairs.source, "pairs": len(pairs), "problems": pairs.problems, "hash": pairs.hash}}


PAIRS: Input[Pairs] = Input("pairs", prompt_pairs, lambda pairs: pairs.hash, record_pairs)
"""Prompt pairs."""


def check_components(run: JobRun[Any], *names: str) -> None:
    """Refuse settings that name components which the first model lacks.

    Raises:
        SettingsError: A text is not understood, or a component does not exist.
    """
    from mechscope.subject import Components

    for name in names:
        if (text := getattr(run.settings, name)) is not None:
            Components.parse(text).validate(run.first.anatomy)
