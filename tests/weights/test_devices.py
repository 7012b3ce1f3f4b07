"""Weights and head roles of a model over two devices are those of the model on one."""

from __future__ import annotations

from typing import Any

from mechscope import heads, weights
from tests.devices import Technique, assert_equal_over_devices, cases, encoded, prompts

PROMPTS = prompts()


def activity(models: Any) -> list[Any]:
    found = weights.neuron_activity(models.base, PROMPTS, contexts=2)
    return [found.table(), weights.agreement(models.base, found, PROMPTS), weights.memories(models.base, found, PROMPTS, before=3, k=2)]


TECHNIQUES: dict[str, Technique] = {
    "OV in tokens": lambda models: weights.ov_tokens(models.base, k=3, effective=True),
    "values composing": lambda models: weights.composition(models.base, kinds=("v",)),
    "head weights": lambda models: weights.weight_heads(models.base, n_tokens=16),
    "neurons": lambda models: [weights.neuron_tokens(models.base, layers=[1], k=3), weights.neuron_weights(models.base, layers=[1])],
    "head roles": lambda models: heads.roles_table(heads.head_roles(models.base, probes=3)),
    "document roles": lambda models: heads.roles_table(heads.document_roles(models.base, encoded())),
}

# query and key circuits need families without norms of queries and keys
FEWER: dict[str, Technique] = {
    "change of OV in tokens": lambda models: weights.ov_tokens(models, k=3),
    "QK in tokens": lambda models: weights.qk_tokens(models.base, queries=[4, 5], k=3),
    "composition": lambda models: weights.composition(models.base),
    "change of composition": lambda models: weights.composition_change(models),
    "change of heads": lambda models: weights.head_changes(models),
    "singular vectors": lambda models: weights.singular_tokens(models.base, matrix="qk", n=2, k=3),
    "positions": lambda models: weights.position_scores(models.base, offsets=4),
    "activity": activity,
    "change of activity": lambda models: weights.activity_change(models, PROMPTS, contexts=2).table(),
    "attention edges": lambda models: heads.attention_edges(models.base, PROMPTS.pairs[0].clean, [(0, 1), (2, 2)]),
}


@cases(TECHNIQUES, FEWER)
def test_results_are_equal(technique: Technique, family: str) -> None:
    assert_equal_over_devices(technique, family)
