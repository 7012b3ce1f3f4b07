"""Makes the shipped newsroom model: tokenizer, pre-training, model card.

    python -m mechscope.data.newsroom.train            # writes src/mechscope/data/newsroom/model

A GPT-2 of 1.5 million parameters learns generated news articles as plain text, with some lists of headlines, each text ended by the end token. It
never sees a summary or the summary prompt, so that fine-tuning has something to teach. Every step takes fresh articles (negative seeds,
which no corpus uses).

From 1.8 million tokens of articles alone (some minutes of one core) such a model did not learn to copy facts. So it starts with an induction circuit
laid out in its first two layers (`lay_out_induction`), trains those two on repeated random tokens, then all layers on articles with such rows
among them. What it copies is on the card: its loss at first and at later mentions of facts.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from mechscope.data.newsroom.articles import SPLITS, split_articles
from mechscope.data.newsroom.shipped import newsroom_model_path
from mechscope.data.newsroom.training_texts import POSITIONS, SEED, SEGMENT, repeats, sequences, train_tokenizer
from mechscope.data.pieces import Pieces

log = logging.getLogger(__name__)

WIDTH, LAYERS, HEADS = 128, 6, 4
REPEATED = {"rows": 32, "length": 48}  # a step on repeated tokens alone
MIXED = {"rows": 2, "length": 96}  # repeated rows beside a step's articles
MIXED_WEIGHT = 0.2


@torch.no_grad()
def lay_out_induction(model: GPT2LMHeadModel) -> None:
    """Write an induction circuit into the first two layers; training makes it work, and may make something else of it.

    Positions are sines and cosines in the first 32 dimensions, where tokens are small. Layer 0's heads attend to the token before (queries are
    the positions turned back by one) and write it, rotated by a random orthogonal matrix. Layer 1's keys undo that rotation, so that a token
    finds where it was the token before; what stands there is written as it is, and with it its logit, since embeddings are tied.
    """
    width = WIDTH // HEADS
    waves = width // 2
    rates = 1.5 * torch.exp(-torch.linspace(0, 1, waves) * math.log(100.0))
    angles = torch.arange(POSITIONS)[:, None] * rates
    tokens, positions = model.transformer.wte.weight, model.transformer.wpe.weight
    tokens.normal_(0, 0.5)
    tokens[:, :width] *= 0.1
    positions.zero_()
    positions[:, :width] = 0.5 * torch.cat([angles.sin(), angles.cos()], 1)
    model.transformer.ln_f.weight.fill_(0.4)
    for block in model.transformer.h:
        block.mlp.c_proj.weight.mul_(0.2)

    turn = torch.zeros(WIDTH, width)
    turn[:waves, :waves] = turn[waves:width, waves:] = rates.cos().diag()
    turn[:waves, waves:], turn[waves:width, :waves] = rates.sin().diag(), -rates.sin().diag()
    before, match = (block.attn for block in model.transformer.h[:2])
    queries, keys, values = before.c_attn.weight.split(WIDTH, 1)
    queries.copy_(2.2 * turn.repeat(1, HEADS))
    keys.copy_(2.2 * torch.eye(WIDTH, width).repeat(1, HEADS))
    values.copy_(torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0])
    written = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    before.c_proj.weight.copy_(0.5 * written)
    rotation = values @ written

    queries, keys, values = match.c_attn.weight.split(WIDTH, 1)
    queries.normal_(0, 0.16)
    keys.copy_(rotation.T @ queries)
    values.normal_(0, 0.09)
    match.c_proj.weight.copy_(values.T)


def pretrain(
    tokenizer: PreTrainedTokenizerBase, *, copy_steps: int, steps: int, batch: int, learning_rate: float, matrix_rate: float
) -> tuple[GPT2LMHeadModel, float]:
    """Train the model; return it with the mean loss of the last 20 steps on articles, in nats per token."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's gelu_new, in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.04,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    lay_out_induction(model)
    # Muon (Jordan 2024) for the blocks' matrices: in a short trial its loss fell faster per token than AdamW's, and one core reads few tokens
    matrices = [weight for weight in model.transformer.h.parameters() if weight.dim() == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    optimizers = (
        torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    )

    def share(step: int) -> float:
        return min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * max(0, step - copy_steps) / steps)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    started = time.monotonic()

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    blocks = model.transformer.h
    model.transformer.h = nn.ModuleList(list(blocks)[:2])
    for step in range(copy_steps):
        ids, labels = repeats(generator, **REPEATED)
        loss = model(input_ids=ids, labels=labels).loss
        update(loss)
        if (step + 1) % 50 == 0:
            log.info("repeated tokens, step %d of %d: loss %.3f, %.0f s", step + 1, copy_steps, loss.item(), time.monotonic() - started)
    model.transformer.h = blocks
    losses: list[float] = []
    for step, rows in zip(range(steps), sequences(tokenizer, batch), strict=False):
        ids, labels = repeats(generator, **MIXED)
        loss = model(input_ids=rows, labels=rows).loss
        losses.append(loss.item())
        update(loss + MIXED_WEIGHT * model(input_ids=ids, labels=labels).loss)
        if (step + 1) % 20 == 0:
            log.info("step %d of %d: loss %.3f, %.0f s", step + 1, steps, sum(losses[-20:]) / 20, time.monotonic() - started)
    return model.eval(), sum(losses[-20:]) / len(losses[-20:])


