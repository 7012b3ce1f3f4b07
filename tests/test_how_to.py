"""Every command of the how-to pages runs as it stands, and every job has its place there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from mechscope.cli import main
from mechscope.data.newsroom import newsroom_model_path
from mechscope.report import page
from mechscope.studies.jobs import jobs

HOW_TO = Path(__file__).resolve().parents[1] / "docs" / "how-to"
PAGES = ("compare", "intervene", "edit", "circuits", "read", "features")
# the whole studies are in the guide
ELSEWHERE = {"demo", "summarization", "calibrate"}


def blocks(name: str) -> list[tuple[str, str]]:
    """Return the blocks of code of a page, each with its language."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (HOW_TO / f"{name}.md").read_text(encoding="utf-8"), flags=re.S | re.M)


def commands(name: str) -> list[str]:
    """Return the command lines of a page, in order."""
    return [line for language, text in blocks(name) if not language for line in text.splitlines()]


def files(name: str) -> dict[str, str]:
    """Return the files that a page shows, by the name in their first line."""
    shown = (text.partition("\n") for language, text in blocks(name) if language == "yaml")
    return {first.removeprefix("# "): text for first, _, text in shown}


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command line in this process."""
    words = [str(newsroom_model_path()) if word == "MODEL" else word for word in shlex.split(line)]
    monkeypatch.setattr(sys, "argv", words)
    code: str | int | None = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    assert not code, line


def mixtures(folder: Path) -> None:
    """Save a tiny mixture of experts that reads what the embedded model reads, and another one of its kind."""
    tokenizer = AutoTokenizer.from_pretrained(newsroom_model_path())
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    widths = {"intermediate_size": 16, "num_local_experts": 4, "max_position_embeddings": 512}
    for name in ("MIXTURE", "MIXTURE-TUNED"):
        MixtralForCausalLM(MixtralConfig(**sizes, **widths)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def test_every_job_has_its_place() -> None:
    shown = [line.removeprefix("mechscope ") for name in PAGES for line in commands(name)]
    missing = [name for name, job in jobs().items() if not any(line.startswith(f"{job.command} ") for line in shown)]
    assert missing == sorted(ELSEWHERE)


def test_what_is_given_by_position_is_taken_in_the_order_of_the_job() -> None:
    for job in jobs().values():
        first, _ = job.in_order
        assert tuple(leaf.name for leaf in first if leaf.name in job.arguments) == job.arguments, job.name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # pictures are tested with the report
    monkeypatch.setattr(page, "png", lambda svg: b"\x89PNG")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_a_page_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("read", "intervene"):
        mixtures(folder)
    for file, text in files(name).items():
        (folder / file).write_text(text, encoding="utf-8")
    lines = commands(name)
    if name == "circuits":
        lines = [commands("compare")[0], *lines]
    for line in lines:
        run(line, monkeypatch)
        out = folder / line.split()[-1]
        assert (out / "report.html").is_file() or line.split()[1] == "tune", line
