"""A bake-off compares placements fairly, and a killed one ends with the same tables."""

from __future__ import annotations

import math
import pickle
import signal
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.adapt import bakeoff
from mechscope.adapt.arms import NO_SEED, BakeOffSettings, plan
from mechscope.adapt.bakeoff import BakeOff, bake_off
from mechscope.adapt.comparison import steps_to
from mechscope.adapt.generate import encode_prompts, summarize
from mechscope.adapt.places import random_layers
from mechscope.adapt.targets import place
from mechscope.adapt.training import tune
from mechscope.data.documents import Document
from mechscope.data.rouge import rouge
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.settings.decoding import Decoding
from mechscope.settings.lora import LoraSettings
from mechscope.settings.training import TrainSettings
from mechscope.stats.bootstrap import mean_interval
from mechscope.subject.components import Components
from mechscope.subject.load import load

TRAINING = TrainSettings(learning_rate_full=5e-3, learning_rate_lora=2e-2, batch_size=8, max_steps=6, eval_every=2, patience=None)
SETTINGS = BakeOffSettings(
    layers=Components.parse("layers:1"),
    heads=Components.parse("a0.h1,a1.h2,a1.h3,a2.h0"),
    seeds=(0, 1),
    lora=LoraSettings(rank=2),
    training=TRAINING,
    decoding=Decoding(max_new_tokens=4),
)


class Killed(BaseException):
    """Stands for kill -9 inside one process: nothing catches it."""


@pytest.fixture
def documents(examples, tokenizer):
    made = []
    for example in examples(5, seed=2):
        article, summary = (
            tokenizer.decode(example.input_ids[slice(*span)], skip_special_tokens=True) for span in (example.document, example.summary)
        )
        made.append(Document(example.id, article, summary))
    return made


@pytest.fixture
def run(make_subject, examples, documents, tmp_path):
    """Bake off into a folder of this name, everything made anew as in another process."""

    def run(name, settings=SETTINGS, **options):
        return bake_off(
            make_subject("gpt2"), examples(20), examples(6, seed=1), documents, tmp_path / name, settings=settings, max_tokens=64, **options
        )

    return run


@pytest.fixture(scope="module")
def finished():
    """Hold the result of one undisturbed bake-off for the tests that only read it."""
    return {}


@pytest.fixture
def result(run, finished) -> BakeOff:
    if "result" not in finished:
        finished["result"] = run("whole")
    return finished["result"]


def equal(left: BakeOff, right: BakeOff) -> None:
    for field in fields(BakeOff):
        pd.testing.assert_frame_equal(getattr(left, field.name), getattr(right, field.name), check_exact=True)


def test_every_arm_is_there_once_per_seed(result):
    counts = result.arms.groupby(["protocol", "strategy"]).size().to_dict()
    lora = ("standard", "targeted_layers", "targeted_heads", "more_rank", "random_layers", "last_layers")
    expected = {(protocol, strategy): 2 for protocol in ("equal_rank", "equal_parameters") for strategy in lora}
    assert counts == {**expected, ("reference", "full"): 2, ("reference", "none"): 1}


def test_at_equal_parameters_all_placements_cost_the_same(result):
    equal_parameters = result.arms[result.arms["protocol"] == "equal_parameters"]
    standard = equal_parameters.loc[equal_parameters["strategy"] == "standard", "trainable_parameters"].iloc[0]
    assert standard == 3 * 2 * ((32 + 96) + (32 + 32))
    assert ((equal_parameters["trainable_parameters"] - standard).abs() <= 0.02 * standard).all()


def test_at_equal_rank_fewer_layers_cost_in_proportion(result):
    at_rank = result.arms[result.arms["protocol"] == "equal_rank"].groupby("strategy")["trainable_parameters"].first()
    assert at_rank["targeted_layers"] * 3 == at_rank["standard"]
    # the others keep rank 1 of 2
    assert at_rank["more_rank"] * 6 == at_rank["standard"] * 4


def test_full_fine_tuning_trains_everything(result):
    full = result.arms[result.arms["strategy"] == "full"]
    assert (full["trainable_share"] == 1.0).all()


def test_the_standard_is_trained_once_and_listed_in_both_protocols(run, monkeypatch):
    seeds = []

    def counted(*arguments, **options):
        seeds.append(options["execution"].seed)
        return tune(*arguments, **options)

    monkeypatch.setattr(bakeoff, "tune", counted)
    arms = run("small", replace(SETTINGS, strategies=("standard",))).arms
    assert seeds == [0, 1]
    both = [
        arms[arms["protocol"] == protocol].drop(columns="protocol").reset_index(drop=True)
        for protocol in ("equal_rank", "equal_parameters")
    ]
    pd.testing.assert_frame_equal(*both)


