"""Where in an encoded example given characters of its texts went.

Facts of a newsroom article are known as character spans; a measurement of attention or a patch needs the tokens. The tokens are those
that `encode` made, found again through the tokenizer's offsets.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from mechscope.data.documents import Document
from mechscope.data.pieces import Pieces
from mechscope.data.prompt import Example
from mechscope.data.template import Frame, Template


def locate(
    example: Example,
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    *,
    document_spans: Sequence[tuple[int, int]] = (),
    summary_spans: Sequence[tuple[int, int]] = (),
    template: Template | None = None,
) -> tuple[tuple[int, int], ...]:
    """Find the tokens of an example that hold given characters of its article or its summary.

    Args:
        example: made by `encode` from `document`.
        document: the texts that the character spans refer to.
        tokenizer: the tokenizer of the example; it must give offsets (a "fast" one).
        document_spans: half-open character spans in `document.document`.
        summary_spans: half-open character spans in `document.summary`.
        template: the template of the example.

    Returns:
        Half-open token spans in `example.input_ids`, of the article first; spans (or parts) lost to truncation are left out.

    Raises:
        DataError: the tokenizer gives no offsets.
    """
    template = template or Template()
    pieces = Pieces(tokenizer, template.controls)
    tokens = []
    opens = Frame(pieces, template).document_is_first
    parts = (
        (example.document, document.document, template.document(document.document), document_spans, opens),
        (example.summary, document.summary, template.summary(document.summary), summary_spans, False),
    )
    for (start, stop), text, padded, spans, first in parts:
        shift = len(padded) - len(text.strip()) - (len(text) - len(text.lstrip()))
        for begin, end in pieces.token_spans(padded, [(begin + shift, end + shift) for begin, end in spans], first=first):
            if start + begin < stop:
                tokens.append((start + begin, min(start + end, stop)))
    return tuple(tokens)
