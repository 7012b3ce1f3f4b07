"""What the shipped newsroom model learns from: its tokenizer's texts, packed articles, and rows of repeated random tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mechscope.data.newsroom.articles import generate, headlines
from mechscope.data.newsroom.events import EVENTS
from mechscope.data.newsroom.vocabulary import COUNTS, FIRST_NAMES, LAST_NAMES, PLACES

END = "<|endoftext|>"
VOCABULARY = 2048
POSITIONS = 384  # an article, a summary and the prompt around them take fewer than 200
SEED = -1
HEADLINE_SHARE = 0.05
SEGMENT = (6, 24)  # tokens of a segment that is repeated, shortest and longest
IGNORED = -100  # the label that the loss skips


def train_tokenizer(articles: int = 4000) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on generated articles, summaries, headlines and the names of the vocabulary."""
    texts = [text for article in generate(articles, SEED) for text in (article.document, article.summary)]
    texts += [headlines(SEED, index, 8) for index in range(articles // 20)]
    # rare names would otherwise be cut in as many ways as there are names: a fact should be a token or two
    texts += [f" {name}" for name in (*FIRST_NAMES, *LAST_NAMES, *PLACES, *COUNTS) for _ in range(200)]
    texts += [f" {what}" for event in EVENTS for what in event.whats for _ in range(200)]
    texts += ["Article: The\nSummary: The"] * 100
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, model_max_length=POSITIONS)


def sequences(tokenizer: PreTrainedTokenizerBase, batch: int) -> Iterator[torch.Tensor]:
    """Yield batches (batch, POSITIONS) of fresh texts, packed; every row begins with a text's beginning, as a prompt does."""
    generator = torch.Generator().manual_seed(0)
    seed, waiting = SEED, []
    while True:
        seed -= 1
        texts = [article.document for article in generate(400, seed)]
        for at in torch.randperm(len(texts), generator=generator)[: int(HEADLINE_SHARE * len(texts))].tolist():
            texts[at] = headlines(seed, at, 8)
        row: list[int] = []
        for ids in tokenizer(texts)["input_ids"]:
            row += [*ids, tokenizer.eos_token_id]
            if len(row) >= POSITIONS:
                waiting.append(row[:POSITIONS])
                row = []
        while len(waiting) >= batch:
            yield torch.tensor(waiting[:batch])
            waiting = waiting[batch:]


def repeats(generator: torch.Generator, *, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw rows that repeat a segment of random tokens: all but the segment's first round can be predicted by copying, and by nothing else.

    Returns:
        Tokens and labels, each (rows, length); the first round's labels are ignored.
    """
    tokens, labels = torch.empty(rows, length, dtype=torch.long), torch.empty(rows, length, dtype=torch.long)
    for row in range(rows):
        period = int(torch.randint(SEGMENT[0], SEGMENT[1] + 1, (1,), generator=generator))
        segment = torch.randint(1, VOCABULARY, (period,), generator=generator)
        tokens[row] = labels[row] = segment.repeat(-(-length // period))[:length]
        labels[row, :period] = IGNORED
    return tokens, labels