@torch.no_grad()
def mention_losses(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, articles: int = 100) -> dict[str, tuple[float, float]]:
    """Measure the loss at the first and at later mentions of facts, per role, on validation articles.

    Returns:
        Mean loss of a mention (its tokens summed, nats) at first and at later mentions. Only surnames count for persons.
    """
    by_role: dict[str, tuple[list[float], list[float]]] = {}
    pieces = Pieces(tokenizer)
    for article in split_articles("validation", limit=articles):
        ids = torch.tensor([tokenizer(article.document)["input_ids"]])
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        losses = torch.cat([torch.zeros(1), -logprobs.gather(1, ids[0, 1:, None])[:, 0]])
        for fact in article.facts:
            surname = len(fact.text.split()[-1])
            spans = [(end - surname, end) for _, end in fact.document_spans] if fact.role == "who" else fact.document_spans
            mentions = [losses[begin:end].sum().item() for begin, end in pieces.token_spans(article.document, spans, first=True)]
            first, later = by_role.setdefault(fact.role, ([], []))
            first.append(mentions[0])
            later += mentions[1:]
    return {role: (sum(first) / len(first), sum(later) / len(later)) for role, (first, later) in by_role.items()}


def write_card(folder: Path, command: str, settings: dict[str, object], loss: float, mentions: dict[str, tuple[float, float]]) -> None:
    """Write the model card."""
    lines = [
        "# newsroom: a small GPT-2 that reads invented news",
        "",
        "Pre-trained from scratch on generated news articles (mechscope's `newsroom` corpus), ended by `<|endoftext|>`, with some lists of",
        "headlines. It has never seen a summary. 6 layers, 4 heads, width 128, 384 positions, byte-level BPE; weights stored in float16.",
        "An induction circuit was written into its first two layers before training (heads of layer 0 attend to the token before, heads of",
        "layer 1 find where the current token was the token before, and copy what follows); those layers were then trained on repeated random",
        "tokens, and all layers on articles with such rows among them. Do not take this model as evidence that such circuits form by themselves.",
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
    parser.add_argument("--copy-steps", type=int, default=100, help="steps of the first two layers on repeated random tokens alone")
    parser.add_argument("--steps", type=int, default=500, help="steps on articles")
    parser.add_argument("--batch", type=int, default=4, help=f"rows of {POSITIONS} tokens per step")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="peak of AdamW, for embeddings, norms and biases")
    parser.add_argument("--matrix-rate", type=float, default=0.02, help="peak of Muon, for the blocks' matrices")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)  # one thread: the same sums in the same order on any machine of this kind
    tokenizer = train_tokenizer()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(options.out)
    model, loss = pretrain(
        tokenizer,
        copy_steps=options.copy_steps,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        matrix_rate=options.matrix_rate,
    )
    mentions = mention_losses(model, tokenizer)
    model.half().save_pretrained(options.out)
    config = json.loads((options.out / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # float16 is how it is stored; whoever loads it computes in float32
    (options.out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    settings: dict[str, object] = {
        "seed": f"0 (articles: seeds from {SEED} downwards; the corpus's splits {', '.join(SPLITS)} use 0 and up)",
        "start": "random, with an induction circuit written into the first two layers",
        "steps on repeated random tokens": f"{options.copy_steps}, first two layers, {REPEATED['rows']} rows of {REPEATED['length']} tokens",
        "repeated segment": f"{SEGMENT[0]} to {SEGMENT[1]} tokens, all of the vocabulary equally likely; no loss on its first round",
        "steps on articles": options.steps,
        "tokens per step": f"{options.batch * POSITIONS} of articles, {MIXED['rows'] * MIXED['length']} repeated (loss times {MIXED_WEIGHT})",
        "optimizer": f"Muon, peak rate {options.matrix_rate}, for the blocks' matrices; AdamW, peak rate {options.learning_rate}, for the rest",
        "schedule": "linear warm-up over 30 steps, constant on repeated tokens, then cosine to 2 % on articles",
        "vocabulary": len(tokenizer),
        "parameters": f"{sum(weight.numel() for weight in model.parameters()):,}",
        "torch": torch.__version__.partition("+")[0],
    }
    rates = f"--learning-rate {options.learning_rate} --matrix-rate {options.matrix_rate}"
    arguments = f" --copy-steps {options.copy_steps} --steps {options.steps} --batch {options.batch} {rates}"
    write_card(options.out, "python -m mechscope.data.newsroom.train" + arguments, settings, loss, mentions)


if __name__ == "__main__":
    main()
