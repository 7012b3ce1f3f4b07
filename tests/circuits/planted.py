"""Models whose circuit is known because their weights are written by hand, each with prompt pairs and the true edges.

    induction   GPT-2, 2 layers       previous-token head, K-composition, induction head that answers what followed
    logic       GPT-NeoX, 4 layers    two heads fetch x and y, an MLP takes their XOR, V- and Q-composition choose the answer; parallel blocks
    backup      GPT-2, 2 layers       two heads fetch the same x and an MLP takes their OR: either alone is enough
    chain       GPT-2, any layers     one head fetches x, the last MLP reads it, and the logits that: three edges among hundreds

Weights are written over named features. Feature f stands in two dimensions of the residual stream, as f and −f, so its mean is always 0; the feature
`one` is a constant so large that the rest hardly moves the length; the norms' gain undoes the division. LayerNorm is thus the identity to within 0.5 %.
All other heads and MLPs are random, read everything and write `junk`: they answer to what differs between the texts, but nothing that matters reads
them well. At last every part reads and writes every feature a little, so that no edge is without any effect.

An edge is true if what it carries differs between clean and corrupt text and the construction reads it. Thus what tells a head where to look is not
among them where it is the same in both texts (positions, kinds of tokens).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.subject.load import Subject, load

HEADS, INNER = 4, 24
ONE = 60.0  # size of the constant feature
LEAK = 0.01  # how much every part reads and writes of every feature


@dataclass(frozen=True)
class Planted:
    """A model, the texts to find its circuit with, and that circuit.

    Attributes:
        subject: The model, in float64.
        pairs: Prompt pairs.
        truth: Names of the true edges.
        superfluous: A head outside the circuit, with edges of it that lie on a path from `embed` to `logits`.
    """

    subject: Subject
    pairs: Pairs
    truth: tuple[str, ...]
    superfluous: tuple[str, tuple[str, ...]]


class Features:
    """Named groups of features; the rest of the width is `junk`."""

    def __init__(self, width: int, **sizes: int) -> None:
        self.width, self.at = width, {}
        start = 0
        for name, size in {**sizes, "one": 1, "junk": width - 1 - sum(sizes.values())}.items():
            self.at[name] = range(start, start + size)
            start += size

    def column(self, name: str, place: int = 0) -> int:
        """Return where a feature stands."""
        return self.at[name][place]

    def rows(self, n: int, entries: Mapping[tuple[int, str, int], float]) -> Tensor:
        """Return ``(n, feature)`` with entries (row, group, place)."""
        made = torch.zeros(n, self.width, dtype=torch.float64)
        for (row, name, place), value in entries.items():
            made[row, self.column(name, place)] = value
        return made

    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Return ``(*shape, feature)`` standard normal values, 0 at `one`."""
        made = torch.randn(*shape, self.width, generator=generator, dtype=torch.float64)
        made[..., self.column("one")] = 0
        return made


class Block:
    """The weights of a block over features, ``(…, feature)`` each; all random at first."""

    def __init__(self, features: Features, generator: torch.Generator) -> None:
        self.features, self.head_dim = features, 2 * features.width // HEADS
        shape = (HEADS, self.head_dim)
        self.q, self.k, self.v = (0.5 * features.noise(*shape, generator=generator) for _ in range(3))
        self.up = 0.5 * features.noise(INNER, generator=generator)
        self.o, self.down = torch.zeros_like(self.q), torch.zeros_like(self.up)
        junk = list(features.at["junk"])
        for written in (self.o, self.down):
            size = (written.shape[-2] * len(junk)) ** -0.5  # a part writes about half as much as it reads
            written[..., junk] = features.noise(*written.shape[:-1], generator=generator)[..., junk] * size

    def head(self, head: int, q: dict, k: dict, v: dict, o: dict) -> None:
        """Write a head by hand; entries are (dimension of the head, group, place)."""
        self.q[head], self.k[head] = self.features.rows(self.head_dim, q) * self.head_dim**0.5, self.features.rows(self.head_dim, k)
        self.v[head], self.o[head] = self.features.rows(self.head_dim, v), self.features.rows(self.head_dim, o)

    def mlp(self, up: dict, down: dict) -> None:
        """Write the MLP by hand; entries are (hidden unit, group, place)."""
        self.up, self.down = self.features.rows(INNER, up), self.features.rows(INNER, down)

    def leak(self, generator: torch.Generator) -> None:
        """Let every part read and write every feature a little."""
        for weights in (self.q, self.k, self.v, self.up, self.o, self.down):
            weights += LEAK * self.features.noise(*weights.shape[:-1], generator=generator)


def _reading(weights: Tensor) -> Tensor:
    return torch.cat([weights, -weights], -1) / 2


def _writing(weights: Tensor) -> Tensor:
    return torch.cat([weights, -weights], -1)


