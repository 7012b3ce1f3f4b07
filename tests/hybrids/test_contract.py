"""Every technique, on a hybrid stack: the same numbers in padded batches as text by text, or one sentence that says why there are none."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from mechscope.errors import MechscopeError
from mechscope.instrument import Execution
from tests.contract.exceptions import OF_BATCHES, OF_FAMILY, WITHOUT_BATCHES
from tests.contract.technique import LEVEL, TOKENS, Case, documents, techniques, texts
from tests.hybrids.plain import both

# what needs heads in every layer, or names heads of layers that do not attend
REFUSED = {
    **dict.fromkeys(
        ("path patching", "path patching through MLPs", "flow", "attribution graph"),
        "needs a model that attends in every layer: layers 0, 2 mix tokens",
    ),
    **dict.fromkeys(
        (
            "eap",
            "eap-ig",
            "eap-ig by activations",
            "eap from the other model",
            "exact edges",
            "routes",
            "discover",
            "evaluate",
            "evaluate to zero",
        ),
        "a graph of edges between heads and MLPs needs a model that attends in every layer",
    ),
    **dict.fromkeys(
        ("evaluate with means", "faithfulness", "cards", "acdc", "prune", "tuned edges", "completeness", "minimality"),
        "a graph of edges between heads and MLPs needs a model that attends in every layer",
    ),
    **dict.fromkeys(
        ("ablate together", "counterfactuals", "scrub", "attribute to sources"),
        "layers 0, 2 do not attend; what mixes tokens there",
    ),
    "attention edges": "does not exist: layers 0, 2 do not attend",
    "attention lens": "the lens has nothing to read",
}
# refused for the family's MLP (maps w1, w3) or its norms of queries and keys, and not for its mixers
OF_THE_FAMILY = {
    **dict.fromkeys(
        ("explained", "neurons' activity", "change of neurons' activity", "neurons in tokens", "neuron weights"),
        "its neurons are not taken apart here",
    ),
    **dict.fromkeys(("QK in tokens", "singular vectors", "scores by offset"), "a norm of queries and keys"),
}
# needs a tokenizer
UNTRIED = {"summaries", *OF_FAMILY}


@cache
def case() -> Case:
    """Return two models with short convolutions, and texts."""
    return Case(both("lfm2"), texts(), texts((LEVEL,) * 5, seed=1), documents())


@pytest.mark.parametrize("name", [name for name in techniques() if name not in UNTRIED])
def test_padding_does_not_matter_or_the_refusal_names_why(name: str) -> None:
    technique = techniques()[name]
    if name in REFUSED | OF_THE_FAMILY:
        with pytest.raises(MechscopeError, match=(REFUSED | OF_THE_FAMILY)[name]):
            technique(case(), Execution(tokens_per_batch=TOKENS))
        return
    found = technique(case(), Execution(tokens_per_batch=TOKENS))
    assert found
    if name in WITHOUT_BATCHES or name in OF_BATCHES:
        return
    alone = technique(case(), Execution(tokens_per_batch=1))
    assert found.keys() == alone.keys()
    for key, values in found.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, alone[key], rtol=1e-6, atol=1e-6 * np.nanmax(np.abs(values), initial=1.0), err_msg=key)
        else:
            np.testing.assert_array_equal(values, alone[key], err_msg=key)
