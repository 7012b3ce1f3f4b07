"""The contract of dictionaries measured inside a model."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch

from mechscope import features
from mechscope.features import Dictionary, Rule, explain
from mechscope.features.diffing import LatentSet, carried, latent_scaling
from mechscope.features.observed import Heads, Neurons
from mechscope.instrument import Execution
from tests import families
from tests.contract.technique import Case, Result, Technique, columns, numbers


def _dictionary(layout: features.Layout) -> Dictionary:
    """Return random directions, of which some are active everywhere and none for want of a digit."""
    return Dictionary.plain(layout, layout.tensors(seed=1, dtype=torch.float64))


def autoencoder(case: Case, execution: Execution) -> Result:
    """Measure an autoencoder of the residual stream."""
    given = _dictionary(features.autoencoder("resid1", families.WIDTH, 50, Rule("topk", 6)))
    found = features.measure(case.subject, given, case.pairs, execution=execution)
    return columns(found.table) | columns(found.latents)


def transcoder(case: Case, execution: Execution) -> Result:
    """Measure a transcoder of an MLP."""
    given = _dictionary(features.transcoder(1, families.WIDTH, 50, Rule("relu"), skip=True))
    found = features.measure(case.subject, given, case.pairs, execution=execution)
    return columns(found.table) | columns(found.latents)


def crosscoder(case: Case, execution: Execution) -> Result:
    """Measure a crosscoder of two models."""
    given = _dictionary(features.crosscoder("base:resid1,tuned:resid1", (families.WIDTH,) * 2, 50, Rule("topk", 6)))
    models = {"base": case.pair.base, "tuned": case.pair.tuned}
    return columns(features.measure(models, given, case.pairs, execution=execution).table)


def together(case: Case, execution: Execution) -> Result:
    """Measure an autoencoder beside random directions."""
    given = _dictionary(features.autoencoder("resid1", families.WIDTH, 50, Rule("topk", 6)))
    both = {"": given, "random": features.random_control(given, 4)}
    found = features.measure_together(case.subject, both, case.pairs, execution=execution)
    return {f"{name} {key}": values for name, each in found.items() for key, values in columns(each.table).items()}


def examples(case: Case, execution: Execution) -> Result:
    """Find where latents are active most."""
    given = _dictionary(features.autoencoder("resid1", families.WIDTH, 50, Rule("topk", 6)))
    found = features.top_examples(case.subject, given, case.pairs, count=2, execution=execution)
    return columns(found.table) | {"energy": found.energy}


def dashboard(case: Case, execution: Execution) -> Result:
    """Gather what is shown of latents."""
    given = _dictionary(features.autoencoder("resid1", families.WIDTH, 50, Rule("topk", 6)))
    settings = features.DashboardSettings(examples=2, of_decile=1, drawn=10, before=2, after=1)
    found = features.dashboard(case.subject, given, case.pairs, settings=settings, execution=execution)
    return numbers(found)


def scaling(case: Case, execution: Execution) -> Result:
    """Scale the latents of a crosscoder of two models."""
    given = _dictionary(features.crosscoder("base:resid1,tuned:resid1", (families.WIDTH,) * 2, 50, Rule("topk", 6)))
    return columns(latent_scaling({"base": case.pair.base, "tuned": case.pair.tuned}, given, case.pairs, execution=execution))


def carries(case: Case, execution: Execution) -> Result:
    """Put latents of a crosscoder into the base and take them out of the tuned model."""
    given = _dictionary(features.crosscoder("base:resid1,tuned:resid1", (families.WIDTH,) * 2, 50, Rule("topk", 6)))
    sets = {"some": LatentSet((1, 7)), "all": LatentSet(), "drawn": LatentSet((1, 7), draw=0)}
    found = carried(case.pair, given, case.pairs, sets, execution=execution)
    energy = {f"energy {name}": np.array([value]) for name, value in found.energy.items()}
    into = {f"into {name}": value for name, value in found.into_base.items()}
    out = {f"out {name}": value for name, value in found.out_of_tuned.items()}
    return {"base": found.base, "tuned": found.tuned, **energy, **into, **out}


def graph(case: Case, execution: Execution) -> Result:
    """Make the attribution graph of a text."""
    rules = (Rule("topk", 6), Rule("relu"), Rule("topk", 6))
    given = {
        f"m{layer}": _dictionary(features.transcoder(layer, families.WIDTH, 50, rule, skip=layer == 1)) for layer, rule in enumerate(rules)
    }
    found = features.attribution_graph(case.subject, given, case.pairs.pairs[0].clean, execution=execution)
    return columns(found.nodes) | {"edges": found.edges.toarray()}


def explained(case: Case, execution: Execution) -> Result:
    """Explain neurons and heads and score the explanations."""
    settings = features.ExplainSettings(examples=3, windows=5, window=3)
    found = []
    for kind, units in ((Neurons, ["m1.n3"]), (Heads, ["a1.h2", "a0.h1"])):
        observed = kind(case.subject, units, case.pairs, share=0.3, execution=execution)
        found += explain.gather(observed, case.pairs, settings=settings, execution=execution)
    return numbers([asdict(each) for each in found]) | numbers(explain.explain(found, explain.Baseline(), execution=execution), "explained")


TECHNIQUES: dict[str, Technique] = {
    "attribution graph": graph,
    "autoencoder": autoencoder,
    "transcoder": transcoder,
    "crosscoder": crosscoder,
    "measured together": together,
    "examples": examples,
    "dashboard": dashboard,
    "latent scaling": scaling,
    "what latents carry": carries,
    "explained": explained,
}
