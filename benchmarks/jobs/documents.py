"""The whole difference of two models over documents, tokenization included, beside their plain forward passes over the same batches.

The two take turns batch by batch: when `difference` reports a batch done, its clock is stopped and the plain passes of that batch run, on a clock of
their own. So the ratio survives a machine that is slower for minutes. The plain passes have logits, whole, and no attention mask (padding stands on
the right, where a causal pattern never looks): the fastest way to run the models. Tokenization is counted on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from benchmarks.harness import Beside, Job, Taken
from benchmarks.jobs.cases import MOVED
from benchmarks.models import make_model
from benchmarks.settings import Settings
from benchmarks.shapes import Size
from benchmarks.watch import Watch
from mechscope.data.documents import Corpus, load_documents
from mechscope.data.newsroom import newsroom_tokenizer
from mechscope.data.prompt import Batch, Encoded, batches, encode
from mechscope.difference import Difference, difference
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load
from mechscope.subject.pair import Pair, pair


@dataclass(frozen=True, eq=False)
class DocumentsCase:
    """Two models and documents as text.

    Attributes:
        pair: The models, with their tokenizer.
        corpus: The documents.
        settings: How many tokens a document and a batch may have.
    """

    pair: Pair
    corpus: Corpus
    settings: Settings

    @cached_property
    def encoded(self) -> Encoded:
        """The documents as tokens."""
        return tokenize(self)

    @property
    def texts(self) -> int:
        """How many documents."""
        return len(self.encoded)

    @property
    def tokens(self) -> int:
        """Of all of them together."""
        return sum(map(len, self.encoded.examples))

    @property
    def each(self) -> None:
        """Their lengths differ."""

    def small(self) -> DocumentsCase:
        """Return two documents of few tokens."""
        return replace(
            self, corpus=replace(self.corpus, documents=self.corpus.documents[:2]), settings=replace(self.settings, max_tokens=128)
        )


def build(settings: Settings, _: Size) -> DocumentsCase:
    """Make both models and read the documents; the vocabulary is the tokenizer's if that is larger."""
    tokenizer = newsroom_tokenizer() if settings.tokenizer is None else read_tokenizer(settings.tokenizer)
    shape = replace(settings.shape, vocabulary=max(settings.shape.vocabulary, len(tokenizer)))
    subjects = [load(make_model(shape, device=settings.device, noise=noise), tokenizer=tokenizer) for noise in (0.0, MOVED)]
    corpus = load_documents(settings.data or "newsroom", limit=settings.documents)
    return DocumentsCase(pair(*subjects), corpus, settings)


def read_tokenizer(folder: str) -> Any:
    """Read GPT-2's tokenizer from a folder, which may hold nothing but its vocabulary and merges."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        return GPT2Tokenizer.from_pretrained(folder)


def tokenize(case: DocumentsCase) -> Encoded:
    """Turn the documents into tokens."""
    return encode(case.corpus, case.pair.tokenizer, max_tokens=case.settings.max_tokens)


def batched(case: DocumentsCase, encoded: Encoded) -> Iterator[Batch]:
    """Yield the batches that `difference` makes."""
    return batches(encoded.examples, tokens_per_batch=case.settings.tokens_per_batch, pad_id=0)


@torch.no_grad()
def plain(case: DocumentsCase, batch: Batch) -> None:
    """Run both models' forward passes, logits included."""
    for subject in (case.pair.base, case.pair.tuned):
        subject.plain(batch.input_ids.to(subject.device), use_cache=False)


def both_plain(case: DocumentsCase) -> None:
    """Tokenize, and run both models' forward passes over all batches."""
    for batch in batched(case, tokenize(case)):
        plain(case, batch)


def whole(case: DocumentsCase, progress: Any = None) -> Difference:
    """Tokenize, and measure the difference."""
    return difference(case.pair, tokenize(case), execution=Execution(tokens_per_batch=case.settings.tokens_per_batch, progress=progress))


def take_turns(case: DocumentsCase) -> dict[str, Taken]:
    """Measure the difference in turns with the plain passes, batch by batch."""
    whole(case.small())
    device, taken = case.settings.device, {"job": Taken(), "beside": Taken()}
    taken["beside"].peak = _peak_of_longest(case)
    own, other = Watch(device=device, memory=True), Watch(device=device)
    with other:
        waiting = batched(case, tokenize(case))
    passed = 0

    def catch_up(done: int) -> None:
        nonlocal passed
        while passed < done and (batch := next(waiting, None)) is not None:
            with other:
                plain(case, batch)
            passed += len(batch.examples)

    def progress(label: str, done: int, total: int) -> None:
        own.stop()
        if "document" in label:
            catch_up(done)
            print(f"  {done:,} of {total:,} documents, {own.seconds / other.seconds:.2f} × the plain passes so far", flush=True)
        own.start()

    with own:
        taken["job"].result = whole(case, progress)
    catch_up(case.texts)
    for name, watch in (("job", own), ("beside", other)):
        taken[name].add(watch)
    taken["job"].peak = own.peak
    return taken


def _peak_of_longest(case: DocumentsCase) -> int:
    """Return the memory of the plain passes of the first batch, which has the longest documents."""
    with Watch(device=case.settings.device, memory=True) as watch:
        plain(case, next(batched(case, case.encoded)))
    return watch.peak


JOBS = (
    Job(
        name="difference",
        what="the whole difference of two models over documents, tokenization included",
        build=build,
        run=whole,
        beside=Beside("both models' plain passes, tokenization included", both_plain),
        ratio=2.2,
        rounds=1,
        seconds=110,
        measure=take_turns,
    ),
)
