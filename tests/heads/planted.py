"""A GPT-2 whose heads are written by hand: each does one thing exactly, so that its score for a role is the largest or the smallest there can be.

Tokens stand on a circle, and so do positions: token t is (cos φt, sin φt), position i is (cos θi, sin θi), each number beside its negative. Then every
token has mean 0 and one length, so LayerNorm multiplies by a constant; a turned query looks for the key that it was turned to; and a turned value is
the logits' maximum at the token that it was turned to. Scores are so large that a row looks at one key alone.

    layer 0   previous    i to i − 1                               layer 1   induction   to the token behind the same one, and writes that token
              duplicate   to the same token, earliest first                  copy        looks at all alike, writes the token it reads
              far         i to i − FAR                                       suppress    likewise, writes against it
              sink        to position 0                                      next        likewise, writes the token after it in their order
              uniform     to all alike, writes nothing
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mechscope.subject.load import Subject, load

WORDS, PLACES, FAR = 60, 64, 15
LAYERS, HEADS, D_HEAD, WIDTH = 2, 8, 8, 64
HEAD = {
    **{name: f"a0.h{at}" for at, name in enumerate(("previous", "duplicate", "far", "sink", "uniform"))},
    **{name: f"a1.h{at}" for at, name in enumerate(("induction", "copy", "suppress", "next"))},
}
# angles between neighbours; positions stay on half a circle, so that a larger distance is always a smaller cosine
_WORD, _PLACE = 2 * math.pi / WORDS, math.pi / PLACES
# where the circles lie in the residual stream, and the negatives beside them
_TOKEN, _POSITION, _BEFORE, _ANSWER = 0, 2, 4, 6
_NEGATIVE = WIDTH // 2


def _circle(n: int, angle: float, at: int) -> Tensor:
    """Return n points on a circle, as rows of the residual stream, (n, width)."""
    turned = angle * torch.arange(n, dtype=torch.float64)
    points = torch.stack([turned.cos(), turned.sin()], -1)
    rows = torch.zeros(n, WIDTH, dtype=torch.float64)
    rows[:, at : at + 2], rows[:, _NEGATIVE + at : _NEGATIVE + at + 2] = points, -points
    return rows


def _turn(angle: float) -> Tensor:
    return torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)


class _Weights:
    """One layer's weights, as GPT-2 stores them."""

    def __init__(self) -> None:
        self.qkv = torch.zeros(WIDTH, 3 * WIDTH, dtype=torch.float64)
        self.bias = torch.zeros(3 * WIDTH, dtype=torch.float64)
        self.out = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)

    def look(self, head: int, *parts: tuple[float, int, int, float]) -> None:
        """Score keys by cosines: parts are a size, the circles of query and key, and the angle by which the key is to stand behind the query."""
        for place, (size, query, key, behind) in enumerate(parts):
            columns = slice(head * D_HEAD + 2 * place, head * D_HEAD + 2 * place + 2)
            # rows are read as (point, −point); a point turned back by the angle
            self.qkv[query : query + 2, columns] = size * D_HEAD**0.5 * _turn(-behind)
            self.qkv[key : key + 2, WIDTH:][:, columns] = torch.eye(2, dtype=torch.float64)

    def look_at_the_first(self, head: int, size: float) -> None:
        """Ask for the place that stands at angle zero, whatever is read."""
        self.bias[head * D_HEAD] = size * D_HEAD**0.5
        self.qkv[_POSITION : _POSITION + 2, WIDTH + head * D_HEAD : WIDTH + head * D_HEAD + 2] = torch.eye(2, dtype=torch.float64)

    def move(self, head: int, source: int, target: int, *, turned: float = 0.0, sign: float = 1.0) -> None:
        """Write what is read from one circle to another."""
        rows = slice(head * D_HEAD, head * D_HEAD + 2)
        self.qkv[source : source + 2, 2 * WIDTH :][:, rows] = torch.eye(2, dtype=torch.float64)
        self.out[rows, target : target + 2] = sign * _turn(turned)
        self.out[rows, _NEGATIVE + target : _NEGATIVE + target + 2] = -sign * _turn(turned)


def _layers() -> tuple[_Weights, _Weights]:
    first, second = _Weights(), _Weights()
    first.look(0, (1e5, _POSITION, _POSITION, _PLACE))
    first.move(0, _TOKEN, _BEFORE)
    first.look(1, (1e6, _TOKEN, _TOKEN, 0.0), (-1e3, _POSITION, _POSITION, 0.0))
    first.look(2, (1e5, _POSITION, _POSITION, FAR * _PLACE))
    first.look_at_the_first(3, 1e5)
    # the first token stands behind itself: the later of two is meant
    second.look(0, (1e6, _TOKEN, _BEFORE, 0.0), (2e3, _POSITION, _POSITION, 0.0))
    second.move(0, _TOKEN, _ANSWER)
    second.move(1, _TOKEN, _ANSWER)
    second.move(2, _TOKEN, _ANSWER, sign=-1.0)
    second.move(3, _TOKEN, _ANSWER, turned=_WORD)
    return first, second


@lru_cache(maxsize=1)
def exact() -> Subject:
    """Return the model, in float64."""
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_inner": 4, "n_positions": PLACES, "vocab_size": WORDS}
    model = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)).double().eval()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state |= {"transformer.wte.weight": _circle(WORDS, _WORD, _TOKEN), "transformer.wpe.weight": _circle(PLACES, _PLACE, _POSITION)}
    state["lm_head.weight"] = _circle(WORDS, _WORD, _ANSWER)
    state["transformer.ln_f.weight"] = torch.ones(WIDTH, dtype=torch.float64)
    for layer, weights in enumerate(_layers()):
        at = f"transformer.h.{layer}"
        state |= {f"{at}.attn.c_attn.weight": weights.qkv, f"{at}.attn.c_attn.bias": weights.bias, f"{at}.attn.c_proj.weight": weights.out}
        # what LayerNorm divides by: tokens, positions and, in layer 1, the tokens before, of length √2 each
        state[f"{at}.ln_1.weight"] = torch.full((WIDTH,), (2 * (2 + layer) / WIDTH) ** 0.5, dtype=torch.float64)
    model.load_state_dict(state)
    return load(model)
