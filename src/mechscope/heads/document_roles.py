"""Roles of heads in summarization: where a head looks while it reads a document and while it writes the summary, and which heads copy.

Segment roles are masses of attention: a row's share on document, summary or lead sentence, averaged over the rows of a text. Copying from a long context
is the work of few heads (Wu et al. 2024, "Retrieval head mechanistically explains long-context factuality"): a head retrieves a token if the key it
attends to most holds the very token that is written next. They test the tokens of a planted needle; here, with the reference summary given, the summary's
tokens that stand in the document and were not written before.

All rows of all roles come from one forward pass over the documents; what turned heads retrieve from a second one over the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechscope.data.documents import Corpus
from mechscope.data.pairs import PairBatch, PromptPair, Span, from_examples
from mechscope.data.prompt import Encoded
from mechscope.data.salience import sentence_spans
from mechscope.data.scoring import check_fits
from mechscope.data.spans import locate
from mechscope.data.template import Template
from mechscope.errors import DataError
from mechscope.heads.attention import run_probes, strongest
from mechscope.heads.roles import Role, RoleScores
from mechscope.heads.segments import marked, masses, row_means, spread
from mechscope.heads.turned import TEXTS, Turns, mean_excess
from mechscope.instrument import AttentionCall
from mechscope.instrument.execution import Execution
from mechscope.subject import Subject

_SUMMARIZATION = "mechscope: what arXiv 2505.17073 calls topic tracking and salience, measured"
_UNIFORM = "The segment's share of the keys that each row can see."

WITHIN_DOCUMENT = Role(
    name="within-document",
    definition="Attention from the document's rows to the document.",
    source=_SUMMARIZATION,
    null=_UNIFORM,
    least=None,
)
WITHIN_SUMMARY = replace(WITHIN_DOCUMENT, name="within-summary", definition="Attention from the summary's rows to the summary.")
TO_DOCUMENT = replace(
    WITHIN_DOCUMENT, name="summary-to-document", definition="Attention from the summary's rows across the border to the document."
)
LEAD = replace(
    WITHIN_DOCUMENT,
    name="lead-sentence",
    definition="Attention from the summary's rows to the document's first sentence.",
    null="The same rows' attention to the document, spread evenly over its tokens.",
)
RETRIEVAL = Role(
    name="retrieval",
    definition="Share of the summary's tokens that stand in the document and not earlier in the summary for which the key attended to most, when the "
    "token is to be written, is that token in the document.",
    source="Wu et al. 2024, Retrieval head mechanistically explains long-context factuality",
    null="The share of the visible keys that are that token in the document.",
    least=0.1,
)


@torch.no_grad()
def document_roles(
    subject: Subject, encoded: Encoded, *, lead: Mapping[str, Span] | None = None, execution: Execution = Execution()
) -> tuple[RoleScores, ...]:
    """Score every head's part in summarization on documents with their reference summaries.

    Args:
        subject: The model.
        encoded: Documents and summaries.
        lead: Half-open token span of the first sentence by the document's id, as `lead_spans` gives; documents without one score NaN there. Without
            any, the role is left out.
        execution: Tokens of a batch (4,096 by default), progress.

    Returns:
        The roles `within-document`, `within-summary`, `summary-to-document`, `lead-sentence` and `retrieval`. A summary that copies nothing scores
        NaN in the last.

    Raises:
        DataError: A document does not fit the model, or a lead sentence does not lie in its document.
    """
    pairs = from_examples(encoded, "documents")
    check_fits(subject, pairs)
    _check_lead(encoded, lead)
    values = run_probes(subject, pairs, _Documents(lead), execution=execution)
    roles = (WITHIN_DOCUMENT, WITHIN_SUMMARY, TO_DOCUMENT, *(() if lead is None else (LEAD,)), RETRIEVAL)
    texts, layers = tuple(pair.id for pair in pairs), subject.anatomy.attending
    turned = run_probes(subject, pairs.first(TEXTS), Turns(subject, seed=execution.seed).each(_retrieved_of), execution=execution)
    chance = {RETRIEVAL: mean_excess(turned[..., 0, :], turned[..., 1, :])}
    return tuple(
        RoleScores(role, texts, values[..., at, 0], values[..., at, 1], chance.get(role), layers=layers) for at, role in enumerate(roles)
    )


def lead_spans(
    corpus: Corpus, encoded: Encoded, tokenizer: PreTrainedTokenizerBase | None, *, template: Template | None = None
) -> dict[str, Span]:
    """Find the tokens of every document's first sentence.

    Args:
        corpus: The texts that were encoded.
        encoded: Their tokens.
        tokenizer: The tokenizer they were encoded with; it must give offsets (a "fast" one).
        template: The template they were encoded with.

    Returns:
        Half-open token spans by document; a document whose characters the tokenizer does not place is left out.

    Raises:
        DataError: There is no tokenizer, or it gives no offsets.
    """
    if tokenizer is None or not tokenizer.is_fast:
        problem = "there is no tokenizer" if tokenizer is None else f"{type(tokenizer).__name__} gives no character offsets"
        raise DataError(f"first sentences cannot be found among tokens: {problem}: give the model a fast tokenizer")
    documents = {document.id: document for document in corpus.documents}
    spans: dict[str, Span] = {}
    for example in encoded.examples:
        document = documents[example.id]
        try:
            first = locate(example, document, tokenizer, document_spans=sentence_spans(document.document)[:1], template=template)
        except DataError:  # offsets go astray behind characters that some tokenizers have no token for
            continue
        spans[example.id] = first[0]
    return spans


def _check_lead(encoded: Encoded, lead: Mapping[str, Span] | None) -> None:
    for example in encoded.examples:
        begin, end = example.document
        if lead is not None and example.id in lead and not begin <= lead[example.id][0] < lead[example.id][1] <= end:
            raise DataError(f"document {example.id!r}: its lead sentence {lead[example.id]} does not lie in its tokens {begin}-{end}")


class _Documents:
    """Reduces an attention call to ``(batch, head, role, 2)``: scores and nulls."""

    def __init__(self, lead: Mapping[str, Span] | None) -> None:
        self.lead = None if lead is None else {name: (span,) for name, span in lead.items()}

    def __call__(self, call: AttentionCall, batch: PairBatch) -> Float[Tensor, "batch head role 2"]:
        document, summary = batch.positions("document"), batch.positions("summary")
        segments = {"document": document, "summary": summary}
        if self.lead is not None:
            segments["lead"] = marked(batch, self.lead)
        shares, chance = masses(call, batch, segments)
        scores = [(document, "document"), (summary, "summary"), (summary, "document")]
        parts = [(row_means(shares[segment], rows), row_means(chance[segment], rows)) for rows, segment in scores]
        if self.lead is not None:
            rows = summary & segments["lead"].any(1, keepdim=True)
            evenly = spread(shares["document"], chance["lead"], chance["document"])
            parts.append((row_means(shares["lead"], rows), row_means(evenly, rows)))
        parts.append(_retrieved(call, batch))
        return torch.stack([_both(*part) for part in parts], 2)


def _both(
    score: Float[Tensor, "batch head"], null: Float[Tensor, "batch head"] | Float[Tensor, "batch 1"]
) -> Float[Tensor, "batch head 2"]:
    return torch.stack([score, null.expand_as(score)], -1).double()


def _retrieved_of(call: AttentionCall, batch: PairBatch) -> Float[Tensor, "batch head 2"]:
    return _both(*_retrieved(call, batch))


def _retrieved(call: AttentionCall, batch: PairBatch) -> tuple[Float[Tensor, "batch head"], Float[Tensor, "batch 1"]]:
    """Return each text's share of copied tokens that a head attends to most, and what a uniform head's mass on them is."""
    device = call.query.device
    start = min(batch.shift(row) + (pair.target or (1,))[0] for row, pair in enumerate(batch.pairs)) - 1
    top = strongest(_last_rows(call, start), batch.real.to(device)).cpu()
    score = torch.full((len(batch.pairs), call.query.shape[1]), torch.nan, dtype=torch.float64)
    null = torch.full((len(batch.pairs), 1), torch.nan, dtype=torch.float64)
    for index, pair in enumerate(batch.pairs):
        shift = batch.shift(index)
        rows, holds = copied(pair)
        if len(rows):
            keys = top[index][:, rows + (shift - start)] - shift
            score[index] = holds[torch.arange(len(rows)), keys].double().mean(-1)
            seen = _visible(call, index, rows + shift)[:, shift : shift + len(pair.clean)]
            null[index] = ((holds & seen).sum(-1).double() / seen.sum(-1)).mean()
    return score.to(device), null.to(device)


def copied(pair: PromptPair) -> tuple[Int[Tensor, " row"], Bool[Tensor, "row token"]]:
    """Return the rows that predict a summary's token which stands in the document and not earlier in the summary, and where in the document it stands."""
    (begin, end), (first, last) = pair.segments["document"][0], pair.segments["summary"][0]
    ids = torch.tensor(pair.clean)
    written = ids[first:last]
    inside = torch.zeros(len(ids), dtype=torch.bool)
    inside[begin:end] = True
    holds = (written[:, None] == ids) & inside
    repeated = (written[:, None] == written).tril(-1).any(1)
    chosen = (holds.any(1) & ~repeated).nonzero()[:, 0]
    return chosen + first - 1, holds[chosen]


def _last_rows(call: AttentionCall, start: int) -> AttentionCall:
    """Return the call with its query rows from `start` on: the keys before them stay."""
    mask = call.mask if call.mask is None else call.mask[:, :, start:]
    return replace(call, query=call.query[:, :, start:], z=call.z[:, start:], mask=mask)


def _visible(call: AttentionCall, text: int, rows: Int[Tensor, " row"]) -> Bool[Tensor, "row key"]:
    if call.mask is None:
        return torch.arange(call.key.shape[2]) <= rows[:, None]
    return call.mask[text, 0, rows.to(call.mask.device)].cpu()
