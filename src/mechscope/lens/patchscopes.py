"""Patchscopes: let a model say in its own words what a hidden state holds.

A hidden state of a source text is put in the place of one in an inspection prompt, and the model goes on from there (Ghandeharioun et al. 2024,
"Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language Models", section 3: source (S, i, M, l), target (T, i*, f, M*, l*)).
The logit lens is the special case in which nothing is computed after the patch. With the identity prompt (section 4.1) the model is prompted to repeat the
token that stands at the patched place. The inspecting model may be another one: what does the tuned model read in the base's states?

The patch acts once, while the prompt is read; what is generated sees it through the cache, as it would see any token of its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.data.prompt import pad_id
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument import Edit, Walk, intervene, unembed
from mechscope.instrument.decoding import continuations
from mechscope.settings.decoding import Decoding
from mechscope.subject import Subject

IDENTITY = "cat -> cat; 1135 -> 1135; hello -> hello; ?"
# takes a source layer and hidden states of that layer to the inspecting model's states
Map = Callable[[int, Float[Tensor, "... d_source"]], Float[Tensor, "... d_inspection"]]


def identity_prompt(subject: Subject) -> tuple[int, ...]:
    """Return the paper's token identity prompt, whose last token is the one to be patched.

    Raises:
        SettingsError: The model has no tokenizer.
    """
    if subject.tokenizer is None:
        raise SettingsError(f"model {subject.source!r} has no tokenizer to write the identity prompt with: give inspection_ids")
    return tuple(int(token) for token in subject.tokenizer(IDENTITY)["input_ids"])


@torch.no_grad()
def patchscope(
    source: Subject,
    source_ids: Sequence[int],
    inspection: Subject | None = None,
    inspection_ids: Sequence[int] | None = None,
    *,
    layers: Sequence[int] | None = None,
    position: int = -1,
    target_position: int = -1,
    target_layer: int | None = None,
    k: int = 5,
    generate: int = 0,
    mapping: Map | None = None,
) -> pd.DataFrame:
    """Put hidden states of a text into an inspection prompt and read what the model goes on with.

    Args:
        source: The model whose states are inspected.
        source_ids: Tokens of the text.
        inspection: The model whose prompt is patched; the same one by default.
        inspection_ids: Tokens of its prompt; by default `identity_prompt`.
        layers: Source layers: the residual stream behind these blocks; all by default.
        position: Token of the text whose state is taken; negative ones count from the end.
        target_position: Token of the prompt whose state is replaced.
        target_layer: Behind which block it is replaced; by default the block of the same number.
        k: How many next tokens of the prompt are listed.
        generate: How many tokens are generated, greedily.
        mapping: Takes states to the inspecting model's, given the source layer; needed where the widths differ.

    Returns:
        One row per source layer: `source_layer`, `target_layer`, `top_ids`, `top_tokens`, `probabilities` (tuples of k, likeliest first),
        `generated_ids`, `generated` (text; both empty if nothing was to be generated). Tokens are spelled by the inspecting model's tokenizer, or
        as numbers (`#123`) without one.

    Raises:
        SettingsError: A layer or position does not exist, or the prompt leaves no room for what is to be generated.
        DataError: A text is empty, too long, or holds tokens outside the vocabulary.
        ModelError: The models are of different width and no mapping is given, or it gives another width.
    """
    inspection = source if inspection is None else inspection
    text, prompt, chosen, targets, at, place = _checked(
        source, source_ids, inspection, inspection_ids, layers, position, target_position, target_layer, k, generate
    )
    states = _states(source, text, chosen, at)
    if mapping is not None:
        states = [mapping(layer, state) for layer, state in zip(chosen, states, strict=True)]
    for state in states:
        if state.shape != (inspection.anatomy.d_model,):
            raise ModelError(
                f"a hidden state of {source.source!r} has shape {tuple(state.shape)}, {inspection.source!r} has width {inspection.anatomy.d_model}: "
                "give a mapping between them"
            )
    rows = prompt.repeat(len(states), 1)
    with _patched(inspection, states, targets, place):
        last = Walk(inspection, rows).run()[:, -1]
    top = unembed(inspection, last).softmax(-1).topk(k)
    continued = _continued(inspection, rows, states, targets, place, generate) if generate else [()] * len(states)
    spelling = inspection.spelling
    table = []
    for row, (layer, target) in enumerate(zip(chosen, targets, strict=True)):
        ids = tuple(top.indices[row].tolist())
        entry: dict[str, Any] = {"source_layer": layer, "target_layer": target, "top_ids": ids, "top_tokens": tuple(spelling.tokens(ids))}
        entry |= {"probabilities": tuple(top.values[row].tolist()), "generated_ids": continued[row]}
        table.append({**entry, "generated": spelling.text(continued[row])})
    return pd.DataFrame(table)


def check_patchscope(
    source: Subject,
    source_ids: Sequence[int],
    inspection: Subject | None = None,
    inspection_ids: Sequence[int] | None = None,
    *,
    layers: Sequence[int] | None = None,
    position: int = -1,
    target_position: int = -1,
    target_layer: int | None = None,
    k: int = 5,
    generate: int = 0,
) -> None:
    """Refuse what `patchscope` would refuse, without a run of the models; models of different width too, as there is no mapping.

    Raises:
        MechscopeError: A layer, position or token does not exist, a text is empty or too long, or the models' widths differ.
    """
    inspection = source if inspection is None else inspection
    _checked(source, source_ids, inspection, inspection_ids, layers, position, target_position, target_layer, k, generate)
    if source.anatomy.d_model != inspection.anatomy.d_model:
        raise ModelError(
            f"hidden states of {source.source!r} have width {source.anatomy.d_model}, those of {inspection.source!r} {inspection.anatomy.d_model}: "
            "inspect with a model of the same width"
        )


def _checked(
    source: Subject,
    source_ids: Sequence[int],
    inspection: Subject,
    inspection_ids: Sequence[int] | None,
    layers: Sequence[int] | None,
    position: int,
    target_position: int,
    target_layer: int | None,
    k: int,
    generate: int,
) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"], Sequence[int], list[int], int, int]:
    """Return the text, the prompt, source and target layers, and the places in text and prompt."""
    prompt = _tokens(inspection, identity_prompt(inspection) if inspection_ids is None else inspection_ids, "inspection prompt")
    text = _tokens(source, source_ids, "source text")
    chosen = range(source.anatomy.n_layers) if layers is None else layers
    targets = [layer if target_layer is None else target_layer for layer in chosen]
    _check(source, inspection, chosen, targets, k, generate, len(prompt))
    at, place = _position(position, len(text), "source text"), _position(target_position, len(prompt), "inspection prompt")
    return text, prompt, chosen, targets, at, place


def _states(subject: Subject, text: Int[Tensor, " token"], layers: Sequence[int], at: int) -> list[Float[Tensor, " d_model"]]:
    """Return one token's residual stream behind some blocks."""
    walk, states = Walk(subject, text[None]), {}
    hidden = walk.hidden
    for layer in range(max(layers) + 1):
        hidden = walk.step(layer, hidden)
        states[layer] = hidden[0, at]
    return [states[layer] for layer in layers]


