"""Edge attribution is the derivative of the circuit's metric, integrated gradients add up, and in a linear model every method is exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.circuits.attribution import METHODS, attribute_edges
from mechscope.circuits.exact import exact_effects
from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.graph import Graph, sums_by_node
from mechscope.circuits.scores import EdgeScores
from mechscope.circuits.sender_outputs import SenderOutputs
from mechscope.data.pairs import Pairs, PromptPair, collate_pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs
from tests.circuits.brute import EXACT, FAMILIES, brute_metric, brute_written

PAIRS = random_pairs(3)
# the families differ in what stands between sender and receiver: fused maps, parallel blocks, grouped keys, norms behind attention
FOUR = ("gpt2", "gpt_neox", "llama", "gemma2")


def linear_subject() -> Subject:
    """A GPT-2 that is linear in its embedding: uniform attention, linear MLPs, norms that divide by a constant.

    Two features hold ±10⁶ in every token and nothing writes to them, so every LayerNorm divides by 10⁶ √(2/d) up to parts in 10¹²; its gain
    multiplies by that, and hides the two features. All else is kept near one, for a norm bends by the square of what it reads over 10¹².
    """
    model = families.build("gpt2", torch.float64, activation_function="linear")
    huge, width = 1e6, families.WIDTH
    with torch.no_grad():
        body = model.transformer
        body.wte.weight.mul_(0.3)
        body.wpe.weight.mul_(0.3)
        body.wte.weight[:, :2] = torch.tensor([huge, -huge])
        body.wpe.weight[:, :2] = 0
        model.lm_head.weight = torch.nn.Parameter(families.build("gpt2", torch.float64, seed=1).lm_head.weight.detach().clone())
        for block in body.h:
            block.attn.c_attn.weight[:, : 2 * width] = 0
            block.attn.c_attn.bias[: 2 * width] = 0
            for writer in (block.attn.c_proj, block.mlp.c_proj):
                writer.weight.mul_(0.3)
                writer.weight[:, :2] = 0
                writer.bias[:2] = 0
        for norm in (body.ln_f, *(norm for block in body.h for norm in (block.ln_1, block.ln_2))):
            norm.weight[2:] = huge * (2 / width) ** 0.5 * (1 + 0.1 * torch.arange(width - 2) / width)
            norm.weight[:2] = 0
            norm.bias[:2] = 0
    return load(model)


def smooth_subject(family: str) -> Subject:
    """A model with weaker maps, so that its metric bends slowly along a line between two runs."""
    model = families.build(family, torch.float64)
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and parameter not in embeddings and "wpe" not in name and "embed" not in name:
                parameter.mul_(0.4)
    return load(model)


def rows(scores: EdgeScores) -> np.ndarray:
    assert scores.per_text is not None
    return scores.per_text


def slope(
    subject: Subject, family: str, pair: PromptPair, edge: str, names: tuple[str, ...], rest: dict[str, Tensor], step: float
) -> float:
    """Return minus the derivative of the metric by how much of its clean value an edge carries, from the oracle."""
    ends = [brute_metric(subject.model, family, pair, {**dict.fromkeys(names, 1.0), edge: 1 + side * step}, rest=rest) for side in (1, -1)]
    return (ends[1] - ends[0]) / (2 * step)


@pytest.mark.parametrize(
    ("family", "source"),
    [*((family, "corrupt") for family in FAMILIES), *((family, source) for family in FOUR for source in ("zero", "mean"))],
)
def test_eap_is_the_derivative_of_the_metric_by_finite_differences(family: str, source: Any) -> None:
    subject = families.subject(family, torch.float64)
    written = brute_written(subject.model, family, PAIRS.pairs[0].corrupt)
    if source == "mean":
        seen = [brute_written(subject.model, family, pair.clean) for pair in PAIRS]
        written = {name: torch.cat([one[name] for one in seen]).mean(0, keepdim=True) for name in written}
    elif source == "zero":
        written = {name: torch.zeros_like(value) for name, value in written.items()}
    found = attribute_edges(subject, PAIRS, method="eap", source=SenderOutputs.mean_over(subject, PAIRS) if source == "mean" else source)
    # float32 norms leave 1e-7 of noise in the metric, so a longer step; LayerNorm families are float64 throughout
    step, tolerance = (1e-5, 1e-7) if family in EXACT else (3e-3, 1e-3)
    some = range(0, len(found.graph), 17)
    expected = [slope(subject, family, PAIRS.pairs[0], found.graph.names[at], found.graph.names, written, step) for at in some]
    assert np.abs(expected).max() > 0.03  # or agreement would mean little
    np.testing.assert_allclose(rows(found)[0, ::17], expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("metric", ["logit-diff", "probability", "loss"])
@pytest.mark.parametrize("family", FAMILIES)
def test_eap_of_every_edge_and_text_is_minus_the_gradient_in_a_soft_mask(family: str, metric: str) -> None:
    subject = families.subject(family, torch.float64)
    found = attribute_edges(subject, PAIRS, method="eap", metric=metric)
    runs = CircuitRuns(subject, collate_pairs(PAIRS.pairs), metric)
    for text in range(len(PAIRS)):
        weights = torch.ones(1, len(runs.graph), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(runs.run(weights)[0, text], weights)
        # rounding of float32 norms goes one way in a padded batch and another in a short one
        np.testing.assert_allclose(rows(found)[text], -gradient[0], rtol=0, atol=1e-9 if family in EXACT else 1e-4)


@pytest.mark.parametrize("family", FOUR)
def test_gradients_at_the_corrupt_end_are_those_of_the_swapped_pairs(family: str) -> None:
    subject = families.subject(family, torch.float64)
    clean = attribute_edges(subject, PAIRS, method="eap")
    # swapping exchanges right and wrong answers, too, so the sign of the metric turns with that of the difference
    corrupt = attribute_edges(subject, PAIRS.swapped(), method="eap")
    both = attribute_edges(subject, PAIRS, method="clean-corrupted")
    one_step = attribute_edges(subject, PAIRS, method="eap-ig", steps=1, points="left")
    assert np.abs(clean.mean - corrupt.mean).max() > 0.1
    tolerance = 1e-9 if family in EXACT else 1e-4
    np.testing.assert_allclose(rows(one_step), rows(corrupt), rtol=0, atol=tolerance)
    np.testing.assert_allclose(both.mean, (clean.mean + corrupt.mean) / 2, rtol=0, atol=tolerance)


@pytest.mark.parametrize("points", ["left", "midpoint"])
def test_eap_ig_averages_gradients_between_the_corrupt_and_the_clean_embedding(points: Any) -> None:
    """Plain autograd on the unmodified model: what MLPs and logits read is moved by a zero that asks for its gradient."""
    subject, steps = families.subject("gpt2", torch.float64), 4
    body = subject.model.transformer
    found = attribute_edges(subject, PAIRS, method="eap-ig", steps=steps, points=points)
    norms = [*(block.ln_2 for block in body.h), body.ln_f]
    names = [*(f"m{layer}" for layer in range(families.LAYERS)), "logits"]
    for text, pair in enumerate(PAIRS):
        clean, corrupt = (brute_written(subject.model, "gpt2", ids) for ids in (pair.clean, pair.corrupt))
        total = [torch.zeros(len(pair.clean), families.WIDTH, dtype=torch.float64) for _ in norms]
        for step in range(steps):
            share = (step + (0.5 if points == "midpoint" else 0.0)) / steps
            start, stop = (body.wte.weight[torch.tensor([ids])] for ids in (pair.corrupt, pair.clean))
            nothing = [torch.zeros_like(one, requires_grad=True) for one in total]
            hooks = [
                norm.register_forward_pre_hook(lambda _, args, add=add: (args[0] + add,)) for norm, add in zip(norms, nothing, strict=True)
            ]
            try:
                logits = subject.model(inputs_embeds=start + share * (stop - start)).logits[0, -1]
            finally:
                for hook in hooks:
                    hook.remove()
            value = logits[list(pair.answers)].mean() - logits[list(pair.wrong_answers)].mean()
            for one, gradient in zip(total, torch.autograd.grad(value, nothing), strict=True):
                one += gradient / steps
        for place, edge in enumerate(found.graph.names):
            sender, _, receiver = edge.partition("->")
            if receiver in names:
                expected = float(((corrupt[sender] - clean[sender]) * total[names.index(receiver)]).sum())
                assert rows(found)[text, place] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("family", [*FOUR, "opt"])
def test_eap_ig_out_of_the_input_adds_up_to_the_difference_of_the_runs(family: str) -> None:
    subject = smooth_subject(family)
    runs = CircuitRuns(subject, collate_pairs(PAIRS.pairs))
    expected = (runs.corrupt - runs.clean).numpy()

    def error(steps: int, points: Any) -> float:
        found = attribute_edges(subject, PAIRS, steps=steps, points=points)
        return float(np.abs(sums_by_node(found.graph, rows(found))[:, 0] - expected).max() / np.abs(expected).max())

    midpoint, left = ([error(steps, points) for steps in (16, 64)] for points in ("midpoint", "left"))
    assert midpoint[1] < 0.005
    assert left[1] < 0.02
    # errors of order 1/m and 1/m²; OPT's ReLU has kinks
    assert left[1] < left[0] / 2.5
    assert midpoint[1] < midpoint[0] / (4 if family == "opt" else 12)


def places_of(graph: Graph) -> list[slice]:
    """Senders that write together: the input, then each layer's heads and its MLP."""
    layers = range(graph.n_layers)
    return [
        slice(0, 1),
        *(at for layer in layers for at in (graph.heads_of(layer), slice(graph.mlp_sender(layer), graph.mlp_sender(layer) + 1))),
    ]


