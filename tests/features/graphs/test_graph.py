"""Edges are what sources add to targets: they add up to every target's value, and predict to the digit what a change does while all else is held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.errors import ModelError, SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.graphs import attribution_graph, sums
from mechscope.features.graphs.graph import AttributionGraph
from mechscope.features.layout import Group, Layout, autoencoder, transcoder
from mechscope.features.places import places
from mechscope.features.rules import Rule
from mechscope.instrument import Execution, load
from mechscope.settings.graph import GraphSettings
from tests import families
from tests.features import oracle
from tests.features.graphs.made import DICTIONARIES, FAMILIES, IDS, Clean, W, subject, transcoders
from tests.features.test_splice import made
from tests.lens.residual_oracle import in_float64
from tests.matrix.plain import build

every_family = pytest.mark.parametrize("family", FAMILIES)
either = pytest.mark.parametrize("kind", DICTIONARIES)
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def of(family: str, given: dict[str, Dictionary], **changes: Any) -> AttributionGraph:
    return attribution_graph(subject(family), given, IDS, settings=replace(GraphSettings(logits=4, probability=1.0), **changes))


def codes(given: dict[str, Dictionary], clean: Clean) -> dict[tuple[str, int], float]:
    """Return the values of all active latents by name and position, by the dense oracle."""
    found: dict[tuple[str, int], float] = {}
    for each in given.values():
        dense = oracle.encode(each, [clean.seen["mlp_input", place.layer][0] for place in each.layout.inputs])
        for group, (start, stop) in zip(each.layout.groups, each.layout.spans, strict=True):
            for position, latent in dense[:, start:stop].nonzero().tolist():
                found[f"{each.layout.outputs[group.writes[0]]}.f{latent}", position] = float(dense[position, start + latent])
    return found


@either
@every_family
def test_edges_and_constants_add_up_to_the_value_of_every_active_latent_and_logit(family: str, kind: str) -> None:
    given, clean = DICTIONARIES[kind](), Clean(subject(family))
    graph = of(family, given)
    latents = graph.nodes[graph.nodes["kind"] == "latent"]
    expected = {at: value for at, value in codes(given, clean).items() if at[1] > 0}
    assert dict(zip(zip(latents["component"], latents["position"], strict=True), latents["value"], strict=True)) == pytest.approx(
        expected, abs=1e-9
    )
    logits = clean.seen["logits"][0, -1]
    if (cap := subject(family).anatomy.logit_softcap) is not None:
        logits = torch.atanh(logits / cap) * cap
    of_logits = graph.nodes[graph.nodes["kind"] == "logit"]
    np.testing.assert_allclose(of_logits["value"], (logits - logits.mean())[of_logits["index"].tolist()], **CLOSE)
    np.testing.assert_allclose(of_logits["probability"], clean.seen["logits"][0, -1].softmax(-1)[of_logits["index"].tolist()], **CLOSE)
    own = ~graph.nodes["value"].isna().to_numpy()
    np.testing.assert_allclose(sums(graph)[own], graph.nodes["value"][own], **CLOSE)
    assert (graph.nodes["rest"] == 0).all()


@either
@every_family
def test_a_change_moves_every_target_by_its_edge_while_all_else_is_held(family: str, kind: str) -> None:
    given, clean = DICTIONARIES[kind](), Clean(subject(family))
    graph, before = of(family, given), clean.run(given)
    nodes = graph.nodes
    generator = np.random.default_rng(0)
    latents, tokens, errors = (np.flatnonzero(nodes["kind"] == kind) for kind in ("latent", "token", "error"))
    sources = [*generator.permutation(latents[nodes["layer"][latents] == 0])[:2], *generator.permutation(latents)[:2]]
    for source in [*sources, *generator.permutation(tokens)[:2], *generator.permutation(errors)[:2]]:
        row = nodes.iloc[source]
        start, deltas = None, dict[int, torch.Tensor]()
        if row["kind"] == "token":
            start = clean.seen["embedding"].clone()
            start[:, row["position"]] *= 1.5
        for layer in range(families.LAYERS):
            delta = torch.zeros_like(clean.seen["embedding"])
            delta[0, row["position"]] = 0.5 * written(given, clean, row, layer)
            deltas[layer] = delta
        after = clean.run(given, deltas, start)
        expected = 0.5 * graph.edges[:, [int(source)]].toarray()[:, 0]
        assert np.abs(expected).max() > 0 or row["layer"] == families.LAYERS - 1
        moved = read(graph, given, after) - read(graph, given, before)
        own = ~nodes["value"].isna().to_numpy()
        np.testing.assert_allclose(moved[own], expected[own], rtol=1e-8, atol=1e-9)


def written(given: dict[str, Dictionary], clean: Clean, row: Any, layer: int) -> torch.Tensor:
    """Return what a node adds at an MLP."""
    if row["kind"] == "latent":
        for each in given.values():
            for number, group in enumerate(each.layout.groups):
                if each.layout.outputs[group.writes[0]].name != row["component"].split(".")[0]:
                    continue
                for at, place in enumerate(each.layout.outputs[slice(*group.writes)]):
                    if place.layer == layer:
                        rows = each.tensors[f"decoder.{number}"][row["index"]].view(-1, W)[at]
                        return row["value"] * rows / each.output_maps[each.layout.outputs.index(place)].scale
    if row["kind"] == "error" and row["layer"] == layer:
        for each in given.values():
            for at, place in enumerate(each.layout.outputs):
                if place.layer == layer:
                    found = [clean.seen["mlp_input", inside.layer][0] for inside in each.layout.inputs]
                    return (clean.seen["mlp_output", layer][0] - oracle.reconstruct(each, found)[at])[row["position"]]
    return torch.zeros(W, dtype=torch.float64)


def read(graph: AttributionGraph, given: dict[str, Dictionary], run: Any) -> np.ndarray:
    """Return what every latent of the graph reads (before its rule) and every logit less the mean, in a run."""
    found = np.zeros(len(graph.nodes))
    logits = run["logits"][0, -1]
    if (cap := graph.replacement.run.readout.softcap) is not None:
        logits = torch.atanh(logits / cap) * cap
    for number, row in enumerate(graph.nodes.to_dict("records")):
        if row["kind"] == "logit":
            found[number] = logits[row["index"]] - logits.mean()
        if row["kind"] == "latent":
            for each in given.values():
                for group_number, (group, (begin, _)) in enumerate(zip(each.layout.groups, each.layout.spans, strict=True)):
                    if each.layout.outputs[group.writes[0]].name != row["component"].split(".")[0]:
                        continue
                    at = group.reads[0]
                    x = run["mlp_input", each.layout.inputs[at].layer][0, row["position"]]
                    u = (x - each.input_maps[at].centre) * each.input_maps[at].scale
                    pre = u @ each.tensors[f"encoder.{group_number}"][row["index"]]
                    if each.layout.rule.name == "gated":
                        pre = pre * each.tensors["magnitude_log"][begin + row["index"]].exp()
                    found[number] = pre
    return found


@every_family
def test_a_graph_of_errors_alone_reproduces_the_model(family: str) -> None:
    graph = of(family, {})
    assert graph.without == (0, 1, 2)
    assert set(graph.nodes["kind"]) == {"error", "token", "logit"}
    logits = graph.nodes[graph.nodes["kind"] == "logit"]
    np.testing.assert_allclose(sums(graph)[graph.where("logit")], logits["value"], **CLOSE)
    clean = Clean(subject(family))
    errors = graph.where("error")
    last = graph.edges[graph.where("logit")][:, errors[graph.nodes["layer"][errors] == families.LAYERS - 1]].toarray()
    # the last block's MLPs reach the logits at the last token alone, through the final norm
    assert (last[:, :-1] == 0).all()
    moved = (
        clean.run({}, {families.LAYERS - 1: -clean.seen["mlp_output", families.LAYERS - 1]})["logits"][0, -1]
        - clean.run({})["logits"][0, -1]
    )
    if subject(family).anatomy.logit_softcap is None:
        np.testing.assert_allclose(last[:, -1], -(moved - moved.mean())[logits["index"].tolist()], **CLOSE)


def test_a_learned_sink_takes_its_part_of_what_values_biases_add() -> None:
    # gpt-oss: rows of its patterns do not sum to one, and its values have biases
    model = load(in_float64(build("gpt_oss", 0, torch.float64)))
    graph = attribution_graph(model, {}, IDS, settings=GraphSettings(logits=3, probability=1.0))
    logits = graph.nodes.iloc[graph.where("logit")]
    with torch.no_grad():
        expected = model.plain(torch.tensor([IDS]), use_cache=False).logits[0, -1]
    np.testing.assert_allclose(logits["value"], (expected - expected.mean())[logits["index"].tolist()], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums(graph)[graph.where("logit")], logits["value"], rtol=1e-6, atol=1e-6)


def test_where_few_latents_get_edges_they_are_those_that_matter_most_and_what_the_others_bring_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mechscope.features.graphs.graph._ROUND", 30)
    whole, some = of("llama", transcoders()), of("llama", transcoders(), latents=100)
    assert whole.latents == some.latents > 300
    own = ~some.nodes["value"].isna().to_numpy()
    np.testing.assert_allclose(sums(some)[own], some.nodes["value"][own], **CLOSE)
    assert (some.nodes["rest"] != 0).any()
    names = whole.nodes["node"].tolist()
    at = [names.index(node) for node in some.nodes["node"]]
    np.testing.assert_allclose(some.edges.toarray(), whole.edges[at][:, at].toarray(), **CLOSE)
    # densely: rounds of thirty, each ranked by all paths through the rows that are known
    edges, latents = np.abs(whole.edges.toarray()), whole.where("latent")
    known = set(whole.where("logit").tolist())
    while len(known) < 100 + len(whole.where("logit")):
        shares = np.where(np.isin(np.arange(len(edges)), list(known))[:, None], edges, 0.0)
        shares /= np.maximum(shares.sum(1, keepdims=True), 1e-300)
        reached = whole.weights @ (np.linalg.inv(np.eye(len(shares)) - shares) - np.eye(len(shares)))
        order = sorted(set(latents.tolist()) - known, key=lambda latent: -reached[latent])
        known |= set(order[: min(30, 100 + len(whole.where("logit")) - len(known))])
    assert {names[latent] for latent in known} - set(whole.nodes["node"][whole.where("logit")]) == set(
        some.nodes["node"][some.where("latent")]
    )


def test_the_size_of_blocks_changes_nothing_and_float32_is_close() -> None:
    whole = of("gemma2", transcoders())
    small = attribution_graph(
        subject("gemma2"), transcoders(), IDS, settings=GraphSettings(logits=4, probability=1.0), execution=Execution(tokens_per_batch=30)
    )
    np.testing.assert_allclose(small.edges.toarray(), whole.edges.toarray(), **CLOSE)
    single = attribution_graph(families.subject("gemma2"), transcoders(), IDS, settings=GraphSettings(logits=4, probability=1.0))
    common = [node for node in single.nodes["node"] if node in set(whole.nodes["node"])]
    assert len(common) > 0.99 * len(whole.nodes)
    one, two = ([graph.nodes["node"].tolist().index(node) for node in common] for graph in (single, whole))
    np.testing.assert_allclose(single.edges[one][:, one].toarray(), whole.edges[two][:, two].toarray(), rtol=1e-3, atol=1e-3)


def test_at_the_first_tokens_mlps_are_constants() -> None:
    graph = of("gpt2", transcoders(), first=3)
    nodes = graph.nodes
    assert nodes[nodes["kind"].isin(("latent", "error"))]["position"].min() == 3
    own = ~nodes["value"].isna().to_numpy()
    np.testing.assert_allclose(sums(graph)[own], nodes["value"][own], **CLOSE)


def test_logits_are_the_likeliest_until_they_have_the_probability() -> None:
    logits = Clean(subject("gpt2")).seen["logits"][0, -1].softmax(-1).sort(descending=True)
    share = float(logits.values[:2].sum() + logits.values[:3].sum()) / 2
    graph = of("gpt2", {}, logits=10, probability=share)
    assert graph.nodes[graph.nodes["kind"] == "logit"]["index"].tolist() == logits.indices[:3].tolist()


def test_what_cannot_stand_for_mlps_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"dictionary 'sae' reads resid1 and writes resid1: a graph is made of transcoders"):
        of("gpt2", {"sae": made(autoencoder("resid1", W, 40, Rule("relu")))})
    with pytest.raises(SettingsError, match="'one' and 'again' both write m1"):
        of("gpt2", {**transcoders(), "again": made(transcoder(1, W, 40, Rule("relu")))})
    with pytest.raises(ModelError, match="made for another model"):
        of("gpt2", {"wide": made(transcoder(1, W + 1, 40, Rule("relu")))})
    several = Layout(places("m0.in,m1.in"), places("m1"), (W, W), (W,), (Group(9, (0, 2), (0, 1)),), Rule("relu"))
    with pytest.raises(SettingsError, match="read several layers"):
        of("gpt2", {"several": made(several)})
    with pytest.raises(SettingsError, match="the prompt has 14 tokens, and at the first 14"):
        of("gpt2", {}, first=14)
    with pytest.raises(SettingsError, match=r"the prompt has 70 tokens: .* reads 1 to 64"):
        attribution_graph(subject("gpt2"), {}, [5] * 70)
