"""An independent slow account of the difference between two models: plain Hugging Face, one unpadded document at a time, loops in float64.

Whole attention maps are taken from the model's own eager attention; because some eager functions take their softmax in float32 whatever the
model's type, float64 models use a function registered here that only multiplies, masks and normalises. Nothing of `mechscope.instrument` or
`mechscope.difference` is used: modules are found by the names that each family gives them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from mechscope.data.prompt import Encoded, Example
from mechscope.subject import Pair, pair
from mechscope.subject.load import load
from tests import families
from tests.stats.skewed import mean_test

KINDS = ("all", "document", "summary")
HEAD_NAMES = (
    "entropy_base",
    "entropy_tuned",
    "relative_entropy_base",
    "relative_entropy_tuned",
    "distance_base",
    "distance_tuned",
    "sink_base",
    "sink_tuned",
    "entropy_change",
    "kl_base_tuned",
    "kl_tuned_base",
    "z_cosine_distance",
    "write_change",
    "write_change_own",
)
LAYER_NAMES = (
    "kl_base_tuned",
    "kl_tuned_base",
    "entropy_change",
    "write_change",
    "write_change_own",
    "activation_norm_base",
    "activation_norm_tuned",
    "activation_abs_base",
    "activation_abs_tuned",
    "cosine_distance",
    "mlp_write_change",
    "mlp_write_change_own",
)
OUTPUT_NAMES = ("kl_base_tuned", "kl_tuned_base", "loss_base", "loss_tuned", "loss_change")

# where each family keeps its blocks, and each block the map that reads the heads' outputs
PLACES = {"gpt2": ("transformer.h", "attn.c_proj"), "gpt_neox": ("gpt_neox.layers", "attention.dense")}
LLAMA_LIKE = ("model.layers", "self_attn.o_proj")
# what stands around each family's MLP, and behind its attention
AROUND = {
    "gpt2": (["ln_2", "mlp"], None),
    "gpt_neox": (["post_attention_layernorm", "mlp"], None),
    "gemma2": (["pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"], "post_attention_layernorm"),
    "gemma3": (["pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"], "post_attention_layernorm"),
}
AROUND_LLAMA_LIKE: tuple[list[str], str | None] = (["post_attention_layernorm", "mlp"], None)


def examples(seed: int = 0, lengths: Sequence[int] = (23, 12, 17, 9, 20, 14), vocabulary: int = families.VOCABULARY) -> tuple[Example, ...]:
    """Return random documents: two opening tokens, the article, two tokens between, a summary of four to six tokens."""
    made = []
    for index, text in enumerate(families.documents(vocabulary, seed, tuple(lengths))):
        length = len(text)
        summary = length - 4 - index % 3
        made.append(Example(f"doc{index}", tuple(text.tolist()), (2, summary - 2), (summary, length), False))
    return tuple(made)


def encoded(*args: Any, **options: Any) -> Encoded:
    """Return `examples` as a corpus."""
    return Encoded(examples(*args, **options), {})


@torch.no_grad()
def perturbed(model: Any, size: float = 0.05, seed: int = 1, only: str = "") -> Any:
    """Return a copy with noise of a share of each parameter's own spread added, on parameters whose name contains `only`."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in changed.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if only in name:
            parameter.add_(size * parameter.float().std(correction=0).to(parameter.dtype) * noise)
    return changed


def two(base: Any, tuned: Any, **options: Any) -> Pair:
    """Make a pair of two models in memory."""
    return pair(load(base, device="cpu"), load(tuned, device="cpu"), **options)


@lru_cache
def models(family: str, dtype: torch.dtype = torch.float64) -> Pair:
    """Return a tiny model of a family and a copy changed everywhere by a twentieth."""
    base = families.build(family, torch.float32)
    return two(base.to(dtype), perturbed(base).to(dtype))


