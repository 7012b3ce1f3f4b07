"""LoRA goes where the circuit is, its control goes elsewhere with the same shape, and all cost the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.adapt.arms import Arm, BakeOffSettings, plan
from mechscope.adapt.budget import TOLERANCE
from mechscope.adapt.comparison import Outcome, summary_table
from mechscope.adapt.places import critical_layers, random_circuit, read_circuit
from mechscope.adapt.targets import Placement, place
from mechscope.adapt.training import load_tuned, tune
from mechscope.choices import Strategy
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.scores import to_json
from mechscope.data.rouge import METRICS
from mechscope.errors import DataError, SettingsError
from mechscope.settings import resolve
from mechscope.settings.lora import LoraSettings
from mechscope.settings.training import TrainSettings
from mechscope.stats.crossed import MIN_DOCUMENTS, crossed_mean
from mechscope.studies.jobs.bakeoff import JOB as BAKEOFF
from mechscope.studies.runner import run_job
from mechscope.subject.components import Components
from mechscope.subject.load import load
from tests.studies.conftest import TINY, tiny_model

__all__ = ["tiny_model"]

CIRCUIT = Components.parse("a0.h1,a1.h2,a1.h3,m2")
SETTINGS = BakeOffSettings(
    layers=Components.parse("layers:1"),
    circuit=CIRCUIT,
    circuit_layers=Components.parse("layers:2"),
    strategies=("standard", "circuit", "circuit_rank", "random_circuit"),
    seeds=(0, 1),
    lora=LoraSettings(rank=2),
)


def arms_of(subject, strategy: str, settings: BakeOffSettings = SETTINGS, protocol: str = "equal_parameters") -> list[Arm]:
    return [arm for arm in plan(subject, settings) if (arm.strategy, arm.protocol) == (strategy, protocol)]


def placed_of(arm: Arm) -> Placement:
    assert arm.placed is not None
    return arm.placed


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_the_circuit_arm_changes_its_heads_and_mlps_and_nothing_else(make_subject, family):
    subject = make_subject(family)
    (arm, _) = arms_of(subject, "circuit")
    assert arm.components == "a0.h1,a1.h2,a1.h3,m2"
    blocks = subject.anatomy.blocks
    # the MLP is adapted although modules="attention" is what whole layers mean here
    attention = {piece.name for block in blocks[:2] for piece in (block.query, block.key, block.value, block.output)}
    assert {target.name for target in placed_of(arm).targets} == attention | set(blocks[2].mlp_linears)
    (own,) = [target for target in placed_of(arm).targets if target.name == blocks[1].output.name]
    width = own.in_features // subject.anatomy.n_heads
    assert own.columns == tuple(range(2 * width, 4 * width))


def test_training_the_circuit_arm_moves_only_the_circuits_weights(make_subject, examples, tmp_path):
    subject = make_subject("gpt2")
    (arm, _) = arms_of(subject, "circuit")
    settings = TrainSettings(learning_rate_lora=5e-2, batch_size=8, max_steps=3, eval_every=3, patience=None)
    before = {name: weight.clone() for name, weight in subject.model.state_dict().items()}
    tuned = load_tuned(
        subject, tune(subject, examples(8), examples(4, seed=1), tmp_path / "arm", method="lora", placed=placed_of(arm), settings=settings)
    )
    change = {name: weight - before[name] for name, weight in tuned.merge_and_unload().state_dict().items()}
    moved = {name.removesuffix(".weight") for name, by in change.items() if by.abs().max() > 0}
    assert moved == {target.name for target in placed_of(arm).targets}
    own = change["transformer.h.0.attn.c_proj.weight"]
    # stored as (input, output): inputs 8 to 15 are head 1's
    assert own[8:16].abs().max() > 1e-4
    assert own[:8].abs().max() == own[16:].abs().max() == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("circuit", ["a0.h1,a1.h2,a1.h3,m2", "m0,m1", "a0.h0,a0.h1,a0.h2,a0.h3,a2.h1"])
def test_at_equal_parameters_circuit_and_controls_cost_what_the_standard_costs(make_subject, family, circuit):
    subject = make_subject(family, **({"n_embd": 64} if family == "gpt2" else {"hidden_size": 64}))
    arms = plan(subject, replace(SETTINGS, circuit=Components.parse(circuit), protocols=("equal_parameters",), lora=LoraSettings(rank=8)))
    standard = place(subject, Components.parse("layers:0,1,2"), rank=8).trainable_parameters
    assert Counter(arm.strategy for arm in arms) == dict.fromkeys(SETTINGS.strategies, 2)
    for arm in arms:
        assert placed_of(arm).trainable_parameters == pytest.approx(standard, rel=TOLERANCE), (arm.strategy, arm.seed)


def test_at_equal_rank_the_control_costs_exactly_what_the_circuit_costs(make_subject):
    subject = make_subject("gpt2")
    (circuit, _), controls = (arms_of(subject, strategy, protocol="equal_rank") for strategy in ("circuit", "random_circuit"))
    assert set(placed_of(circuit).ranks) == {2}
    # layer 0 has one head, layer 1 two: 3 · 8 rows of q, k, v each and 8 columns of the output projection; the MLP maps 32 → 128 → 32
    assert placed_of(circuit).trainable_parameters == 2 * ((24 + 32 + 8 + 32) + (48 + 32 + 16 + 32) + 2 * (32 + 128))
    assert {placed_of(arm).trainable_parameters for arm in controls} == {placed_of(circuit).trainable_parameters}


def test_more_rank_for_the_circuit_keeps_half_elsewhere(make_subject):
    subject = make_subject("gpt2")
    for protocol, high in (("equal_rank", 4), ("equal_parameters", 8)):
        (arm, _) = arms_of(subject, "circuit_rank", replace(SETTINGS, lora=LoraSettings(rank=4)), protocol)
        ranks = {target.name.split(".")[2]: rank for target, rank in zip(placed_of(arm).targets, placed_of(arm).ranks, strict=True)}
        # 3 · 4 = 2 + 2 + 8
        assert ranks == {"0": 2, "1": 2, "2": high}


def test_each_seed_draws_another_random_circuit_and_both_protocols_use_it(make_subject):
    subject = make_subject("gpt2")
    settings = replace(SETTINGS, seeds=tuple(range(6)))
    drawn = [[arm.components for arm in arms_of(subject, "random_circuit", settings, protocol)] for protocol in settings.protocols]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) >= 4
    assert str(CIRCUIT) not in drawn[0]


def per_layer(components: Components) -> dict[int, int]:
    return Counter(layer for layer, _ in components.heads)


def test_a_random_circuit_has_the_circuits_heads_per_layer_and_any_other_choice_of_them():
    circuit = Components.parse("a0.h1,a2.h0,a2.h1,m1")
    draws = Counter(random_circuit(circuit, 3, 3, seed) for seed in range(2000))
    assert all(per_layer(drawn) == {0: 1, 2: 2} and len(drawn.mlps) == 1 for drawn in draws)
    # 3 heads of layer 0, 3 pairs of layer 2, 3 MLPs, less the circuit itself; each as likely as the others (2000 / 26 = 77 each)
    assert len(draws) == 3 * 3 * 3 - 1
    assert circuit not in draws
    assert min(draws.values()) > 40
    assert max(draws.values()) < 120


def test_where_layers_have_no_other_heads_to_offer_other_layers_do():
    circuit = Components.parse("a1.h0,a1.h1,m0,m1,m2")
    draws = {random_circuit(circuit, 3, 2, seed) for seed in range(100)}
    assert draws == {Components.parse("a0.h0,a0.h1,m0,m1,m2"), Components.parse("a2.h0,a2.h1,m0,m1,m2")}


@pytest.mark.parametrize("circuit", ["a0.h0,a0.h1,a1.h0,a1.h1", "m0,m1", "a0.h0,a0.h1,a1.h0,a1.h1,m0,m1"])
def test_all_heads_or_none_with_all_mlps_or_none_have_no_other_choice(circuit):
    with pytest.raises(SettingsError, match="all or none of the model's"):
        random_circuit(Components.parse(circuit), 2, 2, 0)


def test_critical_layers_are_those_whose_senders_edges_changed_most():
    graph = Graph(3, 2)
    before, after = (np.zeros(len(graph)) for _ in range(2))
    changes = {"embed->logits": 0.5, "a1.h0->logits": -2.0, "m1->a2.h1<q>": 0.2, "a2.h0->m2": 1.5, "m2->logits": 1.0, "m0->m2": -0.4}
    for edge, change in changes.items():
        before[graph.index(edge)] = 3.0
        after[graph.index(edge)] = 3.0 + change
    after[graph.index("m0->logits")] = np.nan  # not scored
    # layer 0: 0.5 (the embedding's) + 0.4, layer 1: 2.0 + 0.2, layer 2: 1.5 + 1.0
    assert [critical_layers(graph, before, after, number=number).layers for number in (1, 2, 3)] == [(2,), (1, 2), (0, 1, 2)]


def test_critical_layers_need_a_score_for_each_edge_and_a_number_that_fits():
    graph = Graph(3, 2)
    scores = np.zeros(len(graph))
    with pytest.raises(SettingsError, match=r"\(5,\).*edges"):
        critical_layers(graph, scores, scores[:5], number=1)
    with pytest.raises(SettingsError, match="choose from 1 to 3"):
        critical_layers(graph, scores, scores, number=4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_circuit_file_becomes_its_heads_and_mlps(make_subject, tmp_path, family):
    subject = make_subject(family)
    graph = Graph.of(subject)
    names = ["embed->a0.h1<k>", "a0.h1->m2", "a0.h1->a1.h3<q>", "a1.h3->m2", "m2->logits"]
    path = tmp_path / "circuit.json"
    path.write_text(to_json(Circuit.of(graph, names), fingerprint="of the tuned model"))
    assert read_circuit(str(path), subject) == Components.parse("a0.h1,a1.h3,m2")
    assert read_circuit("a0.h1, m2", subject) == Components.parse("a0.h1,m2")


def test_a_circuit_that_does_not_fit_the_model_is_refused(make_subject, tmp_path):
    subject = make_subject("gpt2")
    with pytest.raises(SettingsError, match=r"a3\.h0 does not exist"):
        read_circuit("a3.h0", subject)
    path = tmp_path / "circuit.json"
    with pytest.raises(DataError, match="cannot be read"):
        read_circuit(str(path), subject)
    path.write_text(to_json(Circuit.full(Graph(2, 4))))
    with pytest.raises(DataError, match="another model"):
        read_circuit(str(path), subject)
    path.write_text(to_json(Circuit.of(Graph.of(subject), ["embed->logits"])))
    with pytest.raises(DataError, match="nothing to adapt"):
        read_circuit(str(path), subject)


def test_without_named_strategies_those_whose_components_are_given_run():
    def run(**given: Any) -> set[str]:
        return set(BakeOffSettings(layers=Components.parse("layers:1"), **given).strategies)

    always = {"standard", "targeted_layers", "more_rank", "random_layers", "last_layers", "full", "none"}
    assert run() == always
    assert run(heads=Components.parse("a0.h1")) == always | {"targeted_heads"}
    assert run(circuit=CIRCUIT) == always | {"circuit", "random_circuit"}
    assert run(circuit_layers=Components.parse("layers:0")) == always | {"circuit_rank"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"circuit": Components()}, "strategy circuit needs a circuit's heads and MLPs"),
        ({"circuit_layers": Components()}, "circuit_rank needs the circuit's critical layers"),
        ({"circuit": Components.parse("layers:1")}, "must be heads and MLPs"),
        ({"circuit_layers": Components.parse("a0.h1")}, "critical layers a0.h1 must be whole layers"),
        ({"lora": LoraSettings(rank=1)}, "circuit_rank keeps half"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, message):
    with pytest.raises(SettingsError, match=message):
        replace(SETTINGS, **changes)


def test_more_rank_in_every_layer_is_the_standard_and_refused(make_subject):
    with pytest.raises(SettingsError, match=r"circuit_rank .*not all"):
        plan(make_subject("gpt2"), replace(SETTINGS, circuit_layers=Components.parse("layers:0-2")))


def test_the_circuit_is_compared_with_random_circuits_and_layers_with_random_layers():
    generator = np.random.default_rng(0)
    strategies: tuple[Strategy, ...] = ("circuit", "random_circuit", "targeted_layers", "random_layers", "standard")
    scores = {strategy: generator.random((3, MIN_DOCUMENTS)) for strategy in strategies}
    outcomes = [
        Outcome(
            Arm("equal_parameters", strategy, seed, "", None),
            {},
            pd.DataFrame(),
            pd.DataFrame({"id": range(MIN_DOCUMENTS), **dict.fromkeys(METRICS, scores[strategy][seed])}),
            (),
        )
        for strategy in scores
        for seed in (0, 1, 2)
    ]
    rouge1 = summary_table(outcomes).query("metric == 'rouge1'").set_index("strategy").to_dict("index")
    pairs: tuple[tuple[Strategy, Strategy], ...] = (("circuit", "random_circuit"), ("targeted_layers", "random_layers"))
    for strategy, other in pairs:
        difference = scores[strategy] - scores[other]
        interval = crossed_mean(difference)
        found = [rouge1[strategy][name] for name in ("vs_random", "vs_random_low", "vs_random_high")]
        assert found == pytest.approx([difference.mean(), interval.low, interval.high], abs=1e-9)
        assert np.isnan(rouge1[other]["vs_random"])
    assert rouge1["circuit"]["vs_standard"] == pytest.approx((scores["circuit"] - scores["standard"]).mean(), abs=1e-9)
    # without its own control the circuit is not compared with another strategy's
    alone = summary_table([outcome for outcome in outcomes if outcome.arm.strategy != "random_circuit"])
    assert alone.loc[alone["strategy"] == "circuit", "vs_random"].isna().all()
    assert alone.loc[alone["strategy"] == "targeted_layers", "vs_random"].notna().all()


def test_a_bake_off_takes_the_circuit_from_its_file_and_runs_again_when_the_file_changes(tiny_model, tmp_path):
    graph = Graph.of(load(tiny_model, device="cpu"))
    file = tmp_path / "circuit.json"
    flags = TINY | {
        "base": str(tiny_model),
        "target_layers": "layers:1",
        "target_circuit": str(file),
        "max_steps": 2,
        "rank": 4,
        "seeds": 1,
    }
    del flags["replicates"]  # of the difference alone
    settings = resolve(BAKEOFF.settings, strategies="standard,circuit,random_circuit", protocols="equal_parameters", **flags)

    def places(names: list[str]) -> dict[str, set[str]]:
        file.write_text(to_json(Circuit.of(graph, names)))
        tables = run_job(BAKEOFF, settings, tmp_path / "run").tables
        parameters = tables["bakeoff"]["trainable_parameters"]
        assert (parameters - parameters.iloc[0]).abs().max() <= TOLERANCE * parameters.iloc[0]
        assert tables["bakeoff_summary"].query("strategy == 'circuit'")["vs_random"].notna().all()
        return {str(strategy): set(group["components"]) for strategy, group in tables["bakeoff"].groupby("strategy")}

    first = places(["embed->a0.h1<v>", "a0.h1->a2.h3<q>", "a2.h3->m3", "m3->logits"])
    assert first["circuit"] == {"a0.h1,a2.h3,m3"}
    assert len(first["random_circuit"] - first["circuit"]) == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "LoRA in the circuit scores" in page
    assert "random circuits" in page
    second = places(["embed->a1.h1<v>", "a1.h1->m2", "m2->logits"])
    assert second["circuit"] == {"a1.h1,m2"}
