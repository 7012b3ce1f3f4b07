"""Circuits of edges by brute force: one text, one head, one receiver at a time, straight from the Hugging Face modules' weights.

Every receiver (the query, key and value of a query head, an MLP, the logits) reads its own residual stream: that of the other run plus what the
edges into it change. Nothing is shared with the package but the names of the edges. Only norms, MLPs, embeddings and the unembedding are the
model's own modules; attention is written out per family.

In float64 two right programs agree to about 1e-13 where norms are LayerNorms. RMS norms compute in float32 inside transformers whatever the model's
type, so there two right programs differ by rounding of 6e-8 per norm, which later layers amplify: `TOLERANCE` says how closely to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mechscope.data.pairs import PromptPair

EXACT = ("gpt2", "gpt_neox", "opt", "phi")
FAMILIES = (*EXACT, "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")
TOLERANCE = {family: 1e-9 if family in EXACT else 1e-5 for family in FAMILIES}


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, cap: float | None = None) -> Tensor:
    """Return z of one head: each token attends to itself and what precedes it, at most `window` tokens."""
    scores = q @ k.T * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))
    return scores.masked_fill((back < 0) | (back >= (window or len(q))), -torch.inf).softmax(1) @ v


def rotate(x: Tensor, *, base: float, width: int) -> Tensor:
    """Turn the first `width` features of one head by their token's position; angles are float32, as transformers computes them."""
    speeds, half = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)), width // 2
    angles = torch.arange(len(x), dtype=torch.float32)[:, None] * speeds
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    one, two, rest = x[:, :half], x[:, half:width], x[:, width:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], 1)


class Family:
    """What one family's model computes, in the pieces that edges tell apart.

    Each family has `embed` (before the first block), `head` (W_O^h z from the residual streams that query, key and value read) and `bias` (of a
    layer's output projection, which belongs to no sender).
    """

    parallel = False
    norms = "post_attention_layernorm", "norm"  # before the MLP, before the unembedding

    def __init__(self, model: Any) -> None:
        self.config, self.unembed = model.config, model.get_output_embeddings()
        self.n_layers, self.n_heads = self.config.num_hidden_layers, self.config.num_attention_heads
        self.d_head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.n_heads
        self.body: Any = getattr(model.base_model, "decoder", model.base_model)
        self.layers: Any = self.body.h if self.config.model_type == "gpt2" else self.body.layers

    def of(self, head: int) -> slice:
        """Where a head lies in what all heads concatenate to."""
        return slice(head * self.d_head, (head + 1) * self.d_head)

    def added(self, layer: int, heads: Sequence[Tensor]) -> list[Tensor]:
        """What each head of a layer adds to the residual stream."""
        return list(heads)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """What the MLP of a layer adds, from the residual stream that it reads."""
        return self.layers[layer].mlp(getattr(self.layers[layer], self.norms[0])(x))

    def logits(self, x: Tensor) -> Tensor:
        """Next-token logits from the last residual stream."""
        return self.unembed(getattr(self.body, self.norms[1])(x))


class GPT2(Family):
    norms = "ln_2", "ln_f"

    def embed(self, ids: Tensor) -> Tensor:
        return self.body.wte.weight[ids] + self.body.wpe.weight[: len(ids)]

    def head(self, layer: int, head: int, xq: Tensor, xk: Tensor, xv: Tensor) -> Tensor:
        block, here = self.layers[layer], self.of(head)
        # Conv1D keeps (in, out), queries then keys then values
        wq, wk, wv = block.attn.c_attn.weight.T.chunk(3)
        bq, bk, bv = block.attn.c_attn.bias.chunk(3)
        q, k, v = (linear(block.ln_1(x), w[here], b[here]) for x, w, b in ((xq, wq, bq), (xk, wk, bk), (xv, wv, bv)))
        return attend(q, k, v, scale=self.d_head**-0.5) @ block.attn.c_proj.weight[here]

    def bias(self, layer: int) -> Tensor | None:
        return self.layers[layer].attn.c_proj.bias


class GPTNeoX(Family):
    norms = "post_attention_layernorm", "final_layer_norm"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.parallel = self.config.use_parallel_residual

    def embed(self, ids: Tensor) -> Tensor:
        return self.body.embed_in.weight[ids]

    def head(self, layer: int, head: int, xq: Tensor, xk: Tensor, xv: Tensor) -> Tensor:
        block, size, rope = self.layers[layer], self.d_head, self.config.rope_parameters
        fused = block.attention.query_key_value
        # a head's query, key and value lie side by side
        rows = [slice((3 * head + part) * size, (3 * head + part + 1) * size) for part in range(3)]
        q, k, v = (linear(block.input_layernorm(x), fused.weight[at], fused.bias[at]) for x, at in zip((xq, xk, xv), rows, strict=True))
        q, k = (rotate(x, base=rope["rope_theta"], width=int(size * rope["partial_rotary_factor"])) for x in (q, k))
        return attend(q, k, v, scale=size**-0.5) @ block.attention.dense.weight[:, self.of(head)].T

    def bias(self, layer: int) -> Tensor | None:
        return self.layers[layer].attention.dense.bias


