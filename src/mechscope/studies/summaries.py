"""What models write on held-out documents, side by side, and how it scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from mechscope.adapt.generate import encode_prompts, end_tokens, summarize
from mechscope.data.documents import Document
from mechscope.data.rouge import rouge
from mechscope.data.template import Template
from mechscope.instrument import Execution
from mechscope.settings.decoding import Decoding
from mechscope.stats.bootstrap import mean_interval
from mechscope.studies.inputs import Documents
from mechscope.subject import Subject

_METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def summarized(documents: Documents, number: int) -> tuple[Document, ...]:
    """Return the documents that are summarized: the first of those that could be encoded."""
    kept = {example.id for example in documents.encoded.examples}
    return tuple(document for document in documents.corpus.documents if document.id in kept)[:number]


def write_summaries(
    models: Mapping[str, Subject],
    documents: Sequence[Document],
    *,
    decoding: Decoding,
    template: Template,
    max_tokens: int,
    others: pd.DataFrame | None = None,
    execution: Execution,
) -> dict[str, pd.DataFrame]:
    """Let every model summarize the same documents, and score it.

    Args:
        models: Models by the name of their column, for example base and tuned.
        documents: Held-out documents.
        decoding: How summaries are written.
        template: The text around document and summary.
        max_tokens: Most tokens of both together.
        others: Summaries that are put beside, by the column `id`: a bake-off's.
        execution: Tokens of a batch, seed of the intervals, progress.

    Returns:
        The tables `summaries` (one row per document, one column per model) and `rouge` (mean score with its interval over documents, or why there is none).
    """
    references = [document.summary for document in documents]
    table = pd.DataFrame({"id": [d.id for d in documents], "document": [d.document for d in documents], "reference": references})
    scores = []
    for name, subject in models.items():
        prompts = encode_prompts(
            [document.document for document in documents],
            subject.tokenizer,
            decoding=decoding,
            max_tokens=min(max_tokens, subject.anatomy.max_positions),
            template=template,
        )
        with subject.active():
            ends = end_tokens(subject.tokenizer, template)
            table[name] = summarize(subject.model, subject.tokenizer, prompts, decoding=decoding, ends=ends, execution=execution)
        scores.append(_score(name, table[name].tolist(), references, seed=execution.seed))
    if others is not None:
        others = others.drop(columns=["document", "reference", *table.columns[3:]], errors="ignore")
        table = table.merge(others, on="id", how="left")
    return {"summaries": table, "rouge": pd.concat(scores, ignore_index=True)}


def _score(model: str, written: list[str], references: list[str], *, seed: int) -> pd.DataFrame:
    scores = rouge(written, references)
    rows = []
    for metric in _METRICS:
        mean = mean_interval(scores[metric].to_numpy(), seed=seed)
        ends = {"mean": mean.value, "low": mean.low, "high": mean.high, "withheld": mean.withheld}
        rows.append({"model": model, "metric": metric, **ends, "n": len(scores), "tokenizer": scores["tokenizer"].iloc[0]})
    return pd.DataFrame(rows)
