"""The claims about targeted LoRA, on bake-offs made to say one thing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.difference.selection import selection_table
from mechscope.studies.paper_2505_17073.claims import CLAIMS, claims_table
from mechscope.studies.paper_2505_17073.judgement import Judgement, Scope

NAN = float("nan")


def summary(
    *, standard: tuple[float, float, float] = (NAN,) * 3, random: tuple[float, float, float] = (NAN,) * 3, seeds: int = 3
) -> pd.DataFrame:
    """Return the bake-off's intervals where targeted layers differ from standard and from random by (value, low, high)."""
    records = []
    for metric in ("rouge1", "rougeL"):
        # the metric that does not decide says the opposite
        sign = 1.0 if metric == "rougeL" else -1.0
        record: dict[str, Any] = {
            "protocol": "equal_rank",
            "strategy": "targeted_layers",
            "metric": metric,
            "n_seeds": seeds,
            "n_documents": 100,
        }
        for name, (value, low, high) in (("vs_standard", standard), ("vs_random", random)):
            ends = (min(sign * low, sign * high), max(sign * low, sign * high))
            over = ends if seeds >= 3 else (NAN, NAN)
            record |= {name: sign * value, f"{name}_low": over[0], f"{name}_high": over[1], f"{name}_sd": 0.01 if seeds > 1 else NAN}
            record |= {f"{name}_documents_low": ends[0], f"{name}_documents_high": ends[1]}
        records.append(record)
        records.append(record | {"strategy": "last_layers", "vs_standard": 0.5, "vs_standard_low": 0.4, "vs_standard_high": 0.6})
    return pd.DataFrame(records)


def bakeoff(
    steps: list[float],
    *,
    standard_steps: int = 100,
    parameters: int = 300,
    protocol_of_standard: str = "equal_rank",
    converged: bool = True,
) -> pd.DataFrame:
    """Return a bake-off where targeted layers reach standard LoRA's best loss after the given steps, one per seed; NaN never do."""
    records = []
    for seed, needed in enumerate(steps):
        common = {"seed": seed, "converged": converged, "protocol": "equal_rank"}
        records.append(
            common
            | {"strategy": "targeted_layers", "best_step": 40, "steps_to_standard_best": needed, "trainable_parameters": parameters}
            | {"components": "layers:2,3,5", "best_loss": 2.0 if needed == needed else 2.3 + 0.01 * seed}
        )
        records.append(
            common
            | {"strategy": "standard", "best_step": standard_steps, "steps_to_standard_best": standard_steps, "trainable_parameters": 1200}
            | {"components": "layers:0-11", "protocol": protocol_of_standard, "best_loss": 2.0}
        )
    return pd.DataFrame(records)


def curves(bake: pd.DataFrame, every: int = 5) -> pd.DataFrame:
    """Return curves that fall to each run's best loss, by straight lines, at the step that the bake-off says; those that never reach it end higher."""
    records = []
    for arm in bake.to_dict("records"):
        end = arm["steps_to_standard_best"] if arm["strategy"] == "targeted_layers" else arm["best_step"]
        end = 200 if end != end else end
        for step in range(0, 201, 5):
            loss = max(arm["best_loss"], arm["best_loss"] + 1.0 - step / end) if step % every == 0 else NAN
            records.append({**{name: arm[name] for name in ("protocol", "strategy", "seed")}, "step": step, "validation_loss": loss})
    return pd.DataFrame(records)


def judged(name: str, tables: dict[str, pd.DataFrame], **scope: Any) -> Judgement | None:
    """Judge one claim by some tables."""
    (claim,) = [claim for claim in CLAIMS if claim.name == name]
    return claim.judge({needed: tables[needed] for needed in claim.needs if needed in tables}, Scope(**scope))


