"""`mechscope routing` gives what the functions give, of one model and of two, shows it, and refuses dense models before a token is read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mechscope.causal import mean_of, run_counterfactuals
from mechscope.data.documents import Document
from mechscope.data.pairs import Pairs
from mechscope.errors import ModelError
from mechscope.instrument import load
from mechscope.studies.inputs import read_documents
from mechscope.studies.job import Result
from mechscope.studies.jobs import ablate, counterfactual, patch
from mechscope.studies.jobs.diff import JOB as DIFF
from mechscope.studies.jobs.routing import JOB
from mechscope.studies.runner import run_job
from mechscope.subject import Subject, pair
from mechscope.weights import routing, routing_change
from tests import families
from tests.causal.pairs import random_pairs
from tests.matrix.plain import build
from tests.studies.jobs.running import findings, refuses, shown

PAIRS = random_pairs(8)
# effects that are set need no pass in another precision
SMALLEST: dict[str, Any] = {
    "smallest_entropy_change": 0.01,
    "smallest_attention_kl": 1e-4,
    "smallest_write_change": 0.03,
    "smallest_residual_cosine": 1e-4,
    "smallest_output_kl": 1e-3,
    "smallest_loss_change": 0.01,
}


@cache
def subject(seed: int = 0) -> Subject:
    """Return a mixture of experts whose first layer is dense."""
    return load(build("deepseek_v3", seed, torch.float32), tokenizer=families.tokenizer())


def run(out: Path | None, **models: Subject) -> Result:
    """Run the job."""
    named: dict[str, Any] = dict.fromkeys((*models, "pairs"), "given in memory")
    return run_job(JOB, JOB.resolve(**named), out, given={**models, "pairs": PAIRS})


def test_tables_of_one_model_are_those_of_the_function_and_the_page_shows_them(tmp_path: Path) -> None:
    result, expected = run(tmp_path / "run", model=subject()), routing(subject(), PAIRS)
    pd.testing.assert_frame_equal(result.tables["routing"].drop(columns="model"), expected.layers)
    pd.testing.assert_frame_equal(result.tables["experts"].drop(columns="model"), expected.experts)
    assert set(result.tables["routing"]["model"]) == {"model"}
    assert set(result.tables["experts"]["component"]) == {f"m{layer}.e{expert}" for layer in (1, 2) for expert in range(4)}
    assert "routing_changes" not in result.tables
    assert "an even share" in shown(result, "routing")


def test_tables_of_two_models_are_those_of_the_function_and_the_page_shows_them(tmp_path: Path) -> None:
    result, expected = run(tmp_path / "run", model=subject(), tuned=subject(1)), routing_change(pair(subject(), subject(1)), PAIRS)
    for label, side in (("base", expected.base), ("tuned", expected.tuned)):
        own = {name: result.tables[name][result.tables[name]["model"] == label] for name in ("routing", "experts")}
        pd.testing.assert_frame_equal(own["routing"].drop(columns="model").reset_index(drop=True), side.layers)
        pd.testing.assert_frame_equal(own["experts"].drop(columns="model").reset_index(drop=True), side.experts)
    pd.testing.assert_frame_equal(result.tables["routing_changes"], expected.layers)
    pd.testing.assert_frame_equal(result.tables["expert_changes"], expected.experts)
    page = shown(result, "routing")
    assert "Which experts fine-tuning moved" in page
    # weakens two tables, and is said once
    assert page.partition('aria-label="What weakens this"')[2].partition("</ul>")[0].count("Only 8 texts were read") == 1


def compared(base: Subject, tuned: Subject, out: Path | None = None) -> tuple[Result, Pairs]:
    """Compare two models on documents, and return these as texts too."""
    corpus = [Document(str(row), " ".join(f"w{3 + (row + place) % 7}" for place in range(6 + row)), "w4 w5") for row in range(6)]
    settings = DIFF.resolve(
        **dict.fromkeys(("base", "tuned", "data"), "given in memory"),
        template="{document} w9 {summary}",
        noise_draws=0,
        replicates=4,
        **SMALLEST,
    )
    result = run_job(DIFF, settings, out, given={"base": base, "tuned": tuned, "data": corpus})
    return result, read_documents(settings, corpus, len(corpus), base).pairs


def test_a_difference_of_mixtures_has_the_tables_of_their_routing_on_its_documents(tmp_path: Path) -> None:
    result, texts = compared(subject(), subject(1), tmp_path / "run")
    expected = routing_change(pair(subject(), subject(1)), texts)
    pd.testing.assert_frame_equal(result.tables["routing_changes"], expected.layers)
    pd.testing.assert_frame_equal(result.tables["expert_changes"], expected.experts)
    assert set(result.tables["routing"]["model"]) == {"base", "tuned"}
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    assert page.index('<section id="weights">') < page.index('<section id="routing">') < page.index('<section id="outputs">')


def test_a_difference_of_dense_models_says_nothing_of_routing_nor_does_one_whose_routers_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpt2 = [load(families.build("gpt2", seed=seed), tokenizer=families.tokenizer()) for seed in (0, 1)]
    dense, _ = compared(gpt2[0], gpt2[1])
    assert not {"routing", "experts", "routing_changes", "expert_changes"} & set(dense.tables)
    assert not dense.tables["caveats"]["caveat"].str.contains("outing").any()
    monkeypatch.setattr("mechscope.instrument.routers._kind", lambda *_: None)
    unread, _ = compared(subject(), subject(1))
    assert "routing" not in unread.tables
    assert not unread.tables["heads"].empty
    assert unread.tables["caveats"]["caveat"].str.contains("Routing is left out.*neither a softmax nor a sigmoid").any()


def test_sentences_name_the_expert_with_most_load_and_the_one_that_moved_most() -> None:
    tables = dict(run(None, model=subject(), tuned=subject(1)).tables)
    experts, changes, layers = (tables[name].copy() for name in ("experts", "expert_changes", "routing_changes"))
    experts.loc[experts["component"] == "m2.e1", ["load", "load_low", "load_high"]] = [3.0, 2.5, 3.5]
    experts["unused"] = experts["component"].isin(["m1.e0", "m2.e3"])
    changes["weight_change"], changes["load_change_q"] = 0.01, 0.5
    changes.loc[changes["component"] == "m1.e3", ["weight_change", "load_change", "load_change_low", "load_change_high"]] = [
        0.25,
        -0.5,
        -0.7,
        -0.3,
    ]
    changes.loc[changes["component"] == "m2.e2", "load_change_q"] = 0.01
    layers["kl"], layers["top1_agreement"] = 0.1, 0.9
    layers.loc[layers["component"] == "m2", ["kl", "kl_low", "kl_high", "top1_agreement"]] = [0.4, 0.3, 0.5, 0.75]
    routers, moved, _, _, base, tuned = findings(
        "routing", **{**tables, "experts": experts, "expert_changes": changes, "routing_changes": layers}
    )
    assert "moved the router of m2 most: KL 0.400 [0.300, 0.500] nats, with the same first expert for 75" in routers
    assert "The load of 1 of 8 experts changed (q < 0.05). The weights of m1.e3 moved most, by 0.250 of their norm" in moved
    assert "its load changed by −0.500 [−0.700, −0.300] of an even share (n = 8 texts)." in moved
    for sentence, model in ((base, "base"), (tuned, "tuned")):
        assert f"most loaded expert of the {model} model is m2.e1, with 3.00 [2.50, 3.50] times an even share" in sentence
        assert "2 of 8 experts get no token of these texts" in sentence


def test_a_dense_model_is_refused_before_it_reads_a_token(tmp_path: Path) -> None:
    refuses(JOB, tmp_path / "run", ModelError, r"\(gpt2\) has no experts: all its MLPs are dense")


@pytest.mark.parametrize(
    ("job", "components", "site"), [(ablate.JOB, "m1.e2", "expert_output"), (patch.JOB, "m1.e2,m1.e0", "expert_output")]
)
def test_experts_are_components_of_ablation_and_patching(job: Any, components: str, site: str) -> None:
    settings = job.resolve(model="given in memory", pairs="given in memory", components=components)
    effects = run_job(job, settings, None, given={"model": subject(), "pairs": PAIRS}).effects
    assert sorted(effects["component"]) == sorted(components.split(","))
    assert set(effects["site"]) == {site}


def test_a_run_may_take_an_expert_from_its_mean_and_other_parts_with_it(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"one": {"m1.e2": "mean", "a0.h1": "corrupt"}, "none": {}}), encoding="utf-8")
    settings = counterfactual.JOB.resolve(model="given in memory", pairs="given in memory", runs=str(file))
    result = run_job(counterfactual.JOB, settings, None, given={"model": subject(), "pairs": PAIRS}).counterfactual
    source = mean_of(subject(), PAIRS, ("z", "expert_output"))
    expected = run_counterfactuals(subject(), PAIRS, {"one": {"m1.e2": source, "a0.h1": "corrupt"}, "none": {}}).table
    pd.testing.assert_frame_equal(result[expected.columns.tolist()], expected)


def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(Exception, match="has 70 tokens, the model reads 64"):
        run_job(
            JOB,
            JOB.resolve(model="given in memory", pairs="given in memory"),
            None,
            given={"model": subject(), "pairs": random_pairs(6, lengths=(70,))},
        )
