"""Trust is tested at load (idea 9 of the design).

A tiny probe runs through the model and every assumption of the instrument is checked on it: that observing changes nothing, that the blocks can
be walked one by one, that the heads' slices of the weights are where the anatomy says, that what the parts write adds up. What fails is
reported by name, with what still works.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mechscope.errors import ModelError
from mechscope.instrument.attention import AttentionCall, observed
from mechscope.instrument.patterns import describe, learned_sink, pattern
from mechscope.instrument.record import Recording, record
from mechscope.instrument.walk import Walk, model_inputs
from mechscope.subject import load as loading
from mechscope.subject.load import Subject
from mechscope.subject.pair import Pair, pair
from mechscope.subject.placement import fetched

log = logging.getLogger(__name__)

_ADDS = "the parts add up to the residual stream"
_HEADS_WRITE = "the heads' outputs and W_O give the attention output"
# rounding of one forward pass relative to the size of the values compared; some families take their own softmax in float32 whatever the type
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# of mixers that compute in float32 whatever the type (linear attention inverts matrices in it)
_RECURRENT = 1e-5


@dataclass(frozen=True)
class Check:
    """One assumption, tested on the model.

    Attributes:
        name: What was tested.
        passed: Whether it holds.
        error: Largest deviation found, relative to the size of the values.
        tolerance: What was allowed.
        needed_for: What does not work without it.
        required: Whether the model is refused without it.
    """

    name: str
    passed: bool
    error: float
    tolerance: float
    needed_for: str
    required: bool


def load(source: str | Path | nn.Module, *, check: bool = True, **options: Any) -> Subject:
    """Load a model to study and test it; options as in `mechscope.subject.load.load`.

    Raises:
        ModelError: It cannot be loaded, or a check fails that everything rests on.
    """
    subject = loading.load(source, **options)
    if not check:
        return subject
    checks = check_subject(subject)
    failed = [item for item in checks if not item.passed]
    for item in failed:
        log.warning(
            "%s: check %r failed (off by %.1e, allowed %.1e): %s %s",
            _named(subject) if isinstance(source, nn.Module) else source,
            item.name,
            item.error,
            item.tolerance,
            item.needed_for,
            "are refused" if item.name == _HEADS_WRITE else "will not be right",
            extra={"weakens": ""},
        )
    if required := [item for item in failed if item.required]:
        names = "; ".join(f"{item.name} (off by {item.error:.1e}, allowed {item.tolerance:.1e})" for item in required)
        raise ModelError(
            f"model {subject.source!r} ({subject.family}) is not measured rightly by mechscope: {names}. "
            "`mechscope inspect` shows every check; load(…, check=False) loads it all the same, to investigate"
        )
    holds = {item.name: item.passed for item in checks}
    # what was not tested is taken to hold
    return replace(subject, adds=holds.get(_ADDS, True), heads_write=holds.get(_HEADS_WRITE, True))


def _named(subject: Subject) -> str:
    size = subject.anatomy
    return f"{type(subject.plain).__name__} of {size.n_layers} layers × {size.n_heads} heads, width {size.d_model}"


def load_pair(base: str | Path, tuned: str | Path, *, resize: Literal["refuse", "truncate"] = "refuse", **options: Any) -> Pair:
    """Load a base model and its tuned version, test both, and check that they can be compared.

    An adapter is put on the base that is given, and the base is the same weights with the adapter disabled: one model in memory. Where putting it on
    has changed the base's weights (trained biases or embeddings, PiSSA, OLoRA), the base is loaded apart.

    Args:
        base: Hub id or directory of the pre-trained model.
        tuned: Hub id or directory of the fine-tuned model or PEFT adapter.
        resize: What to do with vocabularies of different size; see `mechscope.subject.pair`.
        options: What `load` takes besides: `tokenizer`, `dtype`, `device`, `device_map`, `unsafe`, `check`.

    Raises:
        ModelError: One cannot be loaded, fails a check, or does not belong to the other.
    """
    if loading.is_adapter(tuned) and not loading.is_adapter(base):
        adapted = load(tuned, base=base, **options)
        if adapted.displaced:
            log.info(
                "putting adapter %s on changed %d weights of its base (%s, …): the base is loaded apart",
                tuned,
                len(adapted.displaced),
                adapted.displaced[0],
            )
            return pair(load(base, **options), adapted, resize=resize)
        return pair(replace(adapted.without_adapter(), source=str(base)), adapted, resize=resize)
    return pair(load(base, **options), load(tuned, **options), resize=resize)


@torch.no_grad()
def check_subject(subject: Subject) -> tuple[Check, ...]:
    """Run the probe and return every check with what it found."""
    tolerance = _TOLERANCE[subject.dtype]
    if subject.anatomy.mixing:
        tolerance = max(tolerance, _RECURRENT)
    ids, real = _probe(subject)
    inputs = {**model_inputs(ids, real), "use_cache": False}
    with subject.active():
        # each row by itself and without padding, by the model's own attention: what the padded, observed batch must reproduce
        plain = torch.cat(
            [subject.model(**model_inputs(row[mask][None], None), use_cache=False).logits[0] for row, mask in zip(ids, real, strict=True)]
        )
        calls: list[AttentionCall] = []
        with (
            observed(subject, calls.append),
            record(subject, "embedding", "residual", "z", "attention_output", "mixer_output", "mlp_output") as recording,
        ):
            seen = subject.model(**inputs).logits
        with observed(subject, lambda call: call.z.clone()):
            unchanged = subject.model(**inputs).logits
        after = _behind_padding(subject, ids)
    if len(calls) != len(subject.anatomy.attending):
        raise ModelError(
            f"model {subject.source!r} ({subject.family}): {len(calls)} of {len(subject.anatomy.attending)} layers went through transformers' attention "
            "interface, so attention cannot be observed: this family is not supported"
        )
    _require_sizes(subject, calls[0])
    carried = recording["residual", 0].shape
    if carried != (*ids.shape, subject.anatomy.d_model):
        raise ModelError(
            f"{subject.family}: between its blocks stands {tuple(carried)} instead of one vector for each of {tuple(ids.shape)} tokens, as where several "
            "residual streams run side by side (AltUp): not supported"
        )

    def check(name: str, error: float, needed_for: str, *, required: bool = True, allowed: float = tolerance) -> Check:
        return Check(name, error <= allowed, error, allowed, needed_for, required)

    rounded = subject.dtype.itemsize == 2 and (
        calls[0].sinks is not None or any(block.experts is not None for block in subject.anatomy.blocks)
    )

    def apart(found: Tensor, expected: Tensor) -> float:
        rows = real.sum(1).tolist() if len(found) == int(real.sum()) else [len(found)]
        return _typical_error(found, expected, rows) if rounded else _error(found, expected)

    # the model may have come with another attention implementation, whose rounding differs: hence the tolerance
    checks = [
        check("recording and padding do not change the logits", apart(seen[real], plain), "every measurement"),
        check("a token does not see what follows it", apart(after, seen[0, : after.shape[0]]), "texts of different length in one batch"),
        check("an intervention with the recorded value is a no-op", _error(unchanged, seen, real), "interventions", allowed=0.0),
        check("attention rows sum to one", max(_row_sums(call, real) for call in calls), "attention statistics", allowed=1e-5),
        check("fused and exact entropies agree", max(_entropy_error(call, real) for call in calls), "attention statistics", allowed=1e-4),
        check(
            "each head's slice of the weights is where it should be", _slices(subject, calls, ids, real), "weight change and LoRA per head"
        ),
        check(_HEADS_WRITE, _outputs(subject, recording), "head outputs", required=False),
        check(
            _ADDS,
            _decomposition(subject, recording, real),
            "decomposition of the residual stream",
            required=False,
        ),
        check("walking block by block gives the logits", apart(_walked(subject, ids, real), plain), "differences, resuming from a layer"),
    ]
    return tuple(checks)


def _require_sizes(subject: Subject, call: AttentionCall) -> None:
    """Refuse a model whose attention works with other heads than the anatomy found: no check below could compare them."""
    size = subject.anatomy
    expected = ((size.n_heads, size.d_query), (size.n_kv_heads, size.d_query), (size.n_kv_heads, size.d_head))
    sizes = tuple((x.shape[1], x.shape[3]) for x in (call.query, call.key, call.value))
    if sizes != expected:
        raise ModelError(
            f"model {subject.source!r} ({subject.family}): its attention works with (heads, width) {', '.join(map(str, sizes))} for query, key and "
            f"value, its weights were read as {', '.join(map(str, expected))}: this architecture is not supported"
        )


def _probe(subject: Subject) -> tuple[Tensor, Tensor]:
    """Make two rows of tokens spread over the vocabulary, the second one padded on the left."""
    length = min(12, subject.anatomy.max_positions)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, subject.anatomy.vocab_size, (2, length), generator=generator)
    real = torch.ones(2, length, dtype=torch.bool)
    real[1, : length // 3] = False
    return ids.to(subject.device), real.to(subject.device)


@torch.no_grad()
def _behind_padding(subject: Subject, ids: Tensor) -> Tensor:
    """Return the logits of the beginning of the first row with other tokens behind it: padding on the right rests on their not being seen."""
    length = max(1, ids.shape[1] // 2)
    other = ids[:1].clone()
    other[:, length:] = ids[1:, length:].flip(1)
    with observed(subject):
        return subject.model(**model_inputs(other, None), use_cache=False).logits[0, :length]


def _error(values: Tensor, expected: Tensor, real: Tensor | None = None) -> float:
    if real is not None:
        values, expected = values[real.to(values.device)], expected[real.to(expected.device)]
    expected = expected.to(values.device)
    scale = expected.abs().max().clamp(min=1e-9)
    return float(((values - expected).abs().max() / scale).nan_to_num(torch.inf))


def _typical_error(values: Tensor, expected: Tensor, rows: list[int]) -> float:
    """Return the deviation of the median token of the text that deviates most: in half precision a rounding sends single tokens to other experts."""
    expected = expected.to(values.device)
    each = (values - expected).abs().amax(-1).nan_to_num(torch.inf) / expected.abs().max().clamp(min=1e-9)
    return max(float(text.median()) for text in each.split(rows))


def _row_sums(call: AttentionCall, real: Tensor) -> float:
    mass, learned = pattern(call).sum(-1), learned_sink(call)
    rows = (mass if learned is None else mass + learned).transpose(1, 2)[real.to(call.z.device)]
    return float((rows - 1).abs().max().nan_to_num(torch.inf))


def _entropy_error(call: AttentionCall, real: Tensor) -> float:
    rows = real.to(call.z.device)
    auto, exact = (describe(call, rows, method=method).entropy.transpose(1, 2)[rows] for method in ("auto", "exact"))
    return float((auto - exact).abs().max())


def _slices(subject: Subject, calls: list[AttentionCall], ids: Tensor, real: Tensor) -> float:
    """Compare the value (and, up to length, the query and key) of every head with its own slice of the reader's output."""
    outputs: dict[int, Tensor] = {}
    blocks = [subject.anatomy.blocks[layer] for layer in subject.anatomy.attending]
    readers = {reader.module for block in blocks for reader in (block.query, block.key, block.value)}
    handles = [module.register_forward_hook(lambda module, _, output: outputs.__setitem__(id(module), output)) for module in readers]
    try:
        with subject.active(), observed(subject):
            subject.model(**model_inputs(ids, real), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    worst = 0.0
    heads = range(subject.anatomy.n_heads)
    for call, block in zip(calls, blocks, strict=True):
        first = 0  # the first token of the unpadded row has position zero, where rotary embedding turns nothing
        for reader, seen, norms in (
            (block.value, call.value, ()),
            (block.query, call.query, ("q_norm", "q_layernorm", "query_layernorm")),
            (block.key, call.key, ("k_norm", "k_layernorm", "key_layernorm")),
        ):
            seen = seen.repeat_interleave(len(heads) // seen.shape[1], dim=1)
            norm = next((candidate for name in norms if (candidate := getattr(block.attention, name, None)) is not None), None)
            # OLMo 2 normalises all heads together: no slice of its own to compare
            if norm is not None and getattr(norm, "weight", None) is not None and norm.weight.shape != (reader.width,):
                continue
            for head in heads:
                # behind a latent the map runs with one more axis, for heads
                whole = outputs[id(reader.module)].reshape(*ids.shape, -1)
                own = whole[..., reader.features(head).to(seen.device)]
                if not norms:
                    worst = max(worst, _error(own, seen[:, head], real))
                else:
                    own = own[0, first] if norm is None else norm(own[0, first])
                    # behind a latent a key has a second part, which all heads share and rotary embedding turns
                    width = block.key.width
                    # what is nothing but rounding beside other heads and tokens points nowhere: a head made by hand may read no first token
                    there = [_but_rounding(one[:width], of) for one, of in ((own, whole), (seen[0, head, first], seen))]
                    worst = max(worst, _turned(*there))
    return worst


def _but_rounding(vector: Tensor, among: Tensor) -> Tensor:
    """Return a vector, or zero where it is as small as the rounding of the largest number that it stands among."""
    rounding = torch.finfo(vector.dtype).eps * float(among.abs().max()) * len(vector) ** 0.5
    return vector if float(vector.abs().max()) > rounding else torch.zeros_like(vector)


def _turned(own: Tensor, seen: Tensor) -> float:
    """Return how far two vectors point apart, whatever their length; zero beside zero (a pruned head) points nowhere else."""
    if not own.any() or not seen.any():
        return float(bool(own.any()) or bool(seen.any()))
    return 1 - float(torch.cosine_similarity(own, seen, dim=0))


def _outputs(subject: Subject, recording: Recording) -> float:
    worst = 0.0
    for layer in subject.anatomy.attending:
        block = subject.anatomy.blocks[layer]
        z = recording["z", layer].flatten(2)
        with fetched(block.output.module):
            try:
                weight, bias = subject.linear(block.output.module)
            except ModelError:  # an adapter there that no weight can stand for
                return torch.inf
            written = nn.functional.linear(z, weight.to(z.device), None if bias is None else bias.to(z.device))
        if block.attention_write is not block.attention:  # a norm stands between the heads and the residual stream
            with subject.active():
                written = block.attention_write(written)
        worst = max(worst, _error(written * block.multiplier, recording["attention_output", layer]))
    return worst


def _decomposition(subject: Subject, recording: Recording, real: Tensor) -> float:
    total = recording["embedding"]
    for layer in range(subject.anatomy.n_layers):
        total = total + (recording.mixed(layer) + recording["mlp_output", layer]).to(total.device)
    return _error(total, recording["residual", subject.anatomy.n_layers - 1], real)


def _walked(subject: Subject, ids: Tensor, real: Tensor) -> Tensor:
    with observed(subject):
        walk = Walk(subject, ids, real)
        last = walk.run()
        return walk.logits(last[real.to(last.device)])