def leave(graph: Graph, place: slice) -> Tensor:
    """Mark the edges that leave some senders."""
    return torch.from_numpy(np.isin(graph.edges[:, 0], np.arange(len(graph.senders))[place]))


@pytest.mark.parametrize("source", ["corrupt", "zero", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_eap_ig_of_activations_averages_gradients_where_one_place_carries_a_share_of_its_clean_value(family: str, source: Any) -> None:
    """At m = 2 from the closed end: with all edges out of a place at 0, then at one half, and the rest of the model clean."""
    subject = families.subject(family, torch.float64)
    source = SenderOutputs.mean_over(subject, PAIRS) if source == "mean" else source
    found = rows(attribute_edges(subject, PAIRS, method="eap-ig-activations", steps=2, points="left", source=source))
    runs = CircuitRuns(subject, collate_pairs(PAIRS.pairs), source=source)
    places = places_of(runs.graph)
    weights = torch.ones(2, len(places), len(runs.graph), dtype=torch.float64)
    for number, place in enumerate(places):
        weights[0, number, leave(runs.graph, place)] = 0
        weights[1, number, leave(runs.graph, place)] = 0.5
    values = runs.run(weights.requires_grad_().flatten(0, 1))
    for text in range(len(PAIRS)):
        (gradient,) = torch.autograd.grad(values[:, text].sum(), weights, retain_graph=True)
        for number, place in enumerate(places):
            own = leave(runs.graph, place)
            # an input of zero meets a norm that divides by almost nothing, so gradients there are large
            expected = -gradient.mean(0)[number, own].numpy()
            tolerance = (1e-9 if family in EXACT else 1e-4) * max(1, np.abs(expected).max())
            np.testing.assert_allclose(found[text, own.numpy()], expected, rtol=0, atol=tolerance, err_msg=str(place))


@pytest.mark.parametrize("source", ["corrupt", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_eap_ig_of_activations_out_of_one_place_adds_up_to_closing_it(family: str, source: Any) -> None:
    """The heads of a layer, or its MLP, or the input: closing all edges that leave them is what their scores add up to.

    Not the input towards zero: there the first norms see nothing else, so the metric jumps within the last 1e-5 of the way.
    """
    subject = smooth_subject(family)
    runs = CircuitRuns(subject, collate_pairs(PAIRS.pairs), source=source)
    graph = runs.graph
    places = places_of(graph)[0 if source == "corrupt" else 1 :]
    keep = torch.stack([~leave(graph, place) for place in places])
    expected = (runs.run(keep) - runs.clean).numpy()
    errors = []
    for steps in (4, 16):
        found = attribute_edges(subject, PAIRS, method="eap-ig-activations", steps=steps, points="midpoint", source=source)
        by_node = sums_by_node(graph, rows(found))
        sums = np.array([by_node[:, place].sum(1) for place in places])
        errors.append(np.abs(sums - expected).max(1))
    assert (errors[1] < 0.01 * np.abs(expected).max()).all()
    assert errors[1].sum() < errors[0].sum()


def test_in_a_linear_model_every_method_is_the_exact_effect() -> None:
    subject = linear_subject()
    exact = exact_effects(subject, PAIRS)
    assert (np.abs(exact.mean) > 1e-3).mean() > 0.3
    for method in METHODS:
        found = attribute_edges(subject, PAIRS, method=method, steps=2)
        np.testing.assert_allclose(rows(found), rows(exact), rtol=0, atol=1e-9, err_msg=method)
    # queries and keys decide nothing where attention is uniform
    asked = ["<q>" in name or "<k>" in name for name in exact.graph.names]
    np.testing.assert_allclose(exact.mean[asked], 0, atol=1e-9)


def test_the_linear_model_is_linear_and_the_random_one_is_not() -> None:
    for subject, linear in ((linear_subject(), True), (families.subject("gpt2", torch.float64), False)):
        exact, found = exact_effects(subject, PAIRS), attribute_edges(subject, PAIRS, method="eap")
        assert (np.abs(exact.mean - found.mean).max() < 1e-9) == linear


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gemma2"])
def test_scores_do_not_depend_on_batches_or_padding(family: str, method: Any) -> None:
    subject = families.subject(family, torch.float64)
    together = attribute_edges(subject, PAIRS, method=method, steps=2)
    apart = attribute_edges(subject, PAIRS, method=method, steps=2, execution=Execution(tokens_per_batch=1))
    tolerance = 1e-9 if family in EXACT else 1e-4
    np.testing.assert_allclose(rows(together), rows(apart), rtol=0, atol=tolerance)
    for index, pair in enumerate(PAIRS):
        alone = attribute_edges(subject, Pairs((pair,), "one"), method=method, steps=2)
        np.testing.assert_allclose(rows(together)[index], alone.mean, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_is_over_texts_and_a_node_is_the_sum_of_its_edges(method: Any) -> None:
    found = attribute_edges(families.subject("llama", torch.float64), PAIRS, method=method, steps=2)
    np.testing.assert_allclose(found.mean, rows(found).mean(0), rtol=0, atol=1e-12)
    nodes = found.node_table().set_index("node")["score"]
    for name in ("embed", "a1.h2", "m0"):
        of_it = [score for edge, score in zip(found.graph.names, found.mean, strict=True) if edge.startswith(f"{name}->")]
        assert nodes[name] == pytest.approx(sum(of_it), abs=1e-12)


def test_what_cannot_be_scored_is_refused() -> None:
    subject = families.subject("gpt2", torch.float64)
    same = Pairs(tuple(PromptPair(pair.id, pair.clean, pair.clean, pair.answers, pair.wrong_answers) for pair in PAIRS), "same")
    with pytest.raises(DataError, match="same clean and corrupt"):
        attribute_edges(subject, same)
    with pytest.raises(SettingsError, match="flat"):
        attribute_edges(subject, PAIRS, method="eap", metric="kl")
    with pytest.raises(SettingsError, match="corrupt"):
        attribute_edges(subject, PAIRS, method="eap-ig", source="zero")
    with pytest.raises(SettingsError, match="at least one step"):
        attribute_edges(subject, PAIRS, steps=0)
    with pytest.raises(DataError, match="metric"):
        attribute_edges(subject, PAIRS, metric="perplexity")
