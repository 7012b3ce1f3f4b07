"""Interventions are made in the model itself: they are what splicing a changed latent gives, and the graph predicts them where nothing is left out of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.errors import SettingsError
from mechscope.features.graphs import attribution_graph, pruned
from mechscope.features.graphs.interventions import LatentChange, agreement, changes_of, tried
from mechscope.features.spliced import scaled, splice
from mechscope.instrument import Execution, record
from mechscope.settings.graph import GraphSettings
from tests.features.graphs.made import DICTIONARIES, IDS, inputs, subject

SETTINGS = GraphSettings(logits=4, probability=1.0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_what_is_measured_is_what_the_model_does_with_the_latent_spliced(family: str, kind: str) -> None:
    given, model = DICTIONARIES[kind](), subject(family)
    graph = attribution_graph(model, given, IDS, settings=SETTINGS)
    latents, logits = graph.where("latent"), graph.where("logit")
    early = [at for at in latents if graph.nodes["layer"][at] == 0]
    changes = [
        LatentChange(graph.nodes["node"][at], (int(at),), factor, "random")
        for at, factor in zip(early[::9], (0.0, 2.0, -1.0), strict=False)
    ]
    table = tried(graph, changes, np.concatenate([latents, logits]), execution=Execution(tokens_per_batch=42))
    places = {each.layout.outputs[0].name: each for each in given.values()}
    for change in changes:
        row = graph.nodes.iloc[change.latents[0]]
        where = torch.zeros(1, len(IDS), dtype=torch.bool)
        where[0, row["position"]] = True
        runs = []
        for factor in (1.0, change.factor):
            with splice(model, places, scaled(row["component"], factor, where)), torch.no_grad(), record(model, "mlp_input") as seen:
                runs.append((model.plain(**inputs(), use_cache=False).logits[0, -1], seen))
        own = table[(table["change"] == change.name)].set_index("target")
        before, after = (logits if (cap := model.anatomy.logit_softcap) is None else torch.atanh(logits / cap) * cap for logits, _ in runs)
        moved = (after - after.mean()) - (before - before.mean())
        for node in graph.nodes.iloc[logits].to_dict("records"):
            assert own["measured"][node["node"]] == pytest.approx(float(moved[node["index"]]), abs=1e-8)
        inside = graph.nodes.iloc[latents].set_index("node").to_dict("index")
        rows = graph.replacement.encoders(torch.arange(len(graph.replacement)))
        checked = 0
        for name, target in own[own["kind"] == "latent"].iterrows():
            at = inside[name]
            change_of = runs[1][1]["mlp_input", at["layer"]][0, at["position"]] - runs[0][1]["mlp_input", at["layer"]][0, at["position"]]
            number = graph.rows[graph.nodes["node"].tolist().index(name)]
            assert target["measured"] == pytest.approx(float(change_of @ rows[number]), abs=1e-8)
            checked += 1
        assert checked > 20
        assert (own["direct"] != own["total"]).any()


def test_a_small_change_is_predicted_where_patterns_and_scales_hardly_move() -> None:
    # of the last block's latents every path to the logits goes through the final norm alone
    given, model = DICTIONARIES["transcoders"](), subject("gpt2")
    graph = attribution_graph(model, given, IDS, settings=SETTINGS)
    last = [at for at in graph.where("latent") if graph.nodes["layer"][at] == 2 and graph.nodes["position"][at] == len(IDS) - 1]
    changes = [LatentChange(graph.nodes["node"][at], (int(at),), 1 + 1e-6, "influence") for at in last]
    table = tried(graph, changes, graph.where("logit"))
    np.testing.assert_allclose(table["direct"], table["total"])
    # what is left is the scale of the final norm, which every latent moves a little
    assert np.corrcoef(table["direct"], table["measured"])[0, 1] > 0.9


def test_several_latents_at_once_add_up_and_the_choices_are_those_asked_for() -> None:
    given, model = DICTIONARIES["cross-layer"](), subject("llama")
    graph = attribution_graph(model, given, IDS, settings=SETTINGS)
    left = pruned(graph.edges, graph.weights, graph.nodes, node_share=0.97)
    names = graph.nodes["node"].tolist()
    group = ("mine", [names[0], names[5], "embed@3"])
    changes = changes_of(graph, left.nodes, left.influence, count=3, groups=[group], seed=1)
    assert [change.chosen for change in changes] == ["group", *["influence"] * 3, *["random"] * 3]
    assert changes[0].latents == (0, 5)
    best = [at for at in np.argsort(-left.influence) if left.nodes[at] and graph.nodes["kind"][at] == "latent"][:3]
    assert [change.latents[0] for change in changes[1:4]] == best
    assert all(not left.nodes[change.latents[0]] for change in changes[4:])
    alone = [LatentChange(name, (at,), 0.0, "random") for name, at in (("a", 0), ("b", 5))]
    table = tried(graph, [changes[0], *alone], graph.where("logit")).pivot(index="target", columns="change", values="direct")
    np.testing.assert_allclose(table["mine"], table["a"].fillna(0) + table["b"].fillna(0))
    assert changes_of(graph, left.nodes, left.influence, count=3, groups=[group], seed=1) == changes
    with pytest.raises(SettingsError, match=r"group 'x' names 'm9.f1@2', which is no node of this graph"):
        changes_of(graph, left.nodes, left.influence, count=1, groups=[("x", ["m9.f1@2"])])
    with pytest.raises(SettingsError, match="holds no latent"):
        changes_of(graph, left.nodes, left.influence, count=1, groups=[("x", ["embed@2"])])


def test_agreement_is_the_mean_over_changes_of_rank_correlations() -> None:
    rows = []
    for number in range(7):
        for at, (total, measured) in enumerate([(1.0, 10.0), (2.0, 30.0), (3.0, 20.0 if number < 3 else 40.0)]):
            direct = 0.0 if at == 0 else total
            size = -measured if number == 0 else measured
            about = {"change": f"c{number}", "chosen": "influence", "target": f"t{at}"}
            rows.append({**about, "direct": direct, "total": total, "measured": size})
    found: Any = agreement(pd.DataFrame(rows), "t2").set_index("measure")
    # one change is turned round (−.5), two have .5, four 1
    assert found.loc["rank correlation, all paths", "value"] == pytest.approx((-0.5 + 0.5 * 2 + 4) / 7)
    # skewed as they are, the mean's interval would begin below what a correlation can be
    assert found.loc["rank correlation, all paths", "low"] == -1.0
    assert found.loc["rank correlation, all paths", "value"] < found.loc["rank correlation, all paths", "high"] <= 1.0
    assert found.loc["likeliest logit, measured", "high"] > found.loc["likeliest logit, measured", "value"]
    # two targets have an edge: too few for a correlation
    assert found.loc["rank correlation, direct", "n"] == 0
    assert found.loc["rank correlation, direct", "withheld"] == "too few interventions: 0 of at least 6"
    assert found.loc["likeliest logit, measured", "value"] == pytest.approx((3 * 20 + 4 * 40) / 7)
    assert found.loc["likeliest logit, predicted", "value"] == pytest.approx(3.0)
