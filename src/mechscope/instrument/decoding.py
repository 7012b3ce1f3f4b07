"""What a model writes after a text, deterministically: greedily or by beams, never by sampling, whatever its generation file says.

transformers' own `generate` does the work. Passing it what is wanted is not enough: what that leaves open is filled from the model's own settings, such as
a chat model's sampling temperature or repetition penalty. So these are others for as long as it writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig

from mechscope.instrument.attention import through_mechscope
from mechscope.instrument.rotary import as_if_fresh
from mechscope.settings.decoding import Decoding
from mechscope.subject.discovery import depends_on_length
from mechscope.subject.modes import evaluating


@torch.no_grad()
def continuations(
    model: Any,
    ids: Int[Tensor, "row token"],
    *,
    decoding: Decoding,
    pad: int,
    ends: Sequence[int | None] = (),
    real: Bool[Tensor, "row token"] | None = None,
) -> list[tuple[int, ...]]:
    """Continue texts until an end token, or as far as is allowed.

    Args:
        model: A causal language model of Hugging Face, without a wrapper around it; held in evaluation mode meanwhile.
        ids: The texts, padded on the left; of one length where the model's rotary frequencies depend on it, as they are those of the longest.
        decoding: How to search and when to stop.
        pad: The token to pad with.
        ends: Tokens that end a text, beside those that the model's own generation settings name; None is none.
        real: Where a token is one of the text; None where all are.

    Returns:
        The new tokens of each text, the end token, where there is one, the last.
    """
    named = model.generation_config.eos_token_id
    stops = {token for token in (*ends, *([named] if isinstance(named, int) else named or ())) if token is not None}
    mask = torch.ones_like(ids) if real is None else real.to(ids)
    # transformers' attention by maps takes its softmax in float32, where float64's lowest number is −∞: NaN at padding, and in the next layer everywhere
    by_maps = mask.min() == 0 and model.dtype == torch.float64 and model.config._attn_implementation == "eager"
    attention = through_mechscope(model) if by_maps else nullcontext()
    rotaries = [module for module in model.modules() if depends_on_length(module)]
    with attention, _settings(model, decoding, pad, stops), evaluating(model.modules()), as_if_fresh(rotaries):
        rows = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
    return [tuple(row[: next((at + 1 for at, token in enumerate(row) if token in stops), len(row))]) for row in rows]


@contextmanager
def _settings(model: Any, decoding: Decoding, pad: int, ends: set[int]) -> Iterator[None]:
    """Set the model's generation settings to exactly these for a while."""
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=decoding.beams,
        no_repeat_ngram_size=decoding.no_repeat_ngram,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        bos_token_id=before.bos_token_id,
        use_cache=True,
    )
    try:
        yield
    finally:
        model.generation_config = before
