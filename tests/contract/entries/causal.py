"""The contract of interventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mechscope import causal
from mechscope.causal import Effects
from mechscope.instrument import Execution
from tests.contract.technique import Case, Result, Technique, columns, numbers


def effects(sweep: Callable[..., Effects], *args: Any, **options: Any) -> Technique:
    """Make the technique of a sweep that is given the base model, the texts and these arguments."""

    def run(case: Case, execution: Execution) -> Result:
        return per_text(sweep(case.subject, case.pairs, *args, execution=execution, **options))

    return run


def per_text(result: Effects) -> Result:
    """Return the metric of every run on every text: all that the table is made of."""
    every = {"values": result.values, "unchanged": result.unchanged, "clean": result.clean, "corrupt": result.corrupt}
    return {name: values for name, values in every.items() if values is not None}


def patched(site: str, **options: Any) -> Technique:
    """Make the technique of patching a site."""
    return effects(causal.patch, site=site, **options)


def crossed(**options: Any) -> Technique:
    """Make the technique of exchanging what two models do."""

    def run(case: Case, execution: Execution) -> Result:
        every = causal.cross_patch(case.pair, case.pairs, execution=execution, **options)
        return {f"{into} {name}": values for into, one in every.items() for name, values in per_text(one).items()}

    return run


def ablate_to_means(case: Case, execution: Execution) -> Result:
    """Keep one component, with the means of all others."""
    means = causal.mean_of(case.subject, case.pairs, ("z", "mlp_output"), execution=execution)
    return per_text(causal.ablate(case.subject, case.pairs, source=means, mode="keep", execution=execution))


def ablate_to_means_by_position(case: Case, execution: Execution) -> Result:
    """Put each position's mean over texts of one length."""
    means = causal.mean_of(case.subject, case.level.swapped(), ("z",), per_position=True, execution=execution)
    return per_text(causal.ablate(case.subject, case.level, source=means, sites=("head",), execution=execution))


def means(case: Case, execution: Execution) -> Result:
    """Average activations over tokens, and over texts of one length position by position."""
    over_all = causal.mean_of(case.subject, case.pairs, ("embedding", "z"), execution=execution)
    by_position = causal.mean_of(case.subject, case.level, ("mlp_output",), per_position=True, execution=execution)
    return numbers(over_all.values | by_position.values)


def counterfactuals(case: Case, execution: Execution) -> Result:
    """Mix runs, also of another model."""
    runs: dict[str, causal.CounterfactualRun] = {
        "one": {"a1.h2": "corrupt", "m2": "zero"},
        "two": {"layers:1": "corrupt"},
        "mixed": {"a0.h1": "corrupt", "m1": causal.Text("clean", model=case.pair.tuned), "a2.h3": "zero"},
    }
    return per_text(causal.run_counterfactuals(case.subject, case.pairs, runs, execution=execution))


def scrub(case: Case, execution: Execution) -> Result:
    """Exchange what a hypothesis calls equal."""
    classes = [0, 1, 0, 1, 0, 1]
    result = causal.scrub(case.subject, case.level, {"layers:1": None, "a2.h1": classes}, samples=2, execution=execution)
    return {"full": result.full, "everything": result.everything, "scrubbed": result.scrubbed}


def steer(case: Case, execution: Execution) -> Result:
    """Steer by a difference of means."""
    direction = causal.difference_of_means(case.subject, case.pairs, case.pairs.swapped(), layer=1, execution=execution)
    return columns(causal.sweep_strength(case.subject, direction, case.pairs, case.level, strengths=(-0.5, 1), execution=execution)) | {
        "direction": direction.vector.cpu().numpy()
    }


def das(case: Case, execution: Execution) -> Result:
    """Learn a subspace in two layers and judge it on other texts."""
    options: dict[str, Any] = {"layers": [0, 2], "dimensions": 2, "epochs": 2, "controls": 1, "among": "answers"}
    return columns(causal.das(case.subject, case.level, case.pairs, execution=execution, **options))


def train_das(case: Case, execution: Execution) -> Result:
    """Learn a subspace."""
    return numbers(causal.train_das(case.subject, case.pairs, layer=1, dimensions=2, epochs=2, execution=execution).rotation)


def alignment(case: Case, execution: Execution) -> Result:
    """Judge a random subspace."""
    aligned = causal.random_alignment(case.subject, layer=1, dimensions=12)
    return numbers(aligned.accuracy(case.subject, case.pairs, among="answers", execution=execution))


TECHNIQUES: dict[str, Technique] = {
    **{f"patch {site}": patched(site) for site in ("head", "key", "pattern", "attention", "mlp", "query", "value", "embedding")},
    "patch neurons": patched("neuron", components="m1"),
    "patch experts": patched("expert", components="m1", positions="changed"),
    "ablate experts": effects(causal.ablate, sites=("expert",), components="m0.e1,m1.e2,m2"),
    "patch positions": patched("head", positions="each", metric="loss", direction="noise"),
    "patch by kl": patched("residual", metric="kl"),
    "patch residual": patched("residual"),
    "attribution patching": effects(causal.attribution_patch, grad_drop=True, check=3),
    "attribution patching by kl": effects(causal.attribution_patch, site="mlp", metric="kl", check=3),
    "attribution patching of queries": effects(causal.attribution_patch, site="query", softmax=True),
    "attribution patching of the stream": effects(causal.attribution_patch, site="residual", metric="loss"),
    "ablate to zero": effects(causal.ablate),
    "ablate to means": ablate_to_means,
    "ablate to means by position": ablate_to_means_by_position,
    "ablate by resampling": effects(causal.ablate, source="resample", metric="logit-diff"),
    "ablate together": effects(causal.ablate_together, ["a0.h1,a2.h0", "m1", "layers:1"]),
    "path patching": effects(causal.path_patch, "a0.h0,m0,a1.h3", ["logits", "a2.h1<q>"]),
    "path patching through MLPs": effects(
        causal.path_patch, "a0.h0,a1.h1", ["a2.h0<k>", "a2.h2<v>", "m2"], through_mlps=True, direction="denoise"
    ),
    "knockout": effects(causal.attention_knockout, keys="subject", each_head=True),
    "flow": effects(causal.attention_flow, ("beginning", "changed fact", "last")),
    "cross activations": crossed(),
    "cross weights": crossed(by="weights"),
    "counterfactuals": counterfactuals,
    "trace": effects(causal.causal_trace, segment="beginning", samples=2),
    "trace MLPs": effects(causal.causal_trace, site="mlp", samples=2),
    "scrub": scrub,
    "das": das,
    "train das": train_das,
    "alignment": alignment,
    "steer": steer,
    "means": means,
}