def _pour(
    features: Features, blocks: list[Block], tokens: Tensor, unembedding: Tensor, positions: Tensor | None, generator: torch.Generator
) -> Subject:
    """Make a GPT-2, or without positions a GPT-NeoX, of these weights: ``(…, feature)`` each."""
    for block in blocks:
        block.leak(generator)
    unembedding = unembedding + LEAK * features.noise(len(unembedding), generator=generator)
    width, vocabulary = 2 * features.width, len(tokens)
    sizes = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    model: GPT2LMHeadModel | GPTNeoXForCausalLM
    if positions is not None:
        shape = {"n_embd": width, "n_layer": len(blocks), "n_head": HEADS, "n_inner": INNER, "n_positions": len(positions)}
        model = GPT2LMHeadModel(GPT2Config(activation_function="relu", **shape, **sizes))
    else:
        shape = {"hidden_size": width, "num_hidden_layers": len(blocks), "num_attention_heads": HEADS, "intermediate_size": INNER}
        # the first quarter of a head turns with position; heads written by hand leave it alone
        model = GPTNeoXForCausalLM(GPTNeoXConfig(hidden_act="relu", rotary_pct=0.25, max_position_embeddings=32, **shape, **sizes))
    state = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.state_dict().items()}
    for name, value in state.items():
        if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
            value.fill_(ONE * (2 / width) ** 0.5)
    if positions is not None:
        state |= {"transformer.wte.weight": _writing(tokens), "transformer.wpe.weight": _writing(positions)}
        state["lm_head.weight"] = _reading(unembedding)
        for layer, block in enumerate(blocks):
            at = f"transformer.h.{layer}"
            qkv = torch.cat([_reading(part.flatten(0, 1)) for part in (block.q, block.k, block.v)])
            state |= {f"{at}.attn.c_attn.weight": qkv.T, f"{at}.attn.c_proj.weight": _writing(block.o.flatten(0, 1))}
            state |= {f"{at}.mlp.c_fc.weight": _reading(block.up).T, f"{at}.mlp.c_proj.weight": _writing(block.down)}
    else:
        state |= {"gpt_neox.embed_in.weight": _writing(tokens), "lm_head.weight": _reading(unembedding)}
        for layer, block in enumerate(blocks):
            at = f"gpt_neox.layers.{layer}"
            # queries, keys and values head by head
            qkv = _reading(torch.cat([block.q, block.k, block.v], 1).flatten(0, 1))
            state |= {f"{at}.attention.query_key_value.weight": qkv, f"{at}.attention.dense.weight": _writing(block.o.flatten(0, 1)).T}
            state |= {f"{at}.mlp.dense_h_to_4h.weight": _reading(block.up), f"{at}.mlp.dense_4h_to_h.weight": _writing(block.down).T}
    model = model.double()
    model.load_state_dict(state)
    return load(model.eval())


def _same(first: int, group: str, n: int, value: float = 1.0) -> dict[tuple[int, str, int], float]:
    """Return entries that take a group's features one by one, from a row on."""
    return {(first + place, group, place): value for place in range(n)}


WORDS, LENGTH = 14, 9


@lru_cache(maxsize=1)
def induction() -> Planted:
    """Return the induction model: `… A B … A` is answered by B; in the corrupt text another A and another B stand in the same places."""
    generator = torch.Generator().manual_seed(0)
    features = Features(64, word=WORDS, place=LENGTH, before=WORDS, answer=WORDS)
    first, second = Block(features, generator), Block(features, generator)
    query = {(place - 1, "place", place): 12.0 for place in range(1, LENGTH)}
    first.head(1, query, _same(0, "place", LENGTH), _same(0, "word", WORDS), _same(0, "before", WORDS))
    second.head(2, _same(0, "word", WORDS, 6.0), _same(0, "before", WORDS), _same(0, "word", WORDS), _same(0, "answer", WORDS))
    positions = features.rows(LENGTH, _same(0, "place", LENGTH) | {(place, "one", 0): ONE for place in range(LENGTH)})
    words, unembedding = features.rows(WORDS, _same(0, "word", WORDS)), features.rows(WORDS, _same(0, "answer", WORDS, 5.0))
    subject = _pour(features, [first, second], words, unembedding, positions, generator)

    def make(rng: random.Random, _: int) -> tuple[list[int], list[int], int, int]:
        a, b, other_a, other_b, *rest = rng.sample(range(WORDS), LENGTH + 1)
        at = rng.randint(1, LENGTH - 3)  # the first word has none before it
        clean, corrupt = ([*rest[:at], one, two, *rest[at:], one] for one, two in ((a, b), (other_a, other_b)))
        return clean, corrupt, b, other_b

    truth = ("embed->a0.h1<v>", "a0.h1->a1.h2<k>", "embed->a1.h2<q>", "embed->a1.h2<v>", "a1.h2->logits")
    spare = ("a0.h3", ("embed->a0.h3<v>", "a0.h3->a1.h2<v>", "a0.h3->logits"))
    return Planted(subject, _pairs("induction", make), truth, spare)


