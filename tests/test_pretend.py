"""The pretended devices behave as CUDA does: what the other tests rest on."""

from __future__ import annotations

import pytest
import torch

from tests import families
from tests.devices import spread
from tests.pretend import Pretended, pretended, traffic


def test_operands_on_different_devices_are_refused() -> None:
    with pretended():
        one, other = torch.ones(2, 3, device="cuda:0"), torch.ones(2, 3).to("cuda:1")
        assert str(one.device) == "cuda:0"
        assert str((other + other).device) == "cuda:1"
        for wrong in (lambda: one + other, lambda: one + torch.ones(2, 3), lambda: torch.cat([one, other]), lambda: one @ other.T):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                wrong()


def test_a_number_on_the_cpu_joins_any_device() -> None:
    with pretended():
        x = torch.ones(3, device="cuda:1")
        assert (x * torch.tensor(2.0)).cpu().tolist() == [2.0, 2.0, 2.0]
        assert str(torch.where(x > 0, x, torch.tensor(0.0)).device) == "cuda:1"


def test_indices_may_lie_on_the_cpu_but_not_on_another_device() -> None:
    with pretended():
        x = torch.arange(4.0, device="cuda:0")
        assert x[torch.tensor([0, 2])].tolist() == [0.0, 2.0]
        with pytest.raises(RuntimeError, match="same device"):
            x[torch.tensor([0, 2], device="cuda:1")]
        with pytest.raises(RuntimeError, match="same device"):
            torch.arange(4.0)[torch.tensor([0], device="cuda:0")]


def test_what_slices_choose_is_copied_from_any_device_and_what_a_mask_chooses_is_not() -> None:
    with pretended():
        x, other = torch.zeros(4, device="cuda:0"), torch.ones(2, device="cuda:1")
        x[1:3] = other
        assert x.tolist() == [0.0, 1.0, 1.0, 0.0]
        with pytest.raises(RuntimeError, match="same device"):
            x[torch.tensor([0, 1])] = other


def test_numpy_needs_a_copy_on_the_host() -> None:
    with pretended():
        x = torch.ones(2, device="cuda:0")
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            x.numpy()
        assert x.cpu().numpy().tolist() == [1.0, 1.0]


def test_gradients_go_back_over_devices() -> None:
    real = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def function(x: torch.Tensor, second: str) -> torch.Tensor:
        y = (2 * x).to(second).tanh()
        return (y[:, [0, 2]] * y.softmax(-1)[:, 1:3]).sum()

    with pretended():
        x = real.to("cuda:0").requires_grad_()
        (found,) = torch.autograd.grad(function(x, "cuda:1"), [x])
        assert str(found.device) == "cuda:0"
        found = found.cpu()
    leaf = real.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf, "cpu"), [leaf])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_products_at_the_entries_of_compressed_rows_stay_on_their_device() -> None:
    offsets, columns = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
    left, right = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0, 5.0], [1.0, 7.0, 0.0]])
    with pretended():
        pattern = torch.sparse_csr_tensor(
            offsets.to("cuda:1"), columns.to("cuda:1"), torch.zeros(3, device="cuda:1"), (2, 3), check_invariants=True
        )
        found = torch.sparse.sampled_addmm(pattern, left.to("cuda:1"), right.to("cuda:1"), beta=0.0).values()
        assert str(found.device) == "cuda:1"
        # 1 + 2, 1 · 5, and 4 · 7
        assert found.tolist() == [3.0, 5.0, 28.0]
        with pytest.raises(RuntimeError, match="same device"):
            torch.sparse.sampled_addmm(pattern, left.to("cuda:0"), right.to("cuda:1"), beta=0.0)


def test_what_makes_the_host_wait_is_counted() -> None:
    with pretended():
        x = torch.ones(3, device="cuda:0")
        with traffic() as counted:
            y = x.to("cuda:1") * 2
            assert counted.waits == 0
            y.cpu()
            bool((y > 0).all())
            y[y > 0]
            torch.ones(2).to("cuda:0")
            torch.ones(2).to("cuda:0", non_blocking=True)
    assert dict(counted.events) == {"between": 1, "to host": 1, "scalar": 1, "mask": 1, "to device": 1, "sent": 1}
    assert counted.waits == 4


def test_the_efficient_kernel_pads_its_logsumexp_and_knows_no_float64() -> None:
    with pretended():
        x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to("cuda:0")
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse, *_ = kernel(x, x, x, None, True, 0.0, True, scale=1.0)
        assert lse.shape == (1, 2, 32)
        scores = (x @ x.transpose(-1, -2)).masked_fill(torch.ones(5, 5, dtype=torch.bool, device="cuda:0").triu(1), -torch.inf)
        torch.testing.assert_close(lse[..., :5].cpu(), scores.logsumexp(-1).cpu(), rtol=0, atol=1e-5)
        torch.testing.assert_close(out.cpu(), (scores.softmax(-1) @ x).cpu(), rtol=0, atol=1e-5)
        with pytest.raises(RuntimeError, match="no float64"):
            kernel(x.double(), x.double(), x.double(), None, True, 0.0, True, scale=1.0)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_model_over_two_devices_gives_hugging_faces_logits(family: str) -> None:
    texts = families.padded(families.documents(), "left")
    inputs = {"input_ids": texts.ids, "attention_mask": texts.real.long()}
    with torch.no_grad(), pretended():
        model = spread(families.build(family))
        found = model(**{name: value.to("cuda:0") for name, value in inputs.items()}).logits
        assert isinstance(found, Pretended)
        assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:0", "cuda:1"}
        found = found.cpu()
    with torch.no_grad():
        expected = families.build(family)(**inputs).logits
    torch.testing.assert_close(found[texts.real], expected[texts.real], rtol=0, atol=1e-6)


def test_outside_nothing_is_changed() -> None:
    with pretended():
        torch.ones(2, device="cuda:0")
    assert type(torch.ones(2)) is torch.Tensor
    assert str(torch.ones(2).to("cpu").device) == "cpu"
