"""Several processes share a measurement: equal results whatever their number, also when one is killed, and only rank 0 writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from mechscope.difference import Difference, compare_weights
from mechscope.store.run import RunFolder, verify
from tests.difference import oracle
from tests.ranks import jobs
from tests.ranks.launch import ended, files, together
from tests.studies.conftest import tiny_model

__all__ = ["tiny_model"]  # a fixture of the tests below

SIZES = (2, 3)
TABLES = ("heads", "layers", "weights", "outputs")


def assert_equal_results(one: Difference, other: Difference, **tolerance: Any) -> None:
    for name in TABLES:
        assert_frame_equal(getattr(one, name), getattr(other, name), obj=name, **(tolerance or {"rtol": 1e-9, "atol": 1e-9}))
    for name in ("kl_base_tuned", "entropy_change"):
        np.testing.assert_allclose(one.replicates(name), other.replicates(name), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def alone() -> Difference:
    """Measure the difference in one process."""
    return jobs.measured()


@pytest.mark.parametrize("size", SIZES)
def test_what_is_brought_together_is_the_same_on_every_rank(size: int):
    seen = together(size, jobs.exchanged)
    assert [one["rank"] for one in seen] == list(range(size))
    assert sorted(item for one in seen for item in one["own"]) == list(range(7))
    assert seen[1]["own"] == list(range(1, 7, size))
    everyone = [10 * rank for rank in range(size)]
    assert all(one["exchange"] == everyone for one in seen)
    assert [one["collect"] for one in seen] == [everyone] + [[]] * (size - 1)
    assert all(one["agreed"] == "from 0" for one in seen)
    assert all(one["by_first"] == "done by 0, 1 in sight" for one in seen)
    assert [one["error"] for one in seen] == ["DataError: rank 0 met this"] + ["ElsewhereError: rank 0 met this"] * (size - 1)
    assert [one["label"] for one in seen] == [f" (rank {rank})" for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_a_difference_is_that_of_one_process(size: int, alone: Difference):
    assert len(jobs.LENGTHS) % size, "the last share should be smaller"
    for found in together(size, jobs.measured):
        assert_equal_results(found, alone)
        assert set(found.heads["n"]) == {len(jobs.LENGTHS)}


def test_ranks_share_the_comparison_of_weights():
    counts = together(2, jobs.matrices)
    assert sum(counts) == len(compare_weights(oracle.models("llama")).table)
    assert max(counts) - min(counts) <= 1


def test_a_rank_without_documents_gets_the_result_too():
    whole = jobs.measured(tokens=10_000)  # one batch
    for found in together(2, _one_batch):
        assert_equal_results(found, whole)


def _one_batch() -> Difference:
    return jobs.measured(tokens=10_000)


@pytest.mark.parametrize(("killed", "size", "then"), [(1, 2, 2), (0, 2, 2), (1, 2, 3), (2, 3, 1)])
def test_a_run_goes_on_after_a_rank_was_killed(tmp_path: Path, alone: Difference, killed: int, size: int, then: int):
    folder = tmp_path / "run"
    codes, _ = ended(size, _killed, folder, killed)
    assert codes[killed] == -9
    found = [jobs.resumed(folder)] if then == 1 else together(then, jobs.resumed, folder)
    for result, continued in found:
        assert continued
        assert_equal_results(result, alone)


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_left_is_shared_in_smaller_batches_where_these_are_asked_for(tmp_path: Path, alone: Difference, size: int):
    ended(2, _killed, tmp_path / "run", 1)
    for found, continued in together(size, jobs.resumed, tmp_path / "run", jobs.TOKENS // 2):
        assert continued
        for name in TABLES:
            assert_frame_equal(getattr(found, name), getattr(alone, name), obj=name, rtol=1e-4, atol=1e-5)


def _killed(folder: Path, rank: int) -> None:
    jobs.measured(folder=folder, kill_at=(rank, 2))


def test_as_many_ranks_as_before_end_with_equal_bits(tmp_path: Path):
    undisturbed = together(2, jobs.measured)[0]
    ended(2, _killed, tmp_path / "run", 1)
    found, continued = together(2, jobs.resumed, tmp_path / "run")[0]
    assert continued
    assert_equal_results(found, undisturbed, check_exact=True)


@pytest.mark.parametrize(("size", "tokens"), [(2, 16), (3, 16), (2, 10_000)])
def test_searches_that_need_all_texts_at_every_step_are_those_of_one_process_to_the_last_bit(size: int, tokens: int):
    alone = jobs.searched(tokens)
    inside = alone["circuits"].sum(1)
    assert inside[0] > inside[1], "thresholds are told apart"
    for found in together(size, jobs.searched, tokens):
        assert found.keys() == alone.keys()
        for name, values in alone.items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)


# of five documents in batches of four the last is one alone: a second rank has nothing then
@pytest.mark.parametrize(("documents", "batch_size"), [(6, 6), (5, 4)])
def test_ranks_train_together(tmp_path: Path, documents: int, batch_size: int):
    alone = jobs.trained(tmp_path / "one", documents, batch_size)
    first, second = together(2, jobs.trained, tmp_path / "two", documents, batch_size)
    assert_frame_equal(first, second)
    assert alone["tokens"].tolist() == first["tokens"].tolist()
    assert_frame_equal(first, alone, rtol=1e-5)
    assert np.ptp(alone["validation_loss"]) > 1e-3, "nothing was learned"
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_ranks_share_the_writing_of_summaries(tiny_model: Path):
    alone = jobs.written(str(tiny_model))
    assert len(set(alone)) > 1
    assert together(3, jobs.written, str(tiny_model)) == [alone] * 3


def test_only_rank_0_writes_and_the_others_follow(tmp_path: Path):
    first, second = together(2, jobs.stages, tmp_path / "run")
    both = (["alone", "shared"], [0, 1])
    assert first == [False, True, False, (["me"], 1), both, True, True, both]
    # what rank 0 does alone counts as done for the others
    assert second == [False, True, True, both, True, True, both]
    assert set(verify(tmp_path / "run")["status"]) == {"ok"}
    begun = [event for event in RunFolder.read(tmp_path / "run").events() if event["message"] == "run begins"]
    assert len(begun) == 1
    assert not (tmp_path / "run" / "work").exists() or not files(tmp_path / "run" / "work")


def test_what_rank_0_cannot_open_no_rank_opens(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("mine")
    first, second = together(2, jobs.refused, tmp_path)
    assert first.startswith("RunError: ")
    assert second == first.replace("RunError", "ElsewhereError")
    assert files(tmp_path) == {"letter.txt"}


def settings_of_study(model: Path, tuned: Path) -> dict[str, Any]:
    """Return a small study of two models, with every stage that measures."""
    return {
        "base": str(model),
        "tuned": str(tuned),
        "data": "newsroom",
        "train_documents": 6,
        "validation_documents": 3,
        "test_documents": 7,
        "max_tokens": 128,
        "tokens_per_batch": 256,
        "replicates": 20,
        "bakeoff": False,
        "rouge_documents": 3,
        "max_new_tokens": 4,
        "causal_documents": 5,
        "random_sets": 5,
        "circuit_documents": 8,
        "circuit_size": 0.2,
        "role_documents": 3,
        "lens_documents": 2,
    }


@pytest.fixture(scope="session")
def tiny_tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model, a little changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def assert_equal_runs(one: Path, other: Path) -> None:
    """Compare two runs table by table."""
    names = {path.name for path in (one / "tables").iterdir()}
    assert names == {path.name for path in (other / "tables").iterdir()}
    for name in sorted(names):
        assert_frame_equal(pd.read_parquet(one / "tables" / name), pd.read_parquet(other / "tables" / name), rtol=1e-6, atol=1e-6, obj=name)
    assert set(verify(other)["status"]) == {"ok"}


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_a_study_is_that_of_one_process(tmp_path: Path, tiny_model: Path, tiny_tuned: Path, whole: bool):
    settings = settings_of_study(tiny_model, tiny_tuned) | ({} if whole else {"circuit": False, "roles": False, "lens": False})
    jobs.studied(settings, tmp_path / "one")
    together(2, jobs.studied, settings, tmp_path / "two")
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_circuit_is_that_of_one_process(tmp_path: Path, tiny_model: Path):
    settings = {"model": str(tiny_model), "pairs": "induction", "limit": 14, "circuit_fraction": 0.1, "random_circuits": 2}
    jobs.circuit_of(settings, tmp_path / "one")
    together(3, jobs.circuit_of, settings, tmp_path / "three")
    assert_equal_runs(tmp_path / "one", tmp_path / "three")


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start two ranks of the command line by accelerate's launcher."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "mechscope"]
    return subprocess.run([*launcher, *options, *arguments], capture_output=True, text=True, check=False, timeout=300)


def test_the_command_line_runs_under_accelerate_launch(tmp_path: Path, tiny_model: Path, tiny_tuned: Path):
    given = [
        "diff",
        str(tiny_model),
        str(tiny_tuned),
        "--data",
        "newsroom",
        "--documents",
        "5",
        "--max-tokens",
        "128",
        "--replicates",
        "20",
        "--noise-draws",
        "0",
    ]
    done = launched(*given, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())  # lines are broken at the terminal's width
    assert said.count("claims of and about the paper (arXiv 2505.17073) tested here:") == 1, f"only rank 0 speaks: {said}"
    assert set(verify(tmp_path / "run")["status"]) == {"ok"}