def claim(name: str, bake: pd.DataFrame | None = None, intervals: pd.DataFrame | None = None, *, every: int = 5, **scope: Any) -> Judgement:
    tables = {"bakeoff": bake, "bakeoff_summary": intervals, "learning_curves": None if bake is None else curves(bake, every)}
    judgement = judged(name, {name: table for name, table in tables.items() if table is not None}, **scope)
    assert judgement is not None
    return judgement


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.010, 0.002, 0.018), "supported"),
        ((-0.001, -0.004, 0.002), "supported"),  # worse by less than half a point
        ((-0.001, -0.012, 0.010), "undecided"),
        ((-0.007, -0.010, -0.004), "undecided"),
        ((-0.030, -0.040, -0.020), "contradicted"),
    ],
)
def test_at_least_as_good_as_standard_means_not_worse_by_the_margin(interval: tuple[float, float, float], verdict: str) -> None:
    judgement = claim("targeted_vs_standard.equal_rank", intervals=summary(standard=interval))
    assert judgement.verdict == verdict
    assert (judgement.value, judgement.low, judgement.high) == pytest.approx(interval)


def test_the_margin_is_the_readers() -> None:
    intervals = summary(standard=(-0.001, -0.004, 0.002))
    assert claim("targeted_vs_standard.equal_rank", intervals=intervals, margin=0.0).verdict == "undecided"
    assert claim("targeted_vs_standard.equal_rank", intervals=intervals, margin=0.005).verdict == "supported"


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.010, 0.002, 0.018), "supported"), ((0.003, -0.001, 0.007), "undecided"), ((-0.010, -0.018, -0.002), "contradicted")],
)
def test_better_than_random_layers_means_better(interval: tuple[float, float, float], verdict: str) -> None:
    assert claim("targeted_vs_random.equal_rank", intervals=summary(random=interval)).verdict == verdict


def test_the_metric_is_the_readers() -> None:
    intervals = summary(random=(0.010, 0.002, 0.018))
    assert claim("targeted_vs_random.equal_rank", intervals=intervals, metric="rouge1").verdict == "contradicted"


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_or_two_seeds_decide_nothing_and_it_is_said_how_many_would(seeds: int) -> None:
    judgement = claim("targeted_vs_random.equal_rank", intervals=summary(random=(0.010, 0.002, 0.018), seeds=seeds))
    assert judgement.verdict == "undecided"
    assert np.isnan([judgement.low, judgement.high]).all()
    assert "So few trainings cannot tell a placement from its seed" in judgement.note
    # what is known of these trainings is named as theirs
    assert "+1.00 points (of these trainings, over documents: +0.20 to +1.80)" in judgement.measured
    if seeds == 1:
        assert judgement.overturn.startswith("At least 3 seeds")
    else:
        # t(.975, 17) · 1 point / √18 = .497: half a point
        assert judgement.overturn.startswith("About 18 seeds give an interval of ± 0.5 points: differences vary by 1.00 points (SD)")


def test_few_documents_decide_nothing_and_it_is_said_how_many_would() -> None:
    intervals = summary(random=(0.010, 0.002, 0.018)).assign(n_documents=24, vs_random_low=NAN, vs_random_high=NAN)
    judgement = claim("targeted_vs_random.equal_rank", intervals=intervals)
    assert judgement.verdict == "undecided"
    assert "Paired over 24 documents and 3 seeds. So few documents say nothing of others" in judgement.note
    assert judgement.overturn == "At least 60 documents (rouge_documents)."


def test_a_protocol_that_was_not_run_is_not_measured() -> None:
    judgement = claim("targeted_vs_standard.equal_parameters", intervals=summary(standard=(0.010, 0.002, 0.018)))
    assert (judgement.verdict, judgement.measured) == ("undecided", "not measured")


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [
        ([50.0, 55.0, 60.0], "supported"),
        ([50.0, 140.0, 90.0], "undecided"),
        ([150.0, 160.0, 155.0], "contradicted"),
        ([NAN, NAN, NAN], "contradicted"),
        ([50.0, NAN, 60.0], "undecided"),
        ([100.0, 100.0, 100.0], "undecided"),
        ([50.0], "undecided"),
        ([NAN], "undecided"),
    ],
)
def test_fewer_steps_are_counted_to_standard_loras_best_loss(steps: list[float], verdict: str) -> None:
    assert claim("fewer_steps.equal_rank", bake=bakeoff(steps)).verdict == verdict


