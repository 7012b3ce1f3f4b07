"""A weight's gradient as what it is made of: one input and one vector–Jacobian product per token.

For a linear map y = x Wᵀ read at tokens i the gradient of a loss is Σ_i x_iᵀ δ_i, with x_i what the map read and δ_i the loss's gradient at what it gave
(Katz et al. 2024, "Backward Lens: Projecting Language Model Gradients into the Vocabulary Space", equation 4). Its rank is at most the number of
tokens, so the factors are kept and the matrix is never formed.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechscope.choices import MatrixKind
from mechscope.data.pairs import PairBatch
from mechscope.errors import SettingsError
from mechscope.instrument import Walk, observed, unembed
from mechscope.instrument.kernels import statistics_dtype
from mechscope.instrument.norms import Norm
from mechscope.instrument.wiring import Wiring
from mechscope.lens.decomposition import norm_behind_mlp
from mechscope.lens.question import ROWS, Question
from mechscope.subject import Subject
from mechscope.subject.linear import oriented_weight

MATRICES: tuple[str, ...] = get_args(MatrixKind)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that reads or writes the residual stream.

    Attributes:
        kind: One of `MATRICES`; gated MLPs have two `mlp_up`, families that store q, k and v apart have three `query_key_value`.
        layer: Which block.
        name: Its module's path in the plain Hugging Face model.
        module: The map (with what an adapter wraps around it).
        writes: Whether it writes the residual stream, so that its δ are the vectors with a meaning there; else its inputs are.
        gain: Of the norm between it and the residual stream, in families that have one (Gemma 2/3).
    """

    kind: str
    layer: int
    name: str
    module: nn.Module
    writes: bool
    gain: Float[Tensor, " d_model"] | None


def matrices_of(subject: Subject, kinds: Collection[str], layers: Collection[int] | None) -> list[Matrix]:
    """List a model's matrices of some kinds, layer by layer.

    Raises:
        SettingsError: A kind or layer does not exist, or there is none.
        ModelError: The model cannot be taken apart.
    """
    for kind in kinds:
        if kind not in MATRICES:
            raise SettingsError(f"matrix {kind!r} is not known: use {', '.join(MATRICES)}")
    chosen = range(subject.anatomy.n_layers) if layers is None else sorted(set(layers))
    for layer in chosen:
        if not 0 <= layer < subject.anatomy.n_layers:
            raise SettingsError(f"layer {layer} does not exist: the model has layers 0-{subject.anatomy.n_layers - 1}")
    if not kinds or not len(chosen):
        raise SettingsError("no matrix was named: give at least one kind and one layer")
    wiring, matrices = Wiring(subject), []
    with subject.active():
        for layer in chosen:
            block = subject.anatomy.blocks[layer]
            names: dict[str, list[tuple[str, Norm | None]]] = {"query_key_value": [], "attention_output": []}
            if block.attends:
                readers = dict.fromkeys(part.name for part in (block.query, block.key, block.value))
                names["query_key_value"] = [(name, None) for name in readers]
                names["attention_output"] = [(block.output.name, wiring.written_norm(layer))]
            if {"mlp_up", "mlp_down"}.intersection(kinds) and block.mlp_down is not None:  # a mixture of experts says that it has none
                names["mlp_up"] = [(name, None) for name in block.mlp_linears[:-1]]
                names["mlp_down"] = [(block.mlp_linears[-1], norm_behind_mlp(subject, layer))]
            for kind in (kind for kind in MATRICES if kind in kinds):
                for name, behind in names[kind]:
                    module = subject.plain.get_submodule(name)
                    gain = None if behind is None else behind.gain
                    if block.multiplier != 1.0 and kind in ("attention_output", "mlp_down"):
                        gain = oriented_weight(module).new_tensor(block.multiplier) if gain is None else gain * block.multiplier
                    matrices.append(Matrix(kind, layer, name, module, kind in ("attention_output", "mlp_down"), gain))
    if not matrices:
        raise SettingsError(
            f"none of layers {', '.join(map(str, chosen))} has the matrices {', '.join(kinds)}: {subject.anatomy.instead(chosen[0])}"
        )
    return matrices


@dataclass(frozen=True)
class Factors:
    """What one matrix's gradients are made of in a batch; each text's own loss, at padding all zero.

    Attributes:
        inputs: ``(batch, token, d_in)``: x.
        gradients: ``(batch, token, d_out)``: δ.
    """

    inputs: Float[Tensor, "batch token d_in"]
    gradients: Float[Tensor, "batch token d_out"]


def factors(subject: Subject, batch: PairBatch, matrices: Collection[Matrix]) -> dict[str, Factors]:
    """Run a batch's clean texts forward and backward, and return every matrix's factors by its name.

    A text's loss is the mean −log p of its target tokens, or of its right answers after the last token if it has no target.

    Raises:
        DataError: A text has neither.
    """
    question = Question.of("target-logit", batch)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with torch.enable_grad(), observed(subject), ExitStack() as stack:
        walk = Walk(subject, batch.clean, batch.real)
        for matrix in matrices:
            hook = _keeper(matrix.name, inputs, outputs)
            stack.callback(matrix.module.register_forward_hook(hook, with_kwargs=True).remove)
        hidden = walk.run(walk.hidden.detach().requires_grad_())
        read = question.reading.take(hidden[None])[0]
        above = _loss_gradient(subject, question, read.detach())
        wanted = [outputs[matrix.name] for matrix in matrices]
        deltas = torch.autograd.grad([read], wanted, [above])

    def by_token(value: Tensor) -> Tensor:  # OPT's MLP may see all tokens of the batch as rows of one matrix
        value = value.detach()
        return value.view(*batch.real.shape, -1) if value.ndim == 2 else value

    real = batch.real[..., None]
    return {
        matrix.name: Factors(by_token(inputs[matrix.name]) * real.to(delta.device), by_token(delta) * real.to(delta.device))
        for matrix, delta in zip(matrices, deltas, strict=True)
    }


def _keeper(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        inputs[name], outputs[name] = args[0] if args else next(iter(kwargs.values())), output

    return hook


def _loss_gradient(subject: Subject, question: Question, read: Float[Tensor, "read d_model"]) -> Float[Tensor, "read d_model"]:
    """Return the losses' gradient at the rows that are read, with the logits of a few rows at a time."""
    of_text = question.reading.example.bincount(minlength=question.texts)[question.reading.example]
    gradients: list[Tensor] = []
    for start in range(0, len(read), ROWS):
        rows = slice(start, start + ROWS)
        leaf = read[rows].requires_grad_()
        logits = unembed(subject, leaf).to(statistics_dtype(leaf.dtype))
        tokens, weights = question.tokens[rows].to(logits.device), question.weights[rows].to(logits)
        losses = logits.logsumexp(-1) - (logits.gather(-1, tokens) * weights).sum(-1)
        gradients += torch.autograd.grad((losses / of_text[rows].to(losses.device)).sum(), [leaf])
    return torch.cat(gradients)
