"""Comparisons, tables and the command line around them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmarks.cli import chosen, main, parser, settings_of
from benchmarks.comparison import changes, report
from benchmarks.machine import shown
from benchmarks.processes import ROOT
from benchmarks.results import Results
from benchmarks.settings import BenchmarkError
from benchmarks.tables import table, written

from tests.benchmarks.conftest import record, results


def _file(path: Path, made: Results) -> Path:
    made.path = path
    made.write()
    return path


def test_a_change_is_judged_by_its_ratio_beside_the_noise_of_both_files() -> None:
    old = results(record(), record(job="eap", noise=None))
    new = results(record(seconds=6.0, ratio=1.6, memory_gib=0.5, noise=0.1), record(job="eap", seconds=3.3, ratio=2.2, noise=None))
    first, second = changes(old, new)
    assert (first.seconds, first.memory) == (2, 2)
    assert first.passes == pytest.approx(0.8)
    assert first.noise == pytest.approx(0.15)
    assert first.verdict == "faster", "the machine was slow, not the job"
    assert second.verdict == "same", "one round says nothing within a tenth"


def test_only_the_same_job_by_the_same_on_the_same_texts_is_compared() -> None:
    old = results(record(), record(job="eap"), record(by="nnsight"), machine={"cpu": "Old CPU", "cores": 2, "load": 3.0})
    new = results(record(), record(job="eap", tokens=99), machine={"cpu": "New CPU", "cores": 2, "load": 0.0})
    lines = list(report(old, new))
    assert len(lines) == 5
    assert lines[1].split() == ["lens", "mechscope", "1.00", "1.00", "±", "10", "%", "1.00", "same"]
    assert lines[2] == "only in the old file: eap (mechscope), lens (nnsight)"
    assert lines[4] == "machine differ: cpu Old CPU → New CPU"
    with pytest.raises(BenchmarkError, match="in common"):
        changes(old, results(record(job="other")))


def test_a_table_replaces_its_block_and_nothing_else() -> None:
    page = "# Page\n\n<!-- generated: small -->\nold | stuff\n<!-- end -->\n\nProse.\n\n<!-- generated: long -->\n<!-- end -->\nThe end.\n"
    made = table(results(record()))
    found = written(page, {"small": made})
    assert found == page.replace("old | stuff\n", made)
    assert written(found, {"small": made}) == found, "twice is once"
    assert found.endswith("<!-- generated: long -->\n<!-- end -->\nThe end.\n")
    with pytest.raises(BenchmarkError, match=r"no block 'gpu' \(it has small, long\)"):
        written(page, {"gpu": made})


def test_a_table_says_where_when_and_how_and_what_was_missed() -> None:
    missed = record(
        job="both",
        what="both models",
        ratio=1.9,
        noise=None,
        beside={"name": "forward passes", "count": 2, "memory_gib": 0.2},
        targets={"ratio": 1.8, "gib": 0.5, "memory_ratio": 1.3},
    )
    theirs = record(by="nnsight", package="nnsight", agreement={"difference": 4e-7, "same": True}, targets=dict.fromkeys(missed["targets"]))
    wrong = record(by="other", agreement={"difference": 0.5, "same": False})
    alone = record(job="alone", what="long", beside=None, ratio=None, passes=None, memory_ratio=None, forward=None)
    made = results(record(), theirs, wrong, missed, alone)
    made.failures.append({"job": "eap", "by": "mechscope", "error": "went wrong"})
    text = table(made)
    for said in (
        "2026-01-02 03:04 UTC",
        "`python -m benchmarks run --out benchmarks/results/small.json`",
        "Some CPU, 2 cores, 23.5 GiB, Linux x86_64 (load 0.1 at the start); 1 threads on cpu",
        "python 3.11, torch 2.13.0, nnsight 0.8.1",
        "2 layers × 2 heads × 128, 70 words, 160 positions",
        "Failed: `eap` by mechscope: went wrong",
        "Absent, so not measured: EAP-IG's code (not installed).",
    ):
        assert said in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[0] == ["logit lens (`lens`)", "mechscope", "8 × 128", "3", "5 %", "2", "0.25", "2 × forward passes (≤ 2.2)", "–"]
    assert rows[1] == ["the same", "nnsight 0.8.1", "8 × 128", "3", "5 %", "2", "0.25", "–", "4e-07"]
    assert rows[2][-1] == "5e-01 (**not the same work**)"
    assert rows[3][0] == "both models (`both`)"
    assert rows[3][4] == "one round"
    assert rows[3][7] == "1.9 × 2 × forward passes (≤ 1.8, **missed**); 1.25 × its memory (≤ 1.3); 0.25 GiB (≤ 0.5)"
    assert rows[4][5] == "–"
    assert rows[4][7] == "process's peak 1.25 GiB"


def test_the_commands_work_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (_file(tmp_path / f"{name}.json", results(record())) for name in ("small", "second"))
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- generated: small -->\n<!-- end -->\nb\n", encoding="utf-8")
    assert main(["table", str(one), "--page", str(page)]) == 0
    assert "| logit lens (`lens`) |" in page.read_text(encoding="utf-8")
    assert main(["compare", str(one), str(two)]) == 0
    assert "same" in capsys.readouterr().out
    assert main(["table", str(two), "--page", str(page)]) == 2
    assert capsys.readouterr().err.startswith("error: the page has no block 'second'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "entropi"], "'entropi' is no job"),
        (["run", "--threads", "0"], "--threads is 0"),
        (["run", "difference", "--documents", "1"], "at least 2"),
        (["run", "eap_ig_texts", "--shape", "long"], "no texts for --shape long"),
        (["run", "entropy", "eap_ig_texts", "--shape", "long"], "eap_ig_texts: no texts for --shape long"),
        (["run", "entropy", "--out", "."], "is a folder"),
        (["run", "entropy", "--device", "bogus"], "--device bogus cannot be used"),
        (["compare", "nowhere.json", "nowhere.json"], "nowhere.json"),
        (["scale", "--page", "nowhere.md"], "nowhere.md"),
    ],
)
def test_an_expected_error_is_one_line_and_exit_code_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"format": 99}), encoding="utf-8")
    with pytest.raises(BenchmarkError, match="format 2"):
        Results.read(path)


def test_files_of_run_and_of_scale_are_told_apart(tmp_path: Path) -> None:
    ran = _file(tmp_path / "ran.json", results(record()))
    scaled = _file(tmp_path / "scaled.json", Results({name: value for name, value in results().head.items() if name != "settings"}))
    with pytest.raises(
        BenchmarkError, match=r"scaled\.json was written by `scale`, not by `run`: it is for `python -m benchmarks scale --read`"
    ):
        Results.read(scaled)
    with pytest.raises(BenchmarkError, match=r"ran\.json was written by `run`, not by `scale`"):
        Results.read(ran, "scale")


def test_other_settings_and_models_are_said_beside_a_comparison() -> None:
    old, new = results(record()), results(record())
    new.head = new.head | {
        "settings": new.head["settings"] | {"threads": 7, "repeats": 9, "shape": new.head["settings"]["shape"] | {"layers": 1}}
    }
    said = list(report(old, new))[-1]
    before = old.head["settings"]
    assert said == f"settings differ: layers {before['shape']['layers']} → 1; threads {before['threads']} → 7"
    assert "settings" not in "".join(report(old, old))


def test_names_and_topics_choose_jobs_and_parts_only_when_named() -> None:
    every = [job.name for job in chosen([], "small")]
    assert "role_table" in every
    assert "role_copying" not in every
    assert [job.name for job in chosen(["heads", "role_copying", "entropy"], "small")] == ["entropy", "role_table", "role_copying"]
    assert "eap_ig_texts" not in [job.name for job in chosen([], "long")]


def test_the_command_line_changes_the_shape() -> None:
    options = parser().parse_args(["run", "--shape", "long", "--layers", "3", "--tokens", "32768", "--alone"])
    found = settings_of(options)
    assert (found.shape.layers, found.shape.heads, found.shape.positions) == (3, 12, 32768)
    assert found.alone
    assert settings_of(parser().parse_args(["run", "--shape", "long"])).shape.positions == 4096


def test_every_job_is_listed_with_its_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "recording" in out
    assert "TransformerLens" in out
    assert "(only when named)" in out


def test_paths_are_published_from_the_project_s_root_or_not_at_all() -> None:
    root = Path("/home/someone/project")
    given = ["run", "--out", "/home/someone/project/benchmarks/results/a.json", "--data", "/home/someone/shared/d.jsonl", "/opt/x/python"]
    assert shown(given, root) == ["run", "--out", "benchmarks/results/a.json", "--data", "../shared/d.jsonl", "python"]
    assert shown(["--data=/opt/d.jsonl", "--threads=2"], root) == ["--data=d.jsonl", "--threads=2"]


def test_a_table_names_jobs_that_a_run_did_not_come_to() -> None:
    assert "Not finished" not in table(results(record()))
    assert "Not finished: `eap`, `recording`." in table(results(record(), jobs=["eap", "lens", "recording"]))


def test_every_block_of_the_page_is_a_run_s_that_wrote_a_file_of_its_name() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- generated: (\w+) -->\n(.*?)<!-- end -->", page, flags=re.DOTALL)
    assert {name for name, _ in blocks} >= {"small", "long"}
    for name, text in blocks:
        assert re.search(rf"`python -m benchmarks run [^`]*--out benchmarks/results/{name}\.json[ `]", text), name
        assert written(page, {name: table(results(record()))}) != page