def _patched(subject: Subject, states: Sequence[Tensor], layers: Sequence[int], place: int) -> AbstractContextManager[None]:
    """Replace a token's state in the next pass, in every row by its own and behind its own block; later passes are left alone."""
    pairs = enumerate(zip(states, layers, strict=True))
    return intervene(subject, *(Edit("residual", layer, _Once(state, place), rows=[row]) for row, (state, layer) in pairs))


class _Once:
    """The value of an edit that acts in the first pass only: those that follow, while text is generated, hold other tokens."""

    def __init__(self, state: Float[Tensor, " d_model"], place: int) -> None:
        self.state, self.place, self.done = state, place, False

    def __call__(self, part: Float[Tensor, "1 token d_model"]) -> Float[Tensor, "1 token d_model"]:
        if self.done:
            return part
        self.done = True
        changed = part.clone()
        changed[:, self.place] = self.state.to(part)
        return changed


def _continued(
    subject: Subject, rows: Int[Tensor, "row token"], states: Sequence[Tensor], layers: Sequence[int], place: int, new: int
) -> list[tuple[int, ...]]:
    """Generate greedily from the patched prompt; a row ends with its end token."""
    tokenizer = subject.tokenizer
    pad, end = (0, None) if tokenizer is None else (pad_id(tokenizer), tokenizer.eos_token_id)
    with _patched(subject, states, layers, place):
        return continuations(subject.plain, rows, decoding=Decoding(max_new_tokens=new), pad=pad, ends=[end])


def _tokens(subject: Subject, ids: Sequence[int], what: str) -> Int[Tensor, " token"]:
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    if tokens.ndim != 1 or not len(tokens):
        raise DataError(f"the {what} has shape {tuple(tokens.shape)}: give the token ids of one text, at least one")
    if len(tokens) > subject.anatomy.max_positions:
        raise DataError(f"the {what} has {len(tokens):,} tokens, the model reads {subject.anatomy.max_positions:,}: shorten it")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < subject.anatomy.vocab_size:
        raise DataError(
            f"the {what} holds a token outside the vocabulary of {subject.anatomy.vocab_size:,}: was it made with another tokenizer?"
        )
    return tokens.to(subject.device)


def _position(position: int, length: int, what: str) -> int:
    if not -length <= position < length:
        raise SettingsError(f"position {position} lies outside the {what}, which has {length} tokens")
    return position % length


def _check(source: Subject, inspection: Subject, layers: Sequence[int], targets: Sequence[int], k: int, generate: int, length: int) -> None:
    if not len(layers):
        raise SettingsError("no layer was given whose state is to be inspected: name at least one")
    for subject, wanted in ((source, layers), (inspection, targets)):
        for layer in wanted:
            if not 0 <= layer < subject.anatomy.n_layers:
                raise SettingsError(f"layer {layer} does not exist: {subject.source!r} has layers 0-{subject.anatomy.n_layers - 1}")
    if not 1 <= k <= inspection.anatomy.vocab_size:
        raise SettingsError(f"k is {k}: list at least 1 and at most the vocabulary's {inspection.anatomy.vocab_size:,} tokens")
    if generate < 0 or length + generate > inspection.anatomy.max_positions:
        raise SettingsError(
            f"generate is {generate}: after a prompt of {length} tokens there is room for 0 to {inspection.anatomy.max_positions - length:,}"
        )
