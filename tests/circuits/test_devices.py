"""Circuits of a model over two devices are those of the model on one."""

from __future__ import annotations

from typing import Any

from mechscope import circuits
from mechscope.circuits import Circuit, Graph
from tests.devices import Technique, assert_equal_over_devices, cases, prompts

PROMPTS = prompts()
SOME_EDGES = ("a0.h0->m1", "a0.h1->a2.h1<q>", "a1.h0->a2.h2<k>", "m0->a1.h2<v>", "m1->logits", "input->logits", "input->a0.h0<q>")


def halves(subject: Any) -> list[Circuit]:
    """Return a circuit of every other edge, one without the last layer's edges, and the whole model."""
    graph = Graph.of(subject)
    masks = [[place % 2 == 0 for place in range(len(graph))], [place < len(graph) // 2 for place in range(len(graph))], [True] * len(graph)]
    return [Circuit.of(graph, [name for name, inside in zip(graph.names, mask, strict=True) if inside]) for mask in masks]


TECHNIQUES: dict[str, Technique] = {
    "eap": lambda models: circuits.attribute_edges(models.base, PROMPTS, method="eap").mean,
    "eap-ig": lambda models: circuits.attribute_edges(models.base, PROMPTS, method="eap-ig", steps=3).mean,
    "eap from the other model": lambda models: circuits.attribute_edges(models.base, PROMPTS, method="eap", source=models.tuned).mean,
    "exact": lambda models: circuits.exact_effects(models.base, PROMPTS, edges=SOME_EDGES).per_text,
    "evaluate": lambda models: circuits.evaluate(models.base, PROMPTS, halves(models.base)),
    "evaluate with zeros": lambda models: circuits.evaluate(models.base, PROMPTS, halves(models.base), source="zero", metric="kl").values,
    "flow routes": lambda models: circuits.flow_routes(models.base, PROMPTS).mean,
}

FEWER: dict[str, Technique] = {
    "eap-ig-activations": lambda models: circuits.attribute_edges(models.base, PROMPTS, method="eap-ig-activations", steps=2).mean,
    "evaluate with means": lambda models: (
        circuits.evaluate(models.base, PROMPTS, halves(models.base), source=circuits.Written.mean_over(models.base, PROMPTS)).values
    ),
    "edges of the tuned model": lambda models: circuits.tuned_edges(models, PROMPTS, fractions=[0.2, 1.0], random=1),
    "cards": lambda models: circuits.component_cards(models.base, PROMPTS, halves(models.base)[0]),
    "acdc": lambda models: circuits.acdc(models.base, PROMPTS, thresholds=[0.05], edges=SOME_EDGES).scores.mean,
    "prune": lambda models: circuits.prune_edges(models.base, PROMPTS, n_edges=50, steps=3).scores.mean,
}


@cases(TECHNIQUES, FEWER)
def test_circuits_are_equal(technique: Technique, family: str) -> None:
    assert_equal_over_devices(technique, family)