class OPT(Family):
    norms = "final_layer_norm", "final_layer_norm"  # a block's own one and the model's

    def embed(self, ids: Tensor) -> Tensor:
        return self.body.embed_tokens.weight[ids] + self.body.embed_positions.weight[2 : 2 + len(ids)]

    def head(self, layer: int, head: int, xq: Tensor, xk: Tensor, xv: Tensor) -> Tensor:
        own, norm, here = self.layers[layer].self_attn, self.layers[layer].self_attn_layer_norm, self.of(head)
        q, k, v = (linear(norm(x), by.weight[here], by.bias[here]) for x, by in ((xq, own.q_proj), (xk, own.k_proj), (xv, own.v_proj)))
        return attend(q, k, v, scale=self.d_head**-0.5) @ own.out_proj.weight[:, here].T

    def bias(self, layer: int) -> Tensor | None:
        return self.layers[layer].self_attn.out_proj.bias

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.layers[layer]
        return block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(x))))


class Llama(Family):
    """Also Mistral, Qwen2 and Qwen3, which differ in windows, biases and norms of queries and keys."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.body.embed_tokens.weight[ids]

    def of_group(self, head: int) -> slice:
        """Where the shared key and value of a query head's group lie."""
        return self.of(head // (self.n_heads // self.config.num_key_value_heads))

    def maps(self, layer: int, head: int) -> list[tuple[Tensor, Tensor | None]]:
        own, group = self.layers[layer].self_attn, self.of_group(head)
        made = ((own.q_proj, self.of(head)), (own.k_proj, group), (own.v_proj, group))
        return [(by.weight[rows], None if by.bias is None else by.bias[rows]) for by, rows in made]

    def scores(self, layer: int) -> dict[str, Any]:
        return {"scale": self.d_head**-0.5, "window": self.config.sliding_window if self.config.model_type == "mistral" else None}

    def turn(self, layer: int, x: Tensor) -> Tensor:
        return rotate(x, base=self.config.rope_parameters["rope_theta"], width=self.d_head)

    def output(self, layer: int) -> Any:
        return self.layers[layer].self_attn.o_proj

    def head(self, layer: int, head: int, xq: Tensor, xk: Tensor, xv: Tensor) -> Tensor:
        block = self.layers[layer]
        (wq, bq), (wk, bk), (wv, bv) = self.maps(layer, head)
        q, k, v = (linear(block.input_layernorm(x), w, b) for x, w, b in ((xq, wq, bq), (xk, wk, bk), (xv, wv, bv)))
        if self.config.model_type in ("qwen3", "gemma3_text"):
            q, k = block.self_attn.q_norm(q), block.self_attn.k_norm(k)
        z = attend(self.turn(layer, q), self.turn(layer, k), v, **self.scores(layer))
        return z @ self.output(layer).weight[:, self.of(head)].T

    def bias(self, layer: int) -> Tensor | None:
        return self.output(layer).bias


class Phi(Llama):
    """Parallel blocks with one norm, whose output attention and MLP both read; only some of a head's features turn."""

    parallel = True
    norms = "input_layernorm", "final_layernorm"

    def turn(self, layer: int, x: Tensor) -> Tensor:
        rope = self.config.rope_parameters
        return rotate(x, base=rope["rope_theta"], width=int(self.d_head * rope["partial_rotary_factor"]))

    def output(self, layer: int) -> Any:
        return self.layers[layer].self_attn.dense


class Phi3(Llama):
    def maps(self, layer: int, head: int) -> list[tuple[Tensor, Tensor | None]]:
        fused, group, keys = self.layers[layer].self_attn.qkv_proj.weight, self.of_group(head), self.n_heads * self.d_head
        values = keys + self.config.num_key_value_heads * self.d_head
        return [(fused[self.of(head)], None), (fused[keys:values][group], None), (fused[values:][group], None)]


class Gemma(Llama):
    """Gemma 2 and 3: norms after attention and MLP, scaled embeddings, windows; scores and logits capped in Gemma 2."""

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) * torch.tensor(self.config.hidden_size**0.5, dtype=torch.float32).to(torch.float64)

    def scores(self, layer: int) -> dict[str, Any]:
        window = self.config.sliding_window if self.config.layer_types[layer] == "sliding_attention" else None
        return {"scale": self.config.query_pre_attn_scalar**-0.5, "window": window, "cap": self.config.attn_logit_softcapping}

    def turn(self, layer: int, x: Tensor) -> Tensor:
        rope = self.config.rope_parameters
        return rotate(x, base=rope.get(self.config.layer_types[layer], rope)["rope_theta"], width=self.d_head)

    def added(self, layer: int, heads: Sequence[Tensor]) -> list[Tensor]:
        # the norm after attention divides every head by the size of their sum
        norm = self.layers[layer].post_attention_layernorm
        size = (sum(heads, torch.zeros_like(heads[0])).pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        return [head / size * (1 + norm.weight) for head in heads]

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.layers[layer]
        return block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))

    def logits(self, x: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return super().logits(x) if cap is None else cap * torch.tanh(super().logits(x) / cap)


KINDS: dict[str, Any] = dict.fromkeys(FAMILIES, Llama)
KINDS.update(gpt2=GPT2, gpt_neox=GPTNeoX, opt=OPT, phi=Phi, phi3=Phi3, gemma2=Gemma, gemma3=Gemma)
# what a receiver reads, from its name and what has been written before it, in how many layers attention has added its bias
Read = Callable[[str, Mapping[str, Tensor], int], Tensor]
Keep = Collection[str] | Mapping[str, float]


def run(family: Any, ids: Tensor, read: Read) -> tuple[dict[str, Tensor], Tensor]:
    """Return what every sender adds, and the logits, when every receiver reads what `read` says."""
    written = {"embed": family.embed(ids)}
    for layer in range(family.n_layers):
        name = f"a{layer}.h"
        heads = [
            family.head(layer, head, *(read(f"{name}{head}<{part}>", written, layer) for part in "qkv")) for head in range(family.n_heads)
        ]
        after = {**written, **{f"{name}{head}": value for head, value in enumerate(family.added(layer, heads))}}
        x = read(f"m{layer}", written, layer) if family.parallel else read(f"m{layer}", after, layer + 1)
        written = {**after, f"m{layer}": family.mlp(layer, x)}
    return written, family.logits(read("logits", written, family.n_layers))


def everything(family: Any) -> Read:
    """Read all that has been written, as the model does."""

    def read(_: str, written: Mapping[str, Tensor], biases: int) -> Tensor:
        added = [bias for layer in range(biases) if (bias := family.bias(layer)) is not None]
        return sum([*written.values(), *added], torch.zeros_like(written["embed"]))

    return read


@torch.no_grad()
def brute_written(model: Any, family: str, ids: Sequence[int]) -> dict[str, Tensor]:
    """Return what every sender adds to the residual stream ``(token, d_model)`` when the model reads a text."""
    parts = KINDS[family](model)
    return run(parts, torch.tensor(ids), everything(parts))[0]


@torch.no_grad()
def brute_forward(model: Any, family: str, clean: Sequence[int], rest: Mapping[str, Tensor], keep: Keep) -> Tensor:
    """Return the logits ``(token, vocab)`` of the clean text when some edges carry what senders write there and the rest something else.

    Args:
        model: A float64 model.
        family: One of `FAMILIES`.
        clean: Token ids.
        rest: What the other edges carry, by sender: `brute_written` of another text, zeros or means.
        keep: Names of the edges of the circuit, or how much of each edge's change to carry.
    """
    parts = KINDS[family](model)
    weight = keep if isinstance(keep, Mapping) else dict.fromkeys(keep, 1.0)

    def through_edges(receiver: str, written: Mapping[str, Tensor], biases: int) -> Tensor:
        x = everything(parts)(receiver, {name: rest[name].expand_as(written["embed"]) for name in written}, biases)
        for name, value in written.items():
            x = x + weight.get(f"{name}->{receiver}", 0.0) * (value - rest[name])
        return x

    return run(parts, torch.tensor(clean), through_edges)[1]


def brute_metric(
    model: Any, family: str, pair: PromptPair, keep: Keep, *, rest: Mapping[str, Tensor] | None = None, metric: str = "logit-diff"
) -> float:
    """Return a metric of one pair under a circuit; `rest` is what the corrupt text's run writes unless it is given."""
    return read_metric(brute_forward(model, family, pair.clean, rest or brute_written(model, family, pair.corrupt), keep), pair, metric)


def read_metric(logits: Tensor, pair: PromptPair, metric: str = "logit-diff") -> float:
    """Return the logit difference after the last token, or the mean loss of the target in nats, from ``(token, vocab)``."""
    if metric == "logit-diff":
        return float(logits[-1, list(pair.answers)].mean() - logits[-1, list(pair.wrong_answers)].mean())
    assert pair.target is not None
    return float(torch.stack([-logits[at - 1].log_softmax(0)[pair.clean[at]] for at in range(*pair.target)]).mean())
