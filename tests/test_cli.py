"""The command line: quick help, one red line for what the user can mend, and commands that do what they say."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

import mechscope
from mechscope.api import functions
from mechscope.cli import main
from mechscope.data.newsroom import newsroom_model_path
from mechscope.store.run import RunFolder
from mechscope.studies.jobs import jobs
from mechscope.studies.places import new_run
from tests.studies.conftest import tiny_model

__all__ = ["tiny_model"]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run a command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["mechscope", *map(str, words)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def spectrum_into(out: Path) -> tuple[object, ...]:
    """Return the words of a command that ends within a second or two."""
    return ("spectrum", newsroom_model_path(), "--data", "newsroom", "--documents", 3, "--layers", 0, "--bands", 4, "--out", out)


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    path = tmp_path / "articles.jsonl"
    rows = [
        {"document": f"The council of town {i} met on Monday and voted on the new budget.", "summary": f"Town {i} voted."}
        for i in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_help_answers_without_importing_torch():
    code = "import sys; sys.argv = ['mechscope', '--help']\nfrom mechscope.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'pandas', 'altair', 'pydantic') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Usage: mechscope" in out
    assert out.strip().endswith("[]")


COMMANDS = [job.command.split() for job in jobs().values()]


@pytest.mark.parametrize("command", [*COMMANDS, ["inspect"], ["verify"], ["report"]], ids=" ".join)
def test_every_command_has_help_with_an_example(monkeypatch, capsys, command):
    assert run(monkeypatch, *command, "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Usage: mechscope" in out
    if command in COMMANDS:
        assert f"Example: mechscope {' '.join(command)}" in out


def test_every_job_is_a_function_too():
    for name, function in functions().items():
        assert getattr(mechscope, name) is function
        assert "Returns:" in (function.__doc__ or "")


def test_the_demo_takes_no_settings(monkeypatch, capsys):
    assert list(inspect.signature(mechscope.demo).parameters) == ["out", "progress", "tokenizer"]
    with pytest.raises(TypeError, match=r"demo\(\) takes no settings: data cannot be given"):
        mechscope.demo(data="elsewhere.jsonl")
    assert run(monkeypatch, "demo", "--help") == 0
    out = capsys.readouterr().out
    assert "runs/demo" in out
    assert "--config" not in out


def test_a_run_without_a_folder_gets_a_new_one_that_is_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    newest = new_run("spectrum")
    assert newest == Path("runs") / f"spectrum-{date.today().isoformat()}-1"
    newest.mkdir(parents=True)
    model = newsroom_model_path()
    assert run(monkeypatch, "spectrum", model, "--data", "newsroom", "--documents", 3, "--layers", 0, "--bands", 4) == 0
    assert f"runs/spectrum-{date.today().isoformat()}-2" in capsys.readouterr().out
    assert (tmp_path / new_run("spectrum", Path("runs")).parent / f"spectrum-{date.today().isoformat()}-2" / "report.html").is_file()


def test_quiet_prints_where_the_run_is_and_verbose_its_log(monkeypatch, capsys, tmp_path):
    asked = spectrum_into(tmp_path / "run")
    assert run(monkeypatch, *asked, "--quiet") == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["run", "report"]
    assert said.err == ""
    assert run(monkeypatch, *asked, "--verbose") == 0
    said = capsys.readouterr()
    assert "stage spectrum is done already" in said.err
    assert "•" in said.out


MODEL = str(newsroom_model_path())
# what is wrong with arguments and paths, and what is said of it
SLIPS = {
    ("diff", "/nope/model", "x", "--data", "newsroom"): "BASE is '/nope/model': no such folder",
    ("diff", "gpt2", "./nope", "--data", "newsroom"): "TUNED is './nope': no such folder",
    ("diff", MODEL, "runs/tuend", "--data", "newsroom"): "TUNED is 'runs/tuend': nothing there; did you mean runs/tuned?",
    ("diff", "runs", MODEL, "--data", "newsroom"): "BASE: directory 'runs' is not a model: it has no config.json (it holds tuned)",
    ("diff", "gpt2", "gpt2", "--data", "nope.jsonl"): "--data is 'nope.jsonl': no such file",
    ("diff", "gpt2", "gpt2", "--data", "newsrom"): "--data is 'newsrom': neither a file here nor a known corpus: did you mean newsroom?",
    ("diff", "gpt2", "gpt2", "--data", "./runs"): "--data is './runs': a folder; name one data file",
    ("diff", "gpt2", "gpt2", "--data", "newsroom", "--controls", "shuffled:/nope"): "--controls is '/nope': no such folder",
    ("diff", "gpt2", "gpt2", "--data", "newsroom", "--out", "mine"): "mine is not empty and not a run folder",
    ("diff",): "--data, BASE and TUNED are missing",
    ("diff", "gpt2", "gpt2"): "--data is missing: Documents",
    ("patch", "gpt2", "--pairs", "facts:nope.csv"): "--pairs is 'facts:nope.csv': no such file",
    ("patch", "gpt2", "--pairs", "greater_then"): "--pairs is 'greater_then': neither a file here nor known: did you mean greater_than?",
    ("patch", "gpt2", "--pairs", "verbs"): "--pairs is 'verbs': neither a file here nor known: known are ioi, greater_than",
    ("counterfactual", "gpt2", "--pairs", "ioi", "--runs", "nope.yaml"): "--runs is 'nope.yaml': no such file",
    ("tune", "gpt2", "--data", "newsroom", "--targets", "circuit.json"): "--targets is 'circuit.json': no such file",
    ("tune", "--control", "seed", "--like", "runs/tuend"): "--like is 'runs/tuend': nothing there; did you mean runs/tuned?",
    ("tune", "gpt2", "--data", "newsroom", "--control", "seed"): "--control needs --like",
    ("inspect", "/nope/model"): "MODEL is '/nope/model': no such folder",
    ("report", "nope"): "nope is not a run folder",
    ("verify", "mine"): "mine is not a run folder",
    ("table", "nope"): "nope is not a run folder",
}


def test_a_slip_in_arguments_or_paths_is_found_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "runs" / "tuned").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("important")
    code = f"""
