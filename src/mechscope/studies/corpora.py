"""The documents of a study: loaded, divided into training, validation and test, and turned into tokens.

A held-out document never trains: a training document whose text also stands in the validation or test documents is left out and counted. Where a
file holds fewer documents than asked for, validation and test get at most a fifth each and training the rest, so that one command works on a small
file too; the sizes used are in the manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mechscope.data.chat import chat_template
from mechscope.data.documents import Corpus, load_documents, split_corpus
from mechscope.data.prompt import Encoded, encode
from mechscope.data.sources import is_file_source
from mechscope.data.template import Template
from mechscope.errors import DataError
from mechscope.studies.groups import DocumentFormat, SplitCorpus
from mechscope.subject import Subject

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """The documents of a study and their tokens, by split.

    Attributes:
        corpora: Documents.
        encoded: Their tokens.
    """

    corpora: Mapping[str, Corpus]
    encoded: Mapping[str, Encoded]

    def record(self) -> dict[str, Any]:
        """Describe the documents for the manifest: source, hash, number and problems per split."""
        problems: dict[str, int] = {}
        for name in self.corpora:
            for counted in (self.corpora[name].problems, self.encoded[name].problems):
                for reason, number in counted.items():
                    problems[reason] = problems.get(reason, 0) + number
        return {
            "source": self.corpora["test"].source,
            "problems": problems,
            "documents": {name: len(encoded) for name, encoded in self.encoded.items()},
            "hashes": {name: encoded.hash for name, encoded in self.encoded.items()},
        }


def load_splits(settings: SplitCorpus, subject: Subject) -> Splits:
    """Load, divide and encode the documents of a study.

    Args:
        settings: Sources, columns, sizes, prompt.
        subject: The model whose tokenizer and longest text count.

    Raises:
        DataError: Documents cannot be read, or too few are usable.
    """
    corpora = _corpora(settings)
    held_out = {document.document for name in ("validation", "test") for document in corpora[name].documents}
    train = corpora["train"]
    kept = tuple(document for document in train.documents if document.document not in held_out)
    if len(kept) < len(train.documents):
        problems = {**train.problems, "also_held_out": len(train.documents) - len(kept)}
        corpora["train"] = replace(train, documents=kept, problems=problems)
    return Splits(corpora, {name: encode_for(settings, corpus, subject) for name, corpus in corpora.items()})


def template_for(settings: DocumentFormat, subject: Subject) -> Template:
    """Return the text around documents and summaries by the settings; of a chat with the turns of the model's tokenizer.

    Raises:
        DataError: The template lacks a field, or the tokenizer has no chat template that fits.
    """
    if not settings.chat:
        return Template(settings.template)
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, whose chat template is to be applied: pass tokenizer=…")
    return chat_template(settings.template, subject.tokenizer)


def encode_for(settings: DocumentFormat, corpus: Corpus, subject: Subject) -> Encoded:
    """Encode documents by the settings, no longer than the model can read."""
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer: documents cannot be turned into tokens; pass tokenizer=…")
    encoded = encode(
        corpus,
        subject.tokenizer,
        template=template_for(settings, subject),
        max_tokens=min(settings.max_tokens, subject.anatomy.max_positions),
        on_problem=settings.on_problem,
    )
    for example in encoded.examples:
        if (highest := max(example.input_ids)) >= subject.anatomy.vocab_size:
            raise DataError(
                f"document {example.id!r} holds token {highest} ({subject.tokenizer.decode([highest])!r}), the embedding of {subject.source!r} has "
                f"{subject.anatomy.vocab_size:,} tokens: call resize_token_embeddings(len(tokenizer)) and save, or use the model's own tokenizer"
            )
    return encoded


def load_corpus(settings: DocumentFormat, source: str, *, split: str | None, limit: int | None, name: str) -> Corpus:
    """Load one source of documents by the settings."""
    return load_documents(
        source,
        split=split,
        document_column=settings.document_column,
        summary_column=settings.summary_column,
        limit=limit,
        seed=settings.seed,
        on_problem=settings.on_problem,
        name=name,
    )


def _corpora(settings: SplitCorpus) -> dict[str, Corpus]:
    sources = {"train": settings.data, "validation": settings.validation_data or settings.data, "test": settings.test_data or settings.data}
    sizes = {"train": settings.train_documents, "validation": settings.validation_documents, "test": settings.test_documents}
    names = {"train": settings.train_split, "validation": settings.validation_split, "test": settings.test_split}
    corpora: dict[str, Corpus] = {}
    if is_file_source(settings.data):  # one file serves every split that has no source of its own
        own = {split: size for split, size in sizes.items() if sources[split] == settings.data}
        whole = load_corpus(settings, settings.data, split=None, limit=None, name="documents")
        corpora.update(split_corpus(whole, _affordable(own, len(whole.documents), whole.source), settings.seed))
    for split in SPLITS:
        if split not in corpora:
            source = sources[split]
            named = None if is_file_source(source) else names[split]
            corpora[split] = load_corpus(settings, source, split=named, limit=sizes[split], name=f"{split} documents")
    return {split: corpora[split] for split in SPLITS}


def _affordable(sizes: dict[str, int], available: int, source: str) -> dict[str, int]:
    """Lower the sizes of splits to what a file holds."""
    if sum(sizes.values()) <= available:
        return sizes
    most = available // 5
    if most < 1:
        raise DataError(f"{source} holds {available} usable documents: at least 5 are needed for {', '.join(sizes)}")
    lowered = {split: min(size, most) for split, size in sizes.items() if split != "train"}
    lowered["train"] = min(sizes["train"], available - sum(lowered.values()))
    log.info("%s holds %d documents, %d were asked for: using %s", source, available, sum(sizes.values()), lowered)
    return lowered