def test_the_ratio_of_steps_is_a_geometric_mean_with_a_t_interval() -> None:
    judgement = claim("fewer_steps.equal_rank", bake=bakeoff([25.0, 50.0, 100.0]))
    # logs −2 ln 2, −ln 2, 0: mean −ln 2, standard error ln 2 / √3, t(.975, 2) = 4.3027
    assert judgement.unit == "training"
    assert judgement.value == pytest.approx(0.5)
    assert judgement.low == pytest.approx(0.5 * 2 ** (-4.3027 / 3**0.5), rel=1e-4)
    assert judgement.high == pytest.approx(0.5 * 2 ** (4.3027 / 3**0.5), rel=1e-4)
    assert judgement.verdict == "undecided"


def test_a_saving_no_larger_than_the_distance_between_evaluations_decides_nothing() -> None:
    runs = bakeoff([80.0, 80.0, 80.0])
    assert claim("fewer_steps.equal_rank", bake=runs, every=10).verdict == "supported"
    judgement = claim("fewer_steps.equal_rank", bake=runs, every=20)
    assert judgement.verdict == "undecided"
    assert "every 20 steps" in judgement.note


def test_two_seeds_say_nothing_of_steps() -> None:
    judgement = claim("fewer_steps.equal_rank", bake=bakeoff([50.0, 55.0]))
    assert (judgement.verdict, judgement.overturn) == ("undecided", "At least 3 seeds.")
    assert np.isnan(judgement.low)


def test_the_ratio_of_steps_turns_over_with_the_arms() -> None:
    # both are followed to the loss that both reach, so no arm sets a goal that suits it
    runs = bakeoff([50.0, 60.0, 55.0])
    turned = {"targeted_layers": "standard", "standard": "targeted_layers"}
    table = curves(runs)
    there = judged("fewer_steps.equal_rank", {"bakeoff": runs, "learning_curves": table})
    back = judged("fewer_steps.equal_rank", {"bakeoff": runs, "learning_curves": table.assign(strategy=table["strategy"].map(turned))})
    assert there is not None
    assert back is not None
    assert (back.value, back.low, back.high) == pytest.approx((1 / there.value, 1 / there.high, 1 / there.low))


def test_a_standard_run_shared_by_the_protocols_is_found() -> None:
    runs = bakeoff([50.0, 55.0, 52.0], protocol_of_standard="reference")
    assert claim("fewer_steps.equal_rank", bake=runs).verdict == "supported"


def test_standard_lora_that_was_still_improving_is_told() -> None:
    judgement = claim("fewer_steps.equal_rank", bake=bakeoff([50.0, 55.0], converged=False))
    assert "4 of these 4 trainings had not converged" in judgement.note


@pytest.mark.parametrize(("parameters", "verdict"), [(300, "supported"), (400, "supported"), (600, "undecided"), (1200, "contradicted")])
def test_fewer_parameters_are_counted(parameters: int, verdict: str) -> None:
    judgement = claim("fewer_parameters", bake=bakeoff([50.0], parameters=parameters))
    assert judgement.verdict == verdict
    assert judgement.value == pytest.approx(1 - parameters / 1200)


