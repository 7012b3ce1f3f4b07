"""One prompt's run with its attention patterns and the scales of its norms held: what is left is linear in what is added to the residual stream.

    z = P v,  v = W_V (gain ⊙ (x − centre) · scale) + b        P and scale as they were in this run

So a direction that is read anywhere can be carried back to every earlier place by products with weights alone: W_O, Pᵀ, W_V and the scales (Ameisen et al.
2025, "Circuit Tracing", §3.1; Elhage et al. 2021). Queries and keys take no part: why a head looks where it looks is not explained. Nothing is differentiated
by autograd, and no copy of the prompt is run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import ModelError, SettingsError
from mechscope.instrument import AttentionCall, Walk, observed, pattern, record
from mechscope.instrument.kernels import statistics_dtype
from mechscope.instrument.norms import Norm
from mechscope.instrument.readout import Readout
from mechscope.instrument.wiring import Wiring
from mechscope.subject import Subject

# by how much what a model computed may differ, as a share of the largest value: RMS norms compute in float32 whatever the type
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
Above = Float[Tensor, "token target d_model"]


class FrozenRun:
    """A prompt's run, and the linear maps that are left when patterns and scales are held.

    Attributes:
        subject: The model.
        ids: The prompt.
        dtype: What is computed in: float64 for such models, else float32.
        embedding: ``(token, d_model)``: what the first block reads.
        mlp_inputs: ``(layer, token, d_model)``: what each MLP reads, behind its norm.
        mlp_outputs: ``(layer, token, d_model)``: what each MLP adds, behind a norm where the family has one there.
        last: ``(d_model)``: the last residual stream of the last token.
        parallel: Whether MLPs read what their block reads, without its heads.
        readout: How logits are read.
    """

    @torch.no_grad()
    def __init__(self, subject: Subject, ids: Sequence[int]) -> None:
        """Run a prompt.

        Raises:
            ModelError: The model's parts are not put together in a way that is known here, or what attention adds is not linear in what it reads when its
                pattern is held.
            SettingsError: The prompt is empty or too long.
        """
        if not 1 <= len(ids) <= subject.anatomy.max_positions:
            raise SettingsError(f"the prompt has {len(ids)} tokens: {subject.source!r} reads 1 to {subject.anatomy.max_positions:,}")
        subject.anatomy.require_all_attending("an attribution graph")
        self.subject, self.ids, self.dtype = subject, tuple(map(int, ids)), statistics_dtype(subject.dtype)
        self._wiring, self.readout = Wiring(subject), Readout.of(subject)
        self.parallel = self._wiring.parallel
        calls: dict[int, AttentionCall] = {}

        def tap(call: AttentionCall) -> None:
            calls[call.layer] = call

        with observed(subject, tap), record(subject, "residual", "mlp_input", "mlp_output", "attention_output") as seen:
            walk = Walk(subject, torch.tensor([self.ids], device=subject.device))
            walk.run()
        layers = range(subject.anatomy.n_layers)
        self.embedding = self._here(walk.hidden)
        streams = [self.embedding, *(self._here(seen["residual", layer]) for layer in layers)]
        self.last = streams[-1][-1]
        self.mlp_inputs = torch.stack([self._here(seen["mlp_input", layer]) for layer in layers])
        self.mlp_outputs = torch.stack([self._here(seen["mlp_output", layer]) for layer in layers])
        written = [self._here(seen["attention_output", layer]) for layer in layers]
        self._patterns = [pattern(calls[layer])[0].to(self.embedding) for layer in layers]
        self._read_scales = [_scale(self._wiring.attention_norm(layer), streams[layer]) for layer in layers]
        self._written_scales = [self._scale_of_written(layer, calls[layer].z) for layer in layers]
        middle = [stream if self.parallel else stream + own for stream, own in zip(streams, written, strict=False)]
        self._mlp_scales = [_scale(self._wiring.mlp_norm(layer), middle[layer]) for layer in layers]
        self._constants = [self._constant(layer) for layer in layers]
        for layer in layers:
            self._require_linear(layer, streams[layer], written[layer], middle[layer])

    def __repr__(self) -> str:
        return f"FrozenRun({len(self.ids)} tokens of {self.subject.source!r})"

    def _here(self, value: Tensor) -> Tensor:
        """Bring one text's values of one layer to the model's first device, in the type that is computed in."""
        return value.reshape(-1, value.shape[-1]).to(self.subject.device, self.dtype)

    def _scale_of_written(self, layer: int, z: Tensor) -> Float[Tensor, "token 1"] | None:
        scale = self._wiring.written_scale(layer, z)
        return None if scale is None else self._here(scale[..., 0])

    def _heads(self, layer: int) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, "stored d_head d_model"]]:
        """Return W_O and W_V with the gains of their norms, as they turn z into what is written and x̂ into values."""
        writer = self._wiring.writer(layer)[0].to(self.embedding)
        return writer, self._wiring.folded(layer, "value").to(self.embedding)

    def _constant(self, layer: int) -> Float[Tensor, "token d_model"]:
        """Return what a layer's attention adds whatever it reads: biases and the shift of its norm, as far as a row of a pattern sums to one."""
        writer, bias = self._wiring.writer(layer)
        value = self._wiring.constant(layer, "value")
        total = self.embedding.new_zeros(len(self.ids), self.embedding.shape[1])
        if value is not None:
            of_heads = value.to(self.embedding).repeat_interleave(self._wiring.group, dim=0)
            # learned sinks take a part of a row
            whole = torch.einsum("ht,he,hed->td", self._patterns[layer].sum(-1), of_heads, writer.to(self.embedding))
            scale = self._written_scales[layer]
            total = total + (whole if scale is None else whole * scale)
        return total if bias is None else total + bias.to(total)

    def _require_linear(self, layer: int, stream: Tensor, written: Tensor, middle: Tensor) -> None:
        """Refuse models of which the linear maps do not give what attention added and what the MLP read."""
        tolerance = _TOLERANCE[self.dtype] if self.subject.dtype in _TOLERANCE else 5e-2
        norm, scale = self._wiring.mlp_norm(layer), self._mlp_scales[layer]
        read = middle if norm is None or scale is None else _centred(norm, middle) * scale * norm.gain.to(middle)
        if norm is not None and norm.shift is not None:
            read = read + norm.shift.to(read)
        made = {"attention": (self._attended(layer, stream), written), "the MLP's norm": (read, self.mlp_inputs[layer])}
        for name, (own, models) in made.items():
            if not torch.allclose(own, models, rtol=tolerance, atol=tolerance * float(models.abs().max())):
                raise ModelError(
                    f"{self.subject.family}: {name} of block {layer} is not linear in what it reads when patterns and scales are held: no attribution graph "
                    "can be made of it"
                )

    def _attended(self, layer: int, stream: Tensor) -> Float[Tensor, "token d_model"]:
        writer, value = self._heads(layer)
        scale, written = self._read_scales[layer], self._written_scales[layer]
        # the centring of the norm is part of the folded weights
        v = torch.einsum("td,ked->kte", stream if scale is None else stream * scale, value).repeat_interleave(self._wiring.group, dim=0)
        out = torch.einsum("hte,hed->td", self._patterns[layer] @ v, writer)
        return (out if written is None else out * written) + self._constants[layer]

    def constant(self, layer: int) -> Float[Tensor, "token d_model"]:
        """Return what a layer's attention adds whatever it reads: its biases, and the shift of the norm before it."""
        return self._constants[layer]

    def shift(self, layer: int) -> Float[Tensor, " d_model"]:
        """Return what a layer's MLP reads where its norm's input is zero: the norm's shift."""
        norm = self._wiring.mlp_norm(layer)
        return torch.zeros_like(self.last) if norm is None or norm.shift is None else norm.shift.to(self.last)

    def through_mlp_norm(self, layer: int, above: Above, tokens: slice | Tensor = slice(None)) -> Above:
        """Carry directions at what a layer's MLP reads to the residual stream.

        Args:
            layer: Which.
            above: The directions, for tokens from the first on, or for those of `tokens`.
            tokens: Their tokens.
        """
        norm, scale = self._wiring.mlp_norm(layer), self._mlp_scales[layer]
        if norm is None or scale is None:
            return above
        at = scale[tokens]
        return _centred(norm, above * norm.gain.to(above)) * (at[: len(above), None] if above.ndim == 3 else at)

    def through_attention(self, layer: int, above: Above) -> Above:
        """Carry directions at what a layer's attention adds to what its block reads, for the first tokens of the prompt."""
        (tokens, targets, _), (writer, value) = above.shape, self._heads(layer)
        scale, written = self._read_scales[layer], self._written_scales[layer]
        heads, d_head, _ = writer.shape
        if written is not None:
            above = above * written[:tokens, None]
        at_z = (above.flatten(0, 1) @ writer.flatten(0, 1).T).view(tokens, targets, heads, d_head)
        at_v = self._patterns[layer][:, :tokens, :tokens].transpose(1, 2) @ at_z.permute(2, 0, 1, 3).reshape(heads, tokens, -1)
        # query heads that share values add up
        at_v = at_v.view(-1, self._wiring.group, tokens, targets, d_head).sum(1).permute(1, 2, 0, 3)
        below = at_v.reshape(tokens * targets, -1) @ value.flatten(0, 1)
        below = below.view(tokens, targets, -1)
        return below if scale is None else below * scale[:tokens, None]


def _scale(norm: Norm | None, read: Tensor) -> Float[Tensor, "token 1"] | None:
    return None if norm is None else norm.normalised(read)[1]


def _centred(norm: Norm, x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) if norm.centred else x
