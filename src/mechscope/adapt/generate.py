"""Summaries written by a model.

Prompts are sorted by length, padded on the left and continued deterministically (`mechscope.instrument.decoding`). Padding does not change what is
written. Models whose rotary frequencies depend on the length (LongRoPE, dynamic NTK) have one set of them for a whole batch: they write one summary at a
time. The paper's decoding is two beams, no repeated bigram and at most 150 new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from mechscope import ranks
from mechscope.data.pieces import Pieces
from mechscope.data.prompt import Batch, Example, Examples, encode_prompt, pad_id
from mechscope.data.template import Frame, Template
from mechscope.instrument.decoding import continuations
from mechscope.instrument.execution import Execution
from mechscope.instrument.texts import over_texts
from mechscope.settings.decoding import Decoding
from mechscope.subject.discovery import depends_on_length

PAPER = Decoding(beams=2, no_repeat_ngram=2, max_new_tokens=150)
"""How paper 1 (arXiv 2505.17073) decodes."""


def encode_prompts(
    documents: Sequence[str], tokenizer: Any, *, decoding: Decoding, max_tokens: int, template: Template | None = None
) -> list[tuple[int, ...]]:
    """Encode prompts once for many models that share a tokenizer.

    Args:
        documents: Articles; each is truncated to leave room for the answer.
        tokenizer: The models' tokenizer.
        decoding: How long an answer may get.
        max_tokens: Most tokens of prompt and answer together.
        template: The text around the article, paper 1's by default.

    Raises:
        DataError: No room is left for an article, or one is empty.
    """
    limits = {"max_tokens": max_tokens, "max_new_tokens": decoding.max_new_tokens}
    return [encode_prompt(document, tokenizer, template=template, **limits) for document in documents]


def end_tokens(tokenizer: Any, template: Template | None) -> tuple[int, ...]:
    """Return the tokens that end what a model is to write by a template, beside its tokenizer's end token: a chat has one of its own."""
    return Frame(Pieces(tokenizer), template).ends if template is not None else ()


@torch.no_grad()
def summarize(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    ends: Sequence[int] = (),
    execution: Execution = Execution(),
) -> list[str]:
    """Continue prompts until an end token; several ranks share them.

    Args:
        model: A causal language model, plain or with an adapter; held in evaluation mode meanwhile.
        tokenizer: Turns tokens into text, and names the end token.
        prompts: Token ids, for example from `encode_prompts`.
        decoding: How to search and when to stop.
        ends: Tokens that end a text beside the tokenizer's and the model's own, for example `end_tokens` of a chat.
        execution: Tokens of a batch (16,384 by default; of prompts, each counted once per beam), progress, called with ("summaries", prompts done, prompts).

    Returns:
        One summary per prompt, in the order given, without surrounding white space.
    """
    # inside the adapter's wrapper, which would keep a copy of the generation settings; the adapter acts there just the same
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(model.parameters()).device
    written: dict[int, str] = {}
    # the prompts' places travel through the length-sorted batches as their ids
    waiting = [Example(str(place), tuple(prompt), (0, 0), (0, 0), truncated=False) for place, prompt in enumerate(prompts)]
    texts = Examples(waiting, pad_id(tokenizer), padding="left")
    alone = any(map(depends_on_length, model.modules()))
    tokens = 1 if alone else max(execution.tokens(16384) // decoding.beams, 1)
    pad, stops = pad_id(tokenizer), (*ends, tokenizer.eos_token_id)

    def answered(batch: Batch) -> dict[int, str]:
        answers = continuations(model, batch.input_ids.to(device), decoding=decoding, pad=pad, ends=stops, real=batch.attention_mask)
        # what ends a text is no part of it, even where the tokenizer does not know the token as special
        answers = [row[:-1] if row[-1] in stops else row for row in answers]
        decoded = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return {int(example.id): text.strip() for example, text in zip(batch.examples, decoded, strict=True)}

    for _, summaries in over_texts(texts, answered, replace(execution, tokens_per_batch=tokens), tokens=1, label="summaries", dealt=True):
        written |= summaries
    everyone = {place: text for part in ranks.exchange(written) for place, text in part.items()}
    return [everyone[place] for place in range(len(prompts))]
