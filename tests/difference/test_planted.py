"""Changes planted in one kind of weight of one layer: which quantity of the difference sees which.

The table of docs/methods.md is this one. On the models' own streams a change also reaches the layers behind it; on the same input it does not.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.difference import Difference, difference
from mechscope.difference.selection import select
from mechscope.instrument.execution import Execution
from mechscope.studies.groups import Selecting
from tests import families
from tests.difference import oracle

LAYER = 1
# parameters of the changed layer, by what they are; of a Llama-like model, whose maps stand apart
PLANTED = {
    "query": "layers.1.self_attn.q_proj",
    "key": "layers.1.self_attn.k_proj",
    "value": "layers.1.self_attn.v_proj",
    "output": "layers.1.self_attn.o_proj",
    "MLP in": "layers.1.mlp.up_proj",
    "MLP out": "layers.1.mlp.down_proj",
    "norm of attention": "layers.1.input_layernorm",
    "norm of the MLP": "layers.1.post_attention_layernorm",
    "embedding": "embed_tokens",
    "final norm": "model.norm",
}
# where a change is seen: "here" in its own layer alone, "on" from its own layer on, "behind" in the layers behind it only, "all" in every layer, "-" nowhere
ALONE, ON, BEHIND, ALL, NOWHERE = "here", "on", "behind", "all", "-"
EXPECTED = {
    #                     KL      entropy  z       own     same    residual MLP same  MLP own
    "query": (ON, ON, ON, ON, ALONE, ON, NOWHERE, ON),
    "key": (ON, ON, ON, ON, ALONE, ON, NOWHERE, ON),
    "value": (BEHIND, BEHIND, ON, ON, ALONE, ON, NOWHERE, ON),
    "output": (BEHIND, BEHIND, BEHIND, ON, ALONE, ON, NOWHERE, ON),
    "MLP in": (BEHIND, BEHIND, BEHIND, BEHIND, NOWHERE, ON, ALONE, ON),
    "MLP out": (BEHIND, BEHIND, BEHIND, BEHIND, NOWHERE, ON, ALONE, ON),
    "norm of attention": (ON, ON, ON, ON, ALONE, ON, NOWHERE, ON),
    "norm of the MLP": (BEHIND, BEHIND, BEHIND, BEHIND, NOWHERE, ON, ALONE, ON),
    "embedding": (ALL, ALL, ALL, ALL, NOWHERE, ALL, NOWHERE, ALL),
    "final norm": (NOWHERE,) * 8,
}
QUANTITIES = (
    ("heads", "kl_base_tuned"),
    ("heads", "entropy_change"),
    ("heads", "z_cosine_distance"),
    ("heads", "write_change_own"),
    ("heads", "write_change"),
    ("layers", "cosine_distance"),
    ("layers", "mlp_write_change"),
    ("layers", "mlp_write_change_own"),
)
RULES = ("heads_by_write", "heads_by_kl", "heads_by_entropy")
EXECUTION = Execution(tokens_per_batch=10_000)


def planted(only: str, size: float = 0.2, heads: tuple[int, ...] = (), **shape: int) -> tuple[Any, Any]:
    """Return a tiny model and a copy with noise of a share of a matrix's norm on what `only` names; of an output projection, of some heads alone."""
    base = families.build("llama", torch.float64, **shape)
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if only in name and name.endswith("weight"):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            noise *= size * parameter.detach().norm() / noise.norm()
            if heads:
                width = parameter.shape[1] // base.config.num_attention_heads
                kept = torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])
                noise = torch.zeros_like(noise).index_copy(1, kept, noise[:, kept])
            with torch.no_grad():
                parameter.add_(noise)
    return base, model


@lru_cache
def found(kind: str) -> Difference:
    return difference(oracle.two(*planted(PLANTED[kind])), oracle.encoded(), replicates=2, execution=EXECUTION)


def by_layer(result: Difference, table: str, quantity: str) -> np.ndarray:
    """Return a quantity of every layer, the mean over its heads of absolute values."""
    rows = getattr(result, table)
    rows = rows[rows["rows"] == "all"]
    return rows[quantity].abs().groupby(rows["layer"]).mean().to_numpy()


def where(values: np.ndarray) -> str:
    """Say in which layers a quantity shows a change."""
    seen = values > 1e-9
    here, before, behind = (bool(part.any()) for part in (seen[LAYER : LAYER + 1], seen[:LAYER], seen[LAYER + 1 :]))
    if before:
        return ALL
    return {(True, False): ALONE, (True, True): ON, (False, True): BEHIND, (False, False): NOWHERE}[here, behind]


@pytest.mark.parametrize("kind", PLANTED)
def test_each_quantity_sees_what_the_documentation_says(kind: str) -> None:
    seen = tuple(where(by_layer(found(kind), *quantity)) for quantity in QUANTITIES)
    assert seen == EXPECTED[kind]


@pytest.mark.parametrize("kind", PLANTED)
def test_what_a_part_writes_on_the_same_input_changed_as_much_as_was_planted(kind: str) -> None:
    writes, mlp = (by_layer(found(kind), "layers", name)[LAYER] for name in ("write_change", "mlp_write_change"))
    # of the output projections themselves 20 % of noise is 20 % of what is written, but for chance
    if kind == "output":
        assert writes == pytest.approx(0.2, rel=0.25)
    if kind == "MLP out":
        assert mlp == pytest.approx(0.2, rel=0.25)
    outputs = found(kind).outputs
    assert outputs.loc[outputs["rows"] == "all", "kl_base_tuned"].item() > 1e-4, "every change reaches the outputs"


def test_heads_whose_output_projection_alone_changed_are_found_by_what_they_write_and_not_by_what_they_attend_to() -> None:
    heads = (0, 1, 4, 6, 7, 10, 13, 15)
    models = planted(PLANTED["output"], heads=heads, num_attention_heads=16, num_key_value_heads=4, hidden_size=64)
    result = difference(oracle.two(*models), oracle.encoded(), replicates=2, execution=EXECUTION)
    changed = {(LAYER, head) for head in heads}
    hits = {rule: len(changed & set(select(rule, result.heads, result.layers, number=8).components.heads)) for rule in RULES}
    assert hits == {"heads_by_write": 8, "heads_by_kl": 0, "heads_by_entropy": 0}
    unchanged = result.heads[
        [(layer, head) not in changed for layer, head in zip(result.heads["layer"], result.heads["head"], strict=True)]
    ]
    assert unchanged["write_change"].max() < 1e-12


def test_the_default_rules_of_a_study_see_it() -> None:
    assert Selecting().head_rule == "heads_by_write"
