"""The contract of neurons' activity, of routing, and of what is read from weights alone."""

from __future__ import annotations

from mechscope import weights
from mechscope.instrument import Execution
from tests.contract.technique import Case, Result, Technique, columns, numbers


def activity(case: Case, execution: Execution) -> Result:
    """Tell what every neuron does, and what those that do it most promote."""
    measured = weights.neuron_activity(case.subject, case.pairs, contexts=2, execution=execution)
    memories = weights.memories(case.subject, measured, case.pairs, before=3, k=2)
    return (
        columns(measured.table())
        | numbers(weights.agreement(case.subject, measured, case.pairs), "agreement")
        | numbers(memories, "memories")
    )


def activity_change(case: Case, execution: Execution) -> Result:
    """Tell what every neuron of two models does."""
    return columns(weights.activity_change(case.pair, case.pairs, contexts=2, execution=execution).table())


def routing_change(case: Case, execution: Execution) -> Result:
    """Tell how two models route."""
    return numbers(weights.routing_change(case.pair, case.pairs, execution=execution))


# these run no model over texts
OF_WEIGHTS: dict[str, Technique] = {
    "OV in tokens": lambda case, execution: columns(weights.ov_tokens(case.subject, k=3, effective=True, execution=execution)),
    "change of OV in tokens": lambda case, execution: columns(weights.ov_tokens(case.pair, k=3, execution=execution)),
    "QK in tokens": lambda case, execution: columns(weights.qk_tokens(case.subject, queries=[4, 5], k=3, execution=execution)),
    "values composing": lambda case, execution: columns(weights.composition(case.subject, kinds=("v",), execution=execution)),
    "composition": lambda case, execution: columns(weights.composition(case.subject, execution=execution)),
    "change of composition": lambda case, execution: columns(weights.composition_change(case.pair)),
    "head weights": lambda case, execution: columns(weights.weight_heads(case.subject, n_tokens=16, execution=execution)),
    "change of heads": lambda case, execution: columns(weights.head_changes(case.pair)),
    "neurons in tokens": lambda case, execution: columns(weights.neuron_tokens(case.subject, layers=[1], k=3, execution=execution)),
    "neuron weights": lambda case, execution: columns(weights.neuron_weights(case.subject, layers=[1], execution=execution)),
    "singular vectors": lambda case, execution: columns(weights.singular_tokens(case.subject, matrix="qk", n=2, k=3)),
    "scores by offset": lambda case, execution: columns(weights.position_scores(case.subject, offsets=4)),
}

TECHNIQUES: dict[str, Technique] = {
    "neurons' activity": activity,
    "change of neurons' activity": activity_change,
    "routing": lambda case, execution: numbers(weights.routing(case.subject, case.pairs, execution=execution)),
    "change of routing": routing_change,
    **OF_WEIGHTS,
}
