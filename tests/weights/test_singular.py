"""Singular vectors of circuits are named by the tokens that lie along the dense matrix's vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.errors import ModelError, SettingsError
from mechscope.weights import singular_tokens
from tests import families
from tests.weights import oracle


def named(along: Tensor, k: int) -> str:
    return " ".join(repr(f"#{token}") for token in along.topk(k).indices.tolist())


@pytest.mark.parametrize("family", oracle.FAMILIES)
@pytest.mark.parametrize("matrix", ["ov", "qk"])
def test_vectors_values_and_tokens_are_those_of_the_dense_matrix(family: str, matrix: str) -> None:
    subject = families.subject(family, torch.float64)
    if matrix == "qk" and family == "qwen3":
        with pytest.raises(ModelError, match="qwen3"):
            singular_tokens(subject, matrix="qk")
        return
    table = singular_tokens(subject, matrix="ov" if matrix == "ov" else "qk", heads="a0.h1,a2.h3", n=3, k=4)
    assert len(table) == 2 * 3 * 2 * 2
    first_side, second_side = ("in", "out") if matrix == "ov" else ("query", "key")
    for layer, head in ((0, 1), (2, 3)):
        one = oracle.head(subject.plain, family, layer, head)
        u, values, vh = torch.linalg.svd(one.ov if matrix == "ov" else one.qk)
        read = one.norm.standard(oracle.tokens(subject.plain, family))
        other = oracle.directions(subject.plain, family) if matrix == "ov" else read
        for index in range(3):
            rows = table[(table["layer"] == layer) & (table["index"] == index + 1)].set_index(["side", "sign"])
            assert rows["value"].to_numpy() == pytest.approx(float(values[index]), abs=1e-6)
            first, second = read @ u[:, index], other @ vh[index]
            sign = 1 if second.max() >= -second.min() else -1
            for name, end in (("positive", sign), ("negative", -sign)):
                assert rows.loc[(first_side, name), "tokens"] == named(end * first, 4)
                assert rows.loc[(second_side, name), "tokens"] == named(end * second, 4)


@pytest.mark.parametrize("options", [{"n": 0}, {"k": 0}, {"matrix": "vo"}])
def test_settings_that_do_not_fit_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="ov or qk"):
        singular_tokens(families.subject("gpt2"), **options)