def judged_with_a_bakeoff(kl: float) -> pd.DataFrame:
    """Return the claims table of a small model whose heads all changed by the given KL, with a bake-off that favours targeting."""
    heads = pd.DataFrame([("all", i, j, kl, kl / 10, -kl, 0.001) for i in range(4) for j in range(2)])
    heads.columns = pd.Index(["rows", "layer", "head", "kl_base_tuned", "kl_base_tuned_se", "entropy_change", "entropy_change_q"])
    heads["entropy_change_p"] = 0.001
    layers = heads.groupby(["rows", "layer"], as_index=False)[["kl_base_tuned"]].mean()
    selection = selection_table(heads, layers, rules=["layers_by_kl"])
    tables = {"heads": heads, "layers": layers, "selection": selection, "bakeoff": bakeoff([50.0, 55.0, 60.0])}
    tables |= {"bakeoff_summary": summary(standard=(0.01, 0.002, 0.018)), "learning_curves": curves(tables["bakeoff"])}
    return claims_table(tables).set_index("claim")


def test_targets_picked_from_equal_models_are_no_targets() -> None:
    table = judged_with_a_bakeoff(kl=0.0)
    assert set(table["verdict"]) == {"no change", "undecided"}
    assert table["value"].notna()["targeted_vs_standard.equal_rank"]


def test_a_whole_bakeoff_reaches_the_table() -> None:
    table = judged_with_a_bakeoff(kl=0.1)
    assert table.loc["targeted_vs_standard.equal_rank", "verdict"] == "supported"
    assert table.loc["fewer_steps.equal_rank", "verdict"] == "supported"
    assert table.loc["fewer_parameters", "verdict"] == "supported"
    assert table.loc["targeted_vs_random.equal_rank", "verdict"] == "undecided"


def circuit_summary(standard: tuple[float, float, float], random: tuple[float, float, float], seeds: int = 3) -> pd.DataFrame:
    """Return intervals where the circuit differs so at equal parameters, and targeted layers decide nothing."""
    targeted = summary(standard=(0.0, -0.9, 0.9), random=(0.0, -0.9, 0.9))
    circuit = summary(standard=standard, random=random, seeds=seeds).query("strategy == 'targeted_layers'").assign(strategy="circuit")
    return pd.concat([targeted, circuit], ignore_index=True).assign(protocol="equal_parameters")


@pytest.mark.parametrize(
    ("standard", "random", "verdicts"),
    [
        ((-0.001, -0.004, 0.002), (0.010, 0.002, 0.018), ("supported", "supported")),  # worse than standard by less than half a point
        ((-0.030, -0.040, -0.020), (-0.001, -0.004, 0.002), ("contradicted", "undecided")),
    ],
)
def test_the_circuit_is_judged_by_its_own_differences(
    standard: tuple[float, float, float], random: tuple[float, float, float], verdicts: tuple[str, str]
) -> None:
    intervals = circuit_summary(standard, random)
    judgements = [claim(f"circuit_vs_{other}.equal_parameters", intervals=intervals) for other in ("standard", "random")]
    assert tuple(one.verdict for one in judgements) == verdicts
    assert [(one.value, one.low, one.high) for one in judgements] == [pytest.approx(standard), pytest.approx(random)]
    assert "circuit minus random circuits" in judgements[1].measured


def test_one_seed_decides_nothing_about_the_circuit() -> None:
    intervals = circuit_summary((0.010, 0.002, 0.018), (0.010, 0.002, 0.018), seeds=1)
    assert claim("circuit_vs_random.equal_parameters", intervals=intervals).verdict == "undecided"


def circuit_claims(intervals: pd.DataFrame) -> list[str]:
    names = [claim.name for claim in CLAIMS if claim.name.startswith("circuit_vs")]
    return [name for name in names if judged(name, {"bakeoff_summary": intervals}) is not None]


def test_claims_about_a_circuit_that_was_not_compared_are_left_out() -> None:
    assert circuit_claims(summary(standard=(0.010, 0.002, 0.018))) == []
    without_control = circuit_summary((0.010, 0.002, 0.018), (NAN,) * 3)
    assert circuit_claims(without_control) == ["circuit_vs_standard.equal_parameters"]
    # with fewer parameters than the standard the place alone is not compared
    assert circuit_claims(without_control.assign(protocol="equal_rank")) == []
