"""Norms are recognised by what they do, and their derivative is the one autograd finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mechscope.errors import ModelError
from mechscope.instrument.norms import Norm, recognised


def norms() -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(3)
    found: dict[str, nn.Module] = {
        "LayerNorm": nn.LayerNorm(16, eps=1e-5),
        "LayerNorm without bias": nn.LayerNorm(16, eps=1e-3, bias=False),
        "Llama": LlamaRMSNorm(16, eps=1e-6),
        "Gemma": Gemma2RMSNorm(16, eps=1e-6),
    }
    for module in found.values():
        for parameter in module.parameters():
            parameter.data += 0.5 * torch.randn(16, generator=generator)
        module.double()
    return found


@pytest.mark.parametrize("kind", norms())
def test_a_norm_is_recognised_by_what_it_does(kind: str) -> None:
    found = recognised("some family", norms()[kind])
    assert (found.centred, found.offset) == (kind.startswith("LayerNorm"), float(kind == "Gemma"))


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("kind", norms())
def test_the_gradient_through_a_norm_is_the_one_autograd_finds(kind: str, size: float, shift: float) -> None:
    module = norms()[kind]
    norm = recognised("some family", module)
    generator = torch.Generator().manual_seed(0)
    x = (size * (torch.randn(5, 16, dtype=torch.float64, generator=generator) + shift)).requires_grad_()
    above = torch.randn(5, 16, dtype=torch.float64, generator=generator)
    written = module(x)
    (expected,) = torch.autograd.grad(written, x, above.to(written.dtype))
    # RMS norms go through float32 inside transformers
    allowed = (1e-9 if norm.centred else 2e-6) * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(norm.pulled_back(x.detach(), above), expected, rtol=0, atol=allowed)
    assert torch.count_nonzero(expected) == expected.numel()
    if not norm.centred:  # the same formula in float64 throughout
        again = norm.normalised(x)[0] * norm.gain
        (exact,) = torch.autograd.grad(again, x, above)
        torch.testing.assert_close(norm.pulled_back(x.detach(), above), exact, rtol=1e-9, atol=0)


def test_a_norm_that_computes_something_else_is_refused_by_name() -> None:
    class HalfNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 0.5 * super().forward(hidden_states)

    for module in (HalfNorm(8), nn.Linear(8, 8)):
        with pytest.raises(ModelError, match=f"some family: {type(module).__name__} is neither a LayerNorm nor an RMS norm"):
            recognised("some family", module)


class Bare(nn.Module):
    """A LayerNorm as OLMo has it: no weight, and its eps in the code."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.layer_norm(hidden, (hidden.shape[-1],), None, None, eps=1e-5)


@pytest.mark.parametrize("module", [nn.LayerNorm(8, elementwise_affine=False), Bare()])
def test_a_norm_without_a_weight_has_a_gain_of_one_and_needs_to_be_told_its_width(module: nn.Module) -> None:
    like = torch.zeros(8, dtype=torch.float64)
    norm = recognised("some family", module, like)
    assert (norm.centred, norm.eps) == (True, 1e-5)
    assert torch.equal(norm.gain, torch.ones_like(like))
    small = 1e-2 * torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(norm.normalised(small)[0], module(small), rtol=1e-9, atol=1e-9)
    with pytest.raises(ModelError, match="has no weight, so its width is not known"):
        recognised("some family", module)


def test_the_gain_of_a_norm_is_read_when_it_is_asked_for() -> None:
    module = nn.LayerNorm(4)
    norm = Norm(module, centred=True, eps=module.eps, offset=0.0, ones=torch.ones(4))
    before = norm.gain.clone()
    module.weight.data *= 2
    assert torch.equal(norm.gain, 2 * before)


@pytest.mark.parametrize("size", [8, 512])
def test_norms_of_half_precision_are_recognised(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    module = nn.LayerNorm(size).to(torch.bfloat16)
    with torch.no_grad():
        # a trained model's gains: from a tenth to ten, with biases
        module.weight.copy_(torch.logspace(-1, 1, size))
        module.bias.copy_(torch.randn(size, generator=generator))
    assert recognised("some family", module).centred