def attention_by_maps(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, softcap: float | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attend by the whole map, in the model's type."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    maps = torch.softmax(scores + attention_mask, dim=-1)
    return (maps @ value).transpose(1, 2).contiguous(), maps


AttentionInterface.register("diff_oracle", attention_by_maps)
AttentionMaskInterface.register("diff_oracle", eager_mask)


@dataclass(frozen=True)
class Seen:
    """What one model did with one document, in float64: maps (layer, head, query, key), z, residual stream after each block, log p.

    And what heads (layer, token, head, d_model) and MLPs (layer, token, d_model) wrote, and the streams before and behind attention.
    """

    maps: np.ndarray
    z: np.ndarray
    residual: np.ndarray
    log_p: np.ndarray
    heads: np.ndarray
    mlps: np.ndarray
    streams: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def look(model: Any, family: str, ids: Sequence[int], given: Sequence[tuple[Tensor, Tensor]] | None = None) -> Seen:
    """Run one document, alone and without padding, and keep whole maps; with `given`, every block and MLP on another model's streams."""
    implementation = "diff_oracle" if model.dtype == torch.float64 else "eager"
    before = model.config._attn_implementation
    blocks_path, writer_path = PLACES.get(family, LLAMA_LIKE)
    blocks = model.get_submodule(blocks_path)
    maps: list[Tensor] = []
    z: list[Tensor] = []
    residual: list[Tensor] = []
    handles = []
    heads: list[np.ndarray] = []
    mlps: list[np.ndarray] = []
    streams: list[tuple[Tensor, Tensor]] = []
    chain, behind = AROUND.get(family, AROUND_LLAMA_LIKE)

    def enters(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what a block reads, or let it read what is given."""
        at = len(streams)
        stream = args[0] if args else kwargs["hidden_states"]
        stream = stream if given is None else given[at][0]
        streams.append((stream, stream))
        return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

    def attended(block: Any, writer: Any) -> None:
        """Take apart, loop by loop, what the heads wrote, and run the MLP by its parts on the stream behind."""
        at = len(streams) - 1
        weight = writer.weight.T if type(writer).__name__ != "Conv1D" else writer.weight
        count = model.config.num_attention_heads
        parts = z[-1].reshape(z[-1].shape[1], count, -1)
        wrote = torch.einsum("thd,hdm->thm", parts, weight.reshape(count, -1, weight.shape[1]))
        added = z[-1] @ weight
        if writer.bias is not None:
            added = added + writer.bias
        if behind is not None:
            norm = block.get_submodule(behind)
            # RMS norm: the sum's scale and the norm's gain, for each head's part of the sum
            scale = (added[0].square().mean(-1) + norm.eps).rsqrt()
            wrote = wrote * scale[:, None, None] * (1 + norm.weight)
            added = norm(added)
            assert torch.allclose(wrote.sum(1), added[0], rtol=1e-3, atol=1e-4)
        before = streams[at][0]
        middle = before if family == "gpt_neox" else before + added
        if given is not None:
            middle = given[at][1]
        streams[at] = (before, middle)
        for name in chain:
            middle = block.get_submodule(name)(middle)
        heads.append(wrote.double().numpy())
        mlps.append(middle[0].double().numpy())

    for block in blocks:
        writer = block.get_submodule(writer_path)
        handles.append(block.register_forward_pre_hook(enters, with_kwargs=True))
        attention = block.get_submodule(writer_path.rpartition(".")[0])
        handles.append(attention.register_forward_hook(lambda _, __, output: maps.append(output[1])))
        handles.append(writer.register_forward_pre_hook(lambda _, args: z.append(args[0])))
        handles.append(
            block.register_forward_hook(lambda _, __, output: residual.append(output[0] if isinstance(output, tuple) else output))
        )
        handles.append(block.register_forward_hook(lambda block, _, __, writer=writer: attended(block, writer)))
    model.set_attn_implementation(implementation)
    try:
        output = model(torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()
    if given is None:
        for found, expected in zip(residual[:-1], output.hidden_states[1:-1], strict=True):
            assert torch.equal(found, expected)
    count = maps[0].shape[1]
    return Seen(
        np.stack([x[0].double().numpy() for x in maps]),
        np.stack([x[0].double().reshape(x.shape[1], count, -1).numpy() for x in z]),
        np.stack([x[0].double().numpy() for x in residual]),
        torch.log_softmax(output.logits[0].double(), dim=-1).numpy(),
        np.stack(heads),
        np.stack(mlps),
        streams,
    )


def cosine_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return 1 − cosine, by the textbook."""
    return float(1 - x @ y / np.sqrt((x @ x) * (y @ y)))


def of_row(p: np.ndarray, q: np.ndarray) -> list[float]:
    """Return the pattern measures of one query row of two models, the row being the last of the keys given."""
    i = len(p) - 1
    entropies, supports, distances = [], [], []
    for row in (p, q):
        seen = row[row > 0]
        entropies.append(-np.sum(seen * np.log(seen)))
        supports.append(len(seen))
        distances.append(np.sum(row * (i - np.arange(i + 1))))
    relative = [entropy / np.log(n) if n > 1 else np.nan for entropy, n in zip(entropies, supports, strict=True)]
    p_seen, q_seen = p[p > 0], q[q > 0]
    log_ratio = np.log(p_seen / q_seen)
    divergences = [np.sum(p_seen * log_ratio), -np.sum(q_seen * log_ratio)]
    return [*entropies, *relative, *distances, p[0], q[0], entropies[1] - entropies[0], *divergences]


def kinds(example: Example) -> list[list[int]]:
    """Return the token positions of each kind of row."""
    return [list(range(len(example))), list(range(*example.document)), list(range(*example.summary))]


def mean(values: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """Average over chosen rows of the first axis, leaving NaN out; NaN where nothing is left."""
    chosen = values[list(rows)]
    valid = ~np.isnan(chosen)
    return np.where(valid, chosen, 0.0).sum(0) / np.where(valid.any(0), valid.sum(0), np.nan)


def relative_change(base: np.ndarray, tuned: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """Return ‖tuned − base‖ over ‖base‖, each summed over some tokens (the second axis)."""
    change, size = (np.sqrt((x[:, list(rows)] ** 2).sum(-1)).sum(1) for x in (tuned - base, base))
    return change / np.where(size > 0, size, np.nan)


@dataclass(frozen=True)
class Truth:
    """Every document's means: heads (document, rows, measure, layer, head), layers, outputs, pooled (document, side, rows, layer, d)."""

    heads: np.ndarray
    layers: np.ndarray
    outputs: np.ndarray
    pooled: np.ndarray


@lru_cache
def truth(family: str, dtype: torch.dtype = torch.float64) -> Truth:
    """Return the slow account of `models(family, dtype)` over `examples()`."""
    both = models(family, dtype)
    return compare(both.base.plain, both.tuned.plain, family, examples())


def compare(base: Any, tuned: Any, family: str, documents: Sequence[Example]) -> Truth:
    """Measure two models document by document, row by row."""
    found: dict[str, list] = {"heads": [], "layers": [], "outputs": [], "pooled": []}
    for example in documents:
        one, other = look(base, family, example.input_ids), look(tuned, family, example.input_ids)
        # handles of hooks stand in the order of the blocks, so each writer's z is noted before it is taken apart
        again = look(tuned, family, example.input_ids, one.streams)
        layers, heads, length, _ = one.maps.shape
        by_head = np.zeros((length, 12, layers, heads))
        for t, layer, head in np.ndindex(length, layers, heads):
            pattern = of_row(one.maps[layer, head, t, : t + 1], other.maps[layer, head, t, : t + 1])
            by_head[t, :, layer, head] = [*pattern, cosine_distance(one.z[layer, t, head], other.z[layer, t, head])]
        by_layer = np.zeros((length, 5, layers))
        for t, layer in np.ndindex(length, layers):
            x, y = one.residual[layer, t], other.residual[layer, t]
            by_layer[t, :, layer] = [np.sqrt(x @ x), np.sqrt(y @ y), np.abs(x).mean(), np.abs(y).mean(), cosine_distance(x, y)]
        by_token = np.full((length, len(OUTPUT_NAMES)), np.nan)  # nothing predicts the first token
        for t in range(1, length):
            p, q, token = one.log_p[t - 1], other.log_p[t - 1], example.input_ids[t]
            by_token[t] = [np.exp(p) @ (p - q), np.exp(q) @ (q - p), -p[token], -q[token], p[token] - q[token]]
        rows = kinds(example)
        of_heads = np.stack([mean(by_head, at) for at in rows])
        writes = [np.stack([relative_change(one.heads, side.heads, at) for at in rows]) for side in (again, other)]
        of_heads = np.concatenate([of_heads, np.stack(writes, axis=1)], axis=1)
        mlps = [np.stack([relative_change(one.mlps, side.mlps, at) for at in rows]) for side in (again, other)]
        head_means = of_heads[:, [HEAD_NAMES.index(name) for name in LAYER_NAMES[:5]]].mean(-1)
        found["heads"].append(of_heads)
        of_layer = [head_means, np.stack([mean(by_layer, at) for at in rows]), np.stack(mlps, axis=1)]
        found["layers"].append(np.concatenate(of_layer, axis=1))
        found["outputs"].append(np.stack([mean(by_token, at) for at in rows]))
        found["pooled"].append(np.stack([[mean(side.residual.swapaxes(0, 1), at) for at in rows] for side in (one, other)]))
    return Truth(*(np.stack(found[name]) for name in ("heads", "layers", "outputs", "pooled")))


@dataclass(frozen=True)
class Spread:
    """Statistics over documents of each column."""

    mean: np.ndarray
    se: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


def spread(values: np.ndarray) -> Spread:
    """Return mean, standard error, 95 % interval and p of every column (document, column), NaN left out; no interval and p of fewer than six."""
    found = np.full((5, values.shape[1]), np.nan)
    absent = np.isnan(values)
    for pattern in np.unique(absent, axis=1).T:
        columns = (absent == pattern[:, None]).all(0)
        kept = values[~pattern][:, columns]
        n = len(kept)
        average = sum(kept) / n
        found[:2, columns] = average, (sum((kept - average) ** 2) / (n - 1) / n) ** 0.5
        if n >= 6:
            found[2:, columns] = mean_test(kept)
    return Spread(*found)


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Adjust p values by the definition: the smallest α at which each would be rejected."""
    m = len(p)
    ordered = sorted(p)
    return [min(min(1.0, m * ordered[k] / (k + 1)) for k in range(m) if ordered[k] >= value) for value in p]