import sys
from mechscope.cli import main
for words in {list(SLIPS)!r}:
    sys.argv = ["mechscope", *words]
    try:
        main()
    except SystemExit as end:
        print(end.code)
    print("---", file=sys.stderr, flush=True)
print([name for name in ("torch", "transformers", "pandas", "altair", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split("\n")[:-1] == [*["2"] * len(SLIPS), "[]"]
    for said, expected in zip(done.stderr.split("---\n"), SLIPS.values(), strict=False):
        assert f"error: {expected}" in " ".join(said.split())
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tuned"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["diff", "ablate", "summarization", "tune", "patchscope"])
def test_help_is_in_the_order_of_use(monkeypatch, capsys, name):
    job = jobs()[name]
    assert run(monkeypatch, *([job.group] if job.group else []), name, "--help") == 0
    out = capsys.readouterr().out
    panels = [line.split("─ ")[1].split(" ─")[0] for line in out.splitlines() if line.startswith("╭─ ")]
    texts = {"ablate": ["Pairs", "Data"], "summarization": ["Study", "Data"]}.get(name, ["Data"])
    assert (
        panels[: len(texts) + 2]
        == [*(["Arguments"] if job.arguments else []), *texts, "Output", *panels[len(texts) + 1 :]][: len(texts) + 2]
    )
    assert panels[-2:] == ["Models", "Run"]
    assert len(set(panels)) == len(panels)


def test_the_first_line_of_the_help_says_what_must_be_given(monkeypatch, capsys):
    for words, usage in (("diff", "diff BASE TUNED --data DATA [OPTIONS]"), ("lens", "lens MODEL [TUNED] [OPTIONS]")):
        assert run(monkeypatch, words, "--help") == 0
        assert f"Usage: mechscope {usage}" in capsys.readouterr().out


def test_errors_about_settings_name_flags(monkeypatch, capsys, tmp_path):
    asked = ("circuit", "gpt2", "--pairs", "ioi", "--circuit-edges", 10, "--circuit-fraction", 0.1, "--out", tmp_path / "run")
    assert run(monkeypatch, *asked) == 2
    error = capsys.readouterr().err
    assert "--circuit-edges" in error
    assert "circuit_edges" not in error


def test_an_interrupted_run_says_where_it_goes_on(monkeypatch, capsys, tmp_path):
    def stopped(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mechscope.studies.console.run", stopped)
    assert run(monkeypatch, "spectrum", "gpt2", "--data", "newsroom", "--out", tmp_path / "run") == 130
    assert f"--out {tmp_path / 'run'}" in "".join(capsys.readouterr().err.split("\n"))


def test_the_parser_names_the_choices(monkeypatch, capsys, tmp_path, tiny_model, articles):
    assert run(monkeypatch, "diff", tiny_model, tiny_model, "--data", articles, "--out", tmp_path / "x", "--layer-rule", "nonsense") == 2
    error = " ".join(capsys.readouterr().err.split())
    for word in ("--layer-rule", "nonsense", "layers_by_kl", "random_layers"):
        assert word in error
    assert not (tmp_path / "x").exists()


def broken(tmp_path: Path, tiny_model: Path, how: str) -> Path:
    """Make a model directory with something wrong."""
    folder = tmp_path / how
    if how == "no model":
        folder.mkdir()
        (folder / "notes.txt").write_text("nothing here")
        return folder
    if how == "encoder-decoder":
        T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(folder)
        return folder
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif how == "nan":
        tensors = load_file(weights)
        tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "other tokenizer":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        first, second = list(vocab)[300:302]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no model", ["is not a model", "config.json", "notes.txt"]),
        ("encoder-decoder", ["encoder-decoder", "decoder-only"]),
        ("truncated", ["model.safetensors is truncated or corrupt"]),
        ("nan", ["transformer.h.1.mlp.c_fc.weight", "NaN", "1 values"]),
        ("other tokenizer", ["different tokenizers"]),
    ],
)
def test_a_wrong_model_is_one_red_line(monkeypatch, capsys, tmp_path, tiny_model, articles, how, words):
    model = broken(tmp_path, tiny_model, how)
    assert run(monkeypatch, "diff", tiny_model, model, "--data", articles, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in error
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.jsonl", "", ["empty.jsonl"]),
        ("column.jsonl", '{"text": "a", "summary": "b"}\n', ["'document'", "text"]),
        ("short.jsonl", "\n".join(json.dumps({"document": f"Hi {i}", "summary": "x"}) for i in range(9)), ["too short"]),
        ("broken.jsonl", '{"document": "a"', ["broken.jsonl", "line 1"]),
    ],
)
def test_wrong_documents_are_one_red_line(monkeypatch, capsys, tmp_path, tiny_model, name, text, words):
    data = tmp_path / name
    data.write_text(text)
    assert run(monkeypatch, "diff", tiny_model, tiny_model, "--data", data, "--out", tmp_path / "run") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_hub_data_set_that_cannot_be_reached_is_one_red_line(monkeypatch, capsys, tmp_path, tiny_model):
    assert run(monkeypatch, "diff", tiny_model, tiny_model, "--data", "cnn_dailymail:3.0.0", "--out", tmp_path / "run") == 2
    assert "cnn_dailymail" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_folder_that_is_no_run_is_left_alone(monkeypatch, capsys, tmp_path, tiny_model, articles):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("important")
    assert run(monkeypatch, "diff", tiny_model, tiny_model, "--data", articles, "--out", tmp_path / "mine") == 2
    assert "not a run folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_missing_setting_is_one_red_line(monkeypatch, capsys, tmp_path, tiny_model):
    assert run(monkeypatch, "diff", tiny_model, tiny_model, "--out", tmp_path / "run") == 2
    assert "error: --data is missing" in capsys.readouterr().err


def test_inspect_shows_the_parts_and_the_checks(monkeypatch, capsys, tiny_model):
    assert run(monkeypatch, "inspect", tiny_model) == 0
    out = capsys.readouterr().out
    assert "transformer.h.0.attn.c_attn" in out
    assert out.count("ok ") >= 8
    assert "FAILED" not in out


def test_a_model_without_a_tokenizer_is_read_with_one_that_is_named(monkeypatch, capsys, tmp_path, tiny_model):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*token*"))
    asked = ("spectrum", bare, "--data", "newsroom", "--documents", 2, "--layers", 0, "--bands", 2, "--max-tokens", 64)
    assert run(monkeypatch, *asked, "--out", tmp_path / "x") == 2
    assert "has no tokenizer beside it: name one with --tokenizer …" in " ".join(capsys.readouterr().err.split())
    for model, folder, more in ((bare, "named", ("--tokenizer", newsroom_model_path())), (tiny_model, "own", ())):
        assert run(monkeypatch, *asked[:1], model, *asked[2:], "--out", tmp_path / folder, *more) == 0
    named, own = (RunFolder.read(tmp_path / folder).table("spectrum") for folder in ("named", "own"))
    assert_frame_equal(named, own)


def test_pairs_of_unequal_length_are_one_red_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"clean": "The storm hit Ashford on", "corrupt": "It hit on", "answers": [" Monday"], "wrong_answers": [" Friday"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    model = str(newsroom_model_path())
    assert run(monkeypatch, "patch", model, "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "run") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "tokens" in lines[-1]


def test_a_patch_prints_the_largest_effects_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--pairs", "newsroom:what", "--limit", 4, "--site", "mlp", "--out", tmp_path / "run")
    assert run(monkeypatch, "patch", str(newsroom_model_path()), *words) == 0
    out = capsys.readouterr().out
    assert "The largest effect on logit-diff is" in out
    assert "Largest effects" in out
    assert "m0" in out
    assert (tmp_path / "run" / "report.html").exists()
