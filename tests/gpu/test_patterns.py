"""Attention statistics on CUDA, by its memory-efficient kernel, equal those on the CPU.

Tolerances: both compute in float32 whatever the type of queries and keys, so 1e-4 of the largest value for bfloat16 inputs too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mechscope.instrument import AttentionCall, attend, compare, describe, pattern
from mechscope.instrument.padding import Padding
from tests.devices import assert_same

TOLERANCE = 1e-4
MEASURES = ("entropy", "relative_entropy", "distance", "sink")
LENGTHS = (37, 29, 5)


def made(d_head: int, *, kv_heads: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> AttentionCall:
    """Return a call of 4 heads over three texts of 37 tokens, as long as the longest."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(heads: int) -> Tensor:
        return torch.randn(len(LENGTHS), heads, LENGTHS[0], d_head, generator=generator).to(dtype)

    query, key, value = drawn(4), drawn(kv_heads), drawn(kv_heads)
    z = torch.zeros(len(LENGTHS), LENGTHS[0], 4, d_head, dtype=dtype)
    return AttentionCall(**{"layer": 0, "query": query, "key": key, "value": value, "z": z, "scaling": d_head**-0.5, **more})


def on(device: torch.device, call: AttentionCall) -> AttentionCall:
    moved: dict[str, Any] = {name: value.to(device) for name, value in vars(call).items() if isinstance(value, Tensor)}
    return replace(call, **moved)


def padded(side: Literal["left", "right"]) -> Tensor:
    real = torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]
    return real if side == "right" else real.flip(1)


def masked(real: Tensor, window: int | None = None) -> Tensor:
    """Return the mask that a padded, causal layer is given."""
    places = torch.arange(real.shape[1])
    seen = places[:, None] >= places
    if window is not None:
        seen = seen & (places[:, None] - places < window)
    return (seen & real[:, None, :] & real[:, :, None])[:, None]


def check(found: Any, expected: Any, real: Tensor | None) -> None:
    for name in (*MEASURES, "gini"):
        one, other = getattr(found, name), getattr(expected, name)
        if other is not None:
            assert one.device.type == "cuda"
            one, other = one.cpu(), other
            rows = torch.ones_like(other, dtype=torch.bool) if real is None else real[:, None].expand_as(other)
            assert_same(one[rows], other[rows], tolerance=TOLERANCE, where=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("d_head", [64, 128])
def test_fused_statistics(device: torch.device, d_head: int, kv_heads: int, dtype: torch.dtype) -> None:
    call = made(d_head, kv_heads=kv_heads, dtype=dtype)
    check(describe(on(device, call), method="fused"), describe(call, method="exact"), None)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("d_head", [64, 128])
def test_fused_statistics_of_padded_texts(device: torch.device, d_head: int, side: Literal["left", "right"]) -> None:
    real = padded(side)
    call = made(d_head, mask=masked(real))
    check(describe(on(device, call), real.to(device), method="fused"), describe(call, real, method="exact"), real)
    placed = Padding.of(real)
    check(describe(on(device, call), placed), describe(call, placed), real)


def test_width_that_is_no_multiple_of_eight(device: torch.device) -> None:
    call = made(20, kv_heads=4)
    check(describe(on(device, call), method="fused"), describe(call, method="exact"), None)


@pytest.mark.parametrize("more", [{"softcap": 5.0}, {"window": 7}], ids=["soft cap", "window"])
def test_exact_statistics(device: torch.device, more: dict[str, Any]) -> None:
    real = padded("left")
    call = made(64, mask=masked(real, more.get("window")), **more)
    check(describe(on(device, call), real.to(device), gini=True), describe(call, real, gini=True), real)
    assert_same(pattern(on(device, call)), pattern(call), tolerance=TOLERANCE)


def test_what_heads_compute_under_a_soft_cap(device: torch.device) -> None:
    call = made(64, softcap=5.0)
    assert_same(attend(on(device, call)), attend(call), tolerance=TOLERANCE)


def test_float64_takes_the_exact_path_as_the_kernel_has_none(device: torch.device) -> None:
    call = made(64, dtype=torch.float64)
    check(describe(on(device, call)), describe(call, method="exact"), None)
    with pytest.raises(ValueError, match="float64 on CUDA"):
        describe(on(device, call), method="fused")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_between_two_patterns(device: torch.device, dtype: torch.dtype) -> None:
    real = padded("left")
    base, tuned = (made(64, dtype=dtype, seed=seed, mask=masked(real)) for seed in (0, 1))
    found, expected = compare(on(device, base), on(device, tuned), real.to(device)), compare(base, tuned, real, method="exact")
    check(found.base, expected.base, real)
    rows = real[:, None].expand(-1, 4, -1)
    for name in ("kl_base_tuned", "kl_tuned_base"):
        assert_same(getattr(found, name).cpu()[rows], getattr(expected, name)[rows], tolerance=TOLERANCE, where=name)
