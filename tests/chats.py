"""Tokenizers with chat templates as people have them, hand-made and small."""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechscope.data.newsroom import newsroom_tokenizer

CONTROLS = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|begin|>")
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "turns": CHATML,
    # marks what the assistant writes, the token that ends its turn included
    "marked": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # a start token of its own, and a space before the answer
    "brackets": (
        "<|begin|>{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # an empty thought stands before an answer, and in the prompt only where thinking is switched off
    "thinking": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    ),
}


def chatting(template: str | None = CHATML, *, special: bool = True) -> Any:
    """Return the newsroom's tokenizer with control tokens, special ones or ordinary added ones, and a chat template."""
    tokenizer = copy.deepcopy(newsroom_tokenizer())
    tokens = [AddedToken(token, special=special, normalized=False) for token in CONTROLS]
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def joining() -> Any:
    """Return a tokenizer of letters that has a token of a full stop and a line feed, as those of Llama 3 and Qwen do."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    vocabulary = {letter: at for at, letter in enumerate([*letters, ".Ċ", "ĊĊ"])}
    inner = Tokenizer(models.BPE(vocabulary, [(".", "Ċ"), ("Ċ", "Ċ")]))
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = CHATML
    return tokenizer