def test_the_base_writes_what_the_base_writes(result, make_subject, documents, tokenizer):
    prompts = encode_prompts([document.document for document in documents], tokenizer, decoding=SETTINGS.decoding, max_tokens=64)
    written = summarize(make_subject("gpt2").model, tokenizer, prompts, decoding=SETTINGS.decoding)
    assert result.summaries["base"].tolist() == written
    expected = rouge(written, [document.summary for document in documents])
    base = result.rouge[result.rouge["strategy"] == "none"]
    assert base["id"].tolist() == [document.id for document in documents]
    assert base["rouge1"].tolist() == expected["rouge1"].tolist()
    assert (base["seed"] == NO_SEED).all()


def test_differences_are_paired_by_document_and_seed(result):
    table = result.rouge[result.rouge["protocol"] == "equal_parameters"]
    grid = {
        strategy: table[table["strategy"] == strategy].pivot(index="seed", columns="id", values="rouge1").to_numpy()
        for strategy in ("targeted_layers", "standard", "random_layers")
    }
    row = result.summary.query("protocol == 'equal_parameters' and strategy == 'targeted_layers' and metric == 'rouge1'").iloc[0]
    assert row["mean"] == pytest.approx(grid["targeted_layers"].mean())
    assert row["vs_standard"] == pytest.approx((grid["targeted_layers"] - grid["standard"]).mean())
    assert row["vs_random"] == pytest.approx((grid["targeted_layers"] - grid["random_layers"]).mean())
    order = result.rouge["id"].iloc[:5]  # the bootstrap draws documents by place
    columns = np.argsort(np.argsort(order.to_numpy()))
    # two seeds say nothing of a third
    assert np.isnan([row["vs_standard_low"], row["vs_standard_high"], row["low"], row["high"]]).all()
    assert row["withheld"] == "too few seeds: 2 of at least 3"
    differences = (grid["targeted_layers"] - grid["standard"])[:, columns]
    assert row["vs_standard_sd"] == pytest.approx(differences.mean(1).std(ddof=1))
    these = mean_interval(differences.mean(0))
    found = [row["vs_standard_documents_low"], row["vs_standard_documents_high"]]
    assert found == pytest.approx([these.low, these.high], nan_ok=True)
    assert (row["n_seeds"], row["n_documents"]) == (2, 5)


def test_nothing_is_compared_with_itself(result):
    for strategy, column in (("standard", "vs_standard"), ("random_layers", "vs_random")):
        assert result.summary.loc[result.summary["strategy"] == strategy, column].isna().all()


def test_steps_to_the_standards_best_loss_are_read_off_the_curve(result):
    for _, arm in result.arms.iterrows():
        standard = result.arms.query("strategy == 'standard' and seed == @arm.seed")
        if standard.empty:
            continue
        curve = result.curves.query("protocol == @arm.protocol and strategy == @arm.strategy and seed == @arm.seed")
        reached = [row.step for row in curve.itertuples() if row.validation_loss <= standard["best_loss"].iloc[0]]
        assert arm["steps_to_standard_best"] == (min(reached) if reached else pytest.approx(math.nan, nan_ok=True))
    standard = result.arms[result.arms["strategy"] == "standard"]
    assert (standard["steps_to_standard_best"] == standard["best_step"]).all()


def test_a_loss_never_reached_has_no_step():
    curve = pd.DataFrame({"step": [0, 5, 10], "validation_loss": [3.0, 2.0, 2.5]})
    assert [steps_to(curve, 2.0), steps_to(curve, 2.2)] == [5, 5]
    assert math.isnan(steps_to(curve, 1.9))


def test_all_curves_begin_at_the_bases_loss(result):
    start = result.curves[result.curves["step"] == 0]
    assert start["validation_loss"].nunique() == 1
    assert len(start) == len(result.arms)


def test_arms_of_one_seed_see_the_same_tokens(result):
    seen = result.curves[result.curves["seed"] == 1].groupby("step")["tokens"].nunique()
    assert (seen == 1).all()


def test_random_layers_are_drawn_per_seed_and_are_never_exactly_the_target():
    draws = {random_layers(4, (1, 2), seed) for seed in range(60)}
    assert len(draws) == 5  # of the 6 pairs, all but the target
    assert (1, 2) not in draws
    assert random_layers(4, (1, 2), 7) == random_layers(4, (1, 2), 7)


def test_last_layers_are_the_last(make_subject):
    arms = plan(make_subject("gpt2"), replace(SETTINGS, layers=Components.parse("layers:0,1"), strategies=("last_layers",)))
    assert {arm.components for arm in arms} == {"layers:1,2"}


def test_more_rank_at_equal_parameters_keeps_half_elsewhere(make_subject):
    subject = make_subject("gpt2")
    (arm,) = plan(
        subject, replace(SETTINGS, lora=LoraSettings(rank=4), strategies=("more_rank",), protocols=("equal_parameters",), seeds=(0,))
    )
    assert arm.placed is not None
    ranks = {target.name.split(".")[2]: rank for target, rank in zip(arm.placed.targets, arm.placed.ranks, strict=True)}
    assert ranks == {"0": 2, "1": 8, "2": 2}
    assert arm.placed.trainable_parameters == place(subject, Components.parse("layers:0,1,2"), rank=4).trainable_parameters


