"""Makes the shipped newsroom model: tokenizer, pre-training, model card.

    python -m mechscope.data.newsroom.train            # writes src/mechscope/data/newsroom/model

A GPT-2 of 1.5 million parameters learns generated news articles as plain text, with some lists of headlines, each text ended by the end token. It
never sees a summary or the summary prompt, so that fine-tuning has something to teach. Every step takes fresh articles (negative seeds,
which no corpus uses). Whether it learnt to copy is on the card: its loss at first and at later mentions of facts.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mechscope.data.newsroom.articles import SPLITS, generate, headlines, split_articles
from mechscope.data.newsroom.events import EVENTS
from mechscope.data.newsroom.shipped import newsroom_model_path
from mechscope.data.newsroom.vocabulary import COUNTS, FIRST_NAMES, LAST_NAMES, PLACES
from mechscope.data.pieces import Pieces

log = logging.getLogger(__name__)

END = "<|endoftext|>"
VOCABULARY = 2048
POSITIONS = 384  # an article, a summary and the prompt around them take fewer than 200
SEED = -1
HEADLINE_SHARE = 0.05


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


def pretrain(
    tokenizer: PreTrainedTokenizerBase, *, steps: int, batch: int, learning_rate: float, matrix_rate: float
) -> tuple[GPT2LMHeadModel, float]:
    """Train the model from scratch; return it with the mean loss of the last 20 steps, in nats per token."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=128,
        n_layer=6,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's gelu_new, in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    # Muon (Jordan 2024) for the blocks' matrices: in a short trial its loss fell faster per token than AdamW's, and one core reads few tokens
    matrices = [weight for weight in model.transformer.h.parameters() if weight.dim() == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    optimizers = (
        torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    )
    warmup = max(1, steps // 20)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    losses: list[float] = []
    started = time.monotonic()
    for step, ids in zip(range(steps), sequences(tokenizer, batch), strict=False):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            log.info("step %d of %d: loss %.3f, %.0f s", step + 1, steps, sum(losses[-20:]) / 20, time.monotonic() - started)
    return model.eval(), sum(losses[-20:]) / len(losses[-20:])


@torch.no_grad()
def mention_losses(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, articles: int = 100) -> dict[str, tuple[float, float]]:
    """Measure the loss at the first and at later mentions of facts, per role, on validation articles.

    Returns:
        Mean loss of a mention (its tokens summed, nats) at first and at later mentions. Only surnames count for persons.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    pieces = Pieces(tokenizer)
    for article in split_articles("validation", limit=articles):
        ids = torch.tensor([tokenizer(article.document)["input_ids"]])
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        losses = torch.cat([torch.zeros(1), -logprobs.gather(1, ids[0, 1:, None])[:, 0]])
        for fact in article.facts:
            surname = len(fact.text.split()[-1])
            spans = [(end - surname, end) for _, end in fact.document_spans] if fact.role == "who" else fact.document_spans
            mentions = [losses[begin:end].sum().item() for begin, end in pieces.token_spans(article.document, spans, first=True)]
            first, later = found.setdefault(fact.role, ([], []))
            first.append(mentions[0])
            later += mentions[1:]
    return {role: (sum(first) / len(first), sum(later) / len(later)) for role, (first, later) in found.items()}


def write_card(folder: Path, command: str, settings: dict[str, object], loss: float, mentions: dict[str, tuple[float, float]]) -> None:
    """Write the model card."""
    lines = [
        "# newsroom: a small GPT-2 that reads invented news",
        "",
        "Pre-trained from scratch on generated news articles (mechscope's `newsroom` corpus), ended by `<|endoftext|>`, with some lists of",
        "headlines. It has never seen a summary. 6 layers, 4 heads, width 128, 384 positions, byte-level BPE; weights stored in float16.",
        "For tests, demonstrations and teaching; the people, places and events it writes about are made up. Licence: Apache-2.0.",
        "",
        f"Made by `{command}`",
        "",
        "| setting | value |",
        "|---|---|",
        *[f"| {name} | {value} |" for name, value in settings.items()],
        f"| final training loss (mean of the last 20 steps) | {loss:.3f} nats per token |",
        "",
        "Does it copy? Loss in nats of a whole mention of a fact on 100 validation articles, at its first mention and at later ones:",
        "",
        "| fact | first mention | later mentions |",
        "|---|---|---|",
        *[f"| {role} | {first:.2f} | {later:.2f} |" for role, (first, later) in mentions.items()],
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Train tokenizer and model and write both with their card."""
    parser = argparse.ArgumentParser(description="Make the newsroom model.")
    parser.add_argument("--out", type=Path, default=newsroom_model_path(), help="folder to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8, help=f"rows of {POSITIONS} tokens per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak of AdamW, for embeddings, norms and biases")
    parser.add_argument("--matrix-rate", type=float, default=0.02, help="peak of Muon, for the blocks' matrices")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)  # one thread: the same sums in the same order on any machine of this kind
    tokenizer = train_tokenizer()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(options.out)
    model, loss = pretrain(
        tokenizer, steps=options.steps, batch=options.batch, learning_rate=options.learning_rate, matrix_rate=options.matrix_rate
    )
    mentions = mention_losses(model, tokenizer)
    model.half().save_pretrained(options.out)
    config = json.loads((options.out / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # float16 is how it is stored; whoever loads it computes in float32
    (options.out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    settings: dict[str, object] = {
        "seed": f"0 (articles: seeds from {SEED} downwards; the corpus's splits {', '.join(SPLITS)} use 0 and up)",
        "steps": options.steps,
        "tokens per step": options.batch * POSITIONS,
        "optimizer": f"Muon, peak rate {options.matrix_rate}, for the blocks' matrices; AdamW, peak rate {options.learning_rate}, for the rest",
        "schedule": "linear warm-up over the first 5 %, then cosine to 2 %",
        "vocabulary": len(tokenizer),
        "parameters": f"{sum(weight.numel() for weight in model.parameters()):,}",
        "torch": torch.__version__.partition("+")[0],
    }
    rates = f"--learning-rate {options.learning_rate} --matrix-rate {options.matrix_rate}"
    arguments = f" --steps {options.steps} --batch {options.batch} {rates}"
    write_card(options.out, "python -m mechscope.data.newsroom.train" + arguments, settings, loss, mentions)


if __name__ == "__main__":
    main()