PAYLOADS, FILLERS = 4, 6
KINDS = ("x", "y", "equals", "end", "low", "high")


@lru_cache(maxsize=1)
def logic() -> Planted:
    """Return the logic model: `… x … y … low_i … high_j … = … end` is answered by j if x and y agree, by i if not.

    Heads 0.0 and 0.1 bring x and y to `=`, MLP 1 compares them there, head 2.1 brings the outcome to the end, and the query of head 3.0 chooses by it.
    Head 0.2 is a decoy: it too brings x, of which MLP 1 takes the size, always 1: a slope everywhere, but no effect.
    A third of the corrupt texts has another x, a third another y, a third another token where the answer is read.
    """
    generator = torch.Generator().manual_seed(1)
    kind = {name: place for place, name in enumerate(KINDS)}
    features = Features(48, kind=len(KINDS), sign=2, payload=PAYLOADS, filler=FILLERS, fetched=3, agree=1, outcome=1, answer=PAYLOADS)
    blocks = [Block(features, generator) for _ in range(4)]
    free = 8  # a head's first dimensions turn with position

    def look(at: str, where: str) -> tuple[dict, dict]:
        return {(free, "kind", kind[at]): 8.0}, {(free, "kind", kind[where]): 1.0}

    for place, (name, which) in enumerate((("x", 0), ("y", 1), ("x", 0))):
        blocks[0].head(place, *look("equals", name), {(0, "sign", which): 1.0}, {(0, "fetched", place): 1.0})
    # |x + y| − 1 is 1 where they agree, −1 where not; |x| − 1 of head 0.2 is 0 whatever x is
    signs = {(0, 0): 1.0, (0, 1): 1.0, (1, 0): -1.0, (1, 1): -1.0, (2, 2): 1.0, (3, 2): -1.0}
    read = {(unit, "fetched", place): sign for (unit, place), sign in signs.items()}
    blocks[1].mlp({**read, (4, "one", 0): 2 / ONE}, {(unit, "agree", 0): 1.0 if unit < 4 else -1.0 for unit in range(5)})
    blocks[2].head(1, *look("end", "equals"), {(0, "agree", 0): 1.0}, {(0, "outcome", 0): 1.0})
    query = {(free, "kind", kind["end"]): 8.0, (free + 1, "outcome", 0): 3.0}
    low_or_high = {(free, "kind", kind["low"]): 1.0, (free, "kind", kind["high"]): 1.0}
    key = {**low_or_high, (free + 1, "kind", kind["low"]): -1.0, (free + 1, "kind", kind["high"]): 1.0}
    blocks[3].head(0, query, key, _same(0, "payload", PAYLOADS), _same(0, "answer", PAYLOADS))

    # x−, x+, y−, y+, =, end, low_0 …, high_0 …, fillers, and the answers
    meanings: list[dict[tuple[str, int], float]] = [{("kind", at // 2): 1.0, ("sign", at // 2): 2.0 * (at % 2) - 1} for at in range(4)]
    meanings += [{("kind", kind["equals"]): 1.0}, {("kind", kind["end"]): 1.0}]
    meanings += [{("kind", kind[name]): 1.0, ("payload", place): 1.0} for name in ("low", "high") for place in range(PAYLOADS)]
    low, filler = 6, 6 + 2 * PAYLOADS
    meanings += [{("filler", place): 1.0} for place in range(FILLERS)] + [{}] * PAYLOADS
    answer = filler + FILLERS
    entries = {(token, *at): value for token, meaning in enumerate(meanings) for at, value in {**meaning, ("one", 0): ONE}.items()}
    unembedding = features.rows(len(meanings), _same(answer, "answer", PAYLOADS, 5.0))
    subject = _pour(features, blocks, features.rows(len(meanings), entries), unembedding, None, generator)

    def make(rng: random.Random, number: int) -> tuple[list[int], list[int], int, int]:
        x, y, change = number // 3 % 2, number // 6 % 2, "xyp"[number % 3]
        payloads = rng.sample(range(PAYLOADS), 3)
        order = rng.sample(range(7), 7)
        fillers = rng.sample(range(FILLERS), 4)

        def text(x: int, y: int, low_high: tuple[int, int]) -> list[int]:
            told = [x, 2 + y, low + low_high[0], low + PAYLOADS + low_high[1], *(filler + which for which in fillers[:3])]
            return [*(told[place] for place in order), 4, filler + fillers[3], 5]

        right = int(x == y)
        shown, other = (payloads[0], payloads[1]), [payloads[0], payloads[1]]
        wrong = payloads[1 - right]
        if change == "p":
            other[right] = wrong = payloads[2]
        corrupt = text(x ^ (change == "x"), y ^ (change == "y"), (other[0], other[1]))
        return text(x, y, shown), corrupt, answer + shown[right], answer + wrong

    truth = (
        *("embed->a0.h0<v>", "embed->a0.h1<v>", "a0.h0->m1", "a0.h1->m1"),
        *("m1->a2.h1<v>", "a2.h1->a3.h0<q>", "embed->a3.h0<v>", "a3.h0->logits"),
    )
    spare = ("a1.h2", ("embed->a1.h2<v>", "a1.h2->a3.h0<v>", "a1.h2->logits"))
    return Planted(subject, _pairs("logic", make), truth, spare)


@lru_cache(maxsize=1)
def backup() -> Planted:
    """Return the backup model: `yes` if x is among the words, which two heads see and MLP 1 takes the OR of; corrupt texts have no x."""
    generator = torch.Generator().manual_seed(2)
    features = Features(32, word=WORDS, place=LENGTH, seen=2, either=1)
    blocks = [Block(features, generator) for _ in range(2)]
    for head in range(2):
        # all tokens see whether x is there: no query but the constant one is needed
        query = {(0, "one", 0): 8.0 / ONE}
        blocks[0].head(head, query, {(0, "word", 0): 1.0}, {(0, "word", 0): 1.0}, {(0, "seen", head): 1.0})
    seen = {(unit, "seen", head): 1.0 for unit in range(2) for head in range(2)}
    # min(1, a + b)
    blocks[1].mlp({**seen, (1, "one", 0): -1 / ONE}, {(0, "either", 0): 1.0, (1, "either", 0): -1.0})
    positions = features.rows(LENGTH, _same(0, "place", LENGTH) | {(place, "one", 0): ONE for place in range(LENGTH)})
    unembedding = features.rows(WORDS, {(1, "either", 0): 5.0})
    subject = _pour(features, blocks, features.rows(WORDS, _same(0, "word", WORDS)), unembedding, positions, generator)

    def make(rng: random.Random, _: int) -> tuple[list[int], list[int], int, int]:
        *rest, other = rng.sample(range(3, WORDS), LENGTH)
        at = rng.randint(0, LENGTH - 2)
        clean, corrupt = ([*rest[:at], word, *rest[at:]] for word in (0, other))
        return clean, corrupt, 1, 2

    truth = ("embed->a0.h0<v>", "embed->a0.h0<k>", "embed->a0.h1<v>", "embed->a0.h1<k>", "a0.h0->m1", "a0.h1->m1", "m1->logits")
    return Planted(subject, _pairs("backup", make), truth, ("a0.h3", ("embed->a0.h3<v>", "a0.h3->m1", "a0.h3->logits")))


@lru_cache
def chain(layers: int) -> Planted:
    """Return the chain model: `yes` if x is among the words, which head 0.1 sees and the last MLP passes on; corrupt texts have no x."""
    generator = torch.Generator().manual_seed(5)
    features = Features(32, word=WORDS, seen=1, either=1)
    blocks = [Block(features, generator) for _ in range(layers)]
    # it looks everywhere alike, and so sees a part of every word
    blocks[0].head(1, {}, {}, {(0, "word", 0): float(LENGTH)}, {(0, "seen", 0): 1.0})
    blocks[-1].mlp({(0, "seen", 0): 1.0}, {(0, "either", 0): 1.0})
    positions = features.rows(LENGTH, {(place, "one", 0): ONE for place in range(LENGTH)})
    unembedding = features.rows(WORDS, {(1, "either", 0): 5.0})
    subject = _pour(features, blocks, features.rows(WORDS, _same(0, "word", WORDS)), unembedding, positions, generator)

    def make(rng: random.Random, _: int) -> tuple[list[int], list[int], int, int]:
        *rest, other = rng.sample(range(3, WORDS), LENGTH)
        at = rng.randint(0, LENGTH - 2)
        clean, corrupt = ([*rest[:at], word, *rest[at:]] for word in (0, other))
        return clean, corrupt, 1, 2

    last = f"m{layers - 1}"
    return Planted(subject, _pairs("chain", make), ("embed->a0.h1<v>", f"a0.h1->{last}", f"{last}->logits"), ("a0.h3", ()))


def _pairs(name: str, make: Callable[[random.Random, int], tuple[list[int], list[int], int, int]], n: int = 12) -> Pairs:
    rng = random.Random(name)
    made = []
    for number in range(n):
        clean, corrupt, right, wrong = make(rng, number)
        made.append(PromptPair(f"{name} {number}", tuple(clean), tuple(corrupt), answers=(right,), wrong_answers=(wrong,)))
    return Pairs(tuple(made), f"planted {name}")