def test_a_bake_off_killed_between_and_within_arms_ends_with_the_same_tables(run, result):
    # steps of training and summaries, counted over the whole bake-off
    for moment in (4, 9, 23):
        count = 0

        def kill(label, done, total, moment=moment):
            nonlocal count
            count += label != "bake-off"
            if count == moment:
                raise Killed

        with pytest.raises(Killed):
            run("cut", execution=Execution(progress=kill))
    equal(result, run("cut"))


@pytest.mark.parametrize("function", ["write_json", "write_table", "rouge"])
def test_a_kill_while_an_arm_is_stored_costs_nothing_but_time(run, monkeypatch, function):
    small = replace(SETTINGS, strategies=("standard", "none"), protocols=("equal_rank",), seeds=(0,))
    whole = run("small", small)

    def die(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(bakeoff, function, die)
        with pytest.raises(Killed):
            run("cut", small)
    equal(whole, run("cut", small))


def test_a_finished_bake_off_trains_nothing(run, monkeypatch, tmp_path):
    small = replace(SETTINGS, strategies=("standard", "full", "none"), seeds=(0,))
    first = run("small", small)
    monkeypatch.setattr(bakeoff, "tune", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(bakeoff, "summarize", lambda *a, **k: pytest.fail("summarized again"))
    equal(first, run("small", small))


def test_adapters_stay_and_full_copies_go(run, tmp_path):
    run("small", replace(SETTINGS, strategies=("standard", "full"), protocols=("equal_rank",), seeds=(0,)))
    kept = [path.parent for path in (tmp_path / "small").glob("arms/*/model/*.safetensors")]
    assert len(kept) == 1
    assert (kept[0] / "adapter_config.json").is_file()


KILLED_SCRIPT = """
import os, pickle, signal, sys
from mechscope.adapt.bakeoff import bake_off
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load

count = 0

def progress(label, done, total):
    global count
    count += 1
    if count == 14:
        os.kill(os.getpid(), signal.SIGKILL)

with open(sys.argv[1], "rb") as file:
    base, arguments, options = pickle.load(file)
bake_off(load(base, device="cpu"), *arguments, **options, execution=Execution(progress=progress))
"""


def test_a_bake_off_killed_by_kill_9_is_continued_by_another_process(make_subject, examples, documents, tmp_path):
    base = tmp_path / "base"
    make_subject("gpt2").model.save_pretrained(base)
    make_subject("gpt2").tokenizer.save_pretrained(base)
    options: dict[str, Any] = {
        "settings": replace(SETTINGS, strategies=("standard", "targeted_layers", "none"), seeds=(0,)),
        "max_tokens": 64,
    }
    cut = (examples(20), examples(6, seed=1), documents, tmp_path / "cut")
    with (tmp_path / "request").open("wb") as file:
        pickle.dump((base, cut, options), file)
    command = [sys.executable, "-c", KILLED_SCRIPT, str(tmp_path / "request")]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 0 < len(list(cut[-1].glob("arms/*/arm.json"))) < 4
    subject = load(base, device="cpu")
    equal(bake_off(subject, *cut, **options), bake_off(subject, *cut[:-1], tmp_path / "whole", **options))


def test_an_impossible_budget_is_refused_before_anything_is_trained(run, monkeypatch):
    monkeypatch.setattr(bakeoff, "tune", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(SettingsError, match="targeted_heads cannot have"):
        run("out", replace(SETTINGS, lora=LoraSettings(rank=8), heads=Components.parse("a0.h0")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ("best",)}, r"'strategies' is \('best',\): should be 'standard'"),
        ({"protocols": ("reference",)}, r"'protocols' is \('reference',\): should be 'equal_rank'"),
        ({"seeds": (1, 1)}, "must be different"),
        ({"heads": Components()}, "targeted_heads needs heads"),
        ({"layers": Components.parse("a0.h1")}, "must be whole layers"),
        ({"lora": LoraSettings(rank=1)}, "at least 2"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, message):
    with pytest.raises(SettingsError, match=message):
        replace(SETTINGS, **changes)


def test_targeting_all_layers_leaves_none_to_draw(make_subject):
    with pytest.raises(SettingsError, match="not all"):
        plan(make_subject("gpt2"), replace(SETTINGS, layers=Components.parse("layers:0,1,2")))


def test_no_documents_are_refused(make_subject, examples, tmp_path):
    with pytest.raises(DataError, match="no held-out documents"):
        bake_off(make_subject("gpt2"), examples(4), examples(4), [], tmp_path, settings=SETTINGS)


def test_more_tokens_than_the_model_has_positions_are_refused(make_subject, examples, documents, tmp_path):
    with pytest.raises(SettingsError, match=r"65 tokens .* 64 positions"):
        bake_off(make_subject("gpt2"), examples(4), examples(4), documents, tmp_path, settings=SETTINGS, max_tokens=65)
