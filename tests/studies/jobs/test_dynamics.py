"""A job over a series gives, at every step, what it gives for that step alone; a kill keeps the finished steps; an adapter's base is step 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.cli import main
from mechscope.errors import ModelError, SettingsError
from mechscope.store.run import verify
from mechscope.studies.job import Result
from mechscope.studies.jobs.ablate import JOB as ABLATE
from mechscope.studies.jobs.dynamics import JOB
from mechscope.studies.runner import run_job
from tests.studies.running import finished
from tests.subject.saved import save, save_adapter

QUICK = "--pairs induction --limit 8"


class Killed(BaseException):
    """Stands for kill -9 inside one process: nothing catches it."""


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three steps of a tiny model; the last repeats the first."""
    folder = tmp_path_factory.mktemp("series")
    for number, seed in ((0, 0), (20, 1), (100, 0)):
        save(folder / f"checkpoint-{number}", "llama", seed)
    return folder


def dynamics(out: Path | None, series: Path | str, job: str = "ablate", progress: Any = None, **settings: Any) -> Result:
    return run_job(JOB, JOB.resolve(series=str(series), job=job, **{"options": QUICK, **settings}), out, progress=progress)


@pytest.fixture(scope="module")
def killed(series: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Run ablations over the series, killed at the second step, and then to its end."""
    out = tmp_path_factory.mktemp("run") / "dynamics"

    def kill(label: str, done: int, total: int) -> None:
        if (label, done) == ("steps", 1):
            raise Killed

    with pytest.raises(Killed):
        dynamics(out, series, progress=kill)
    assert set(finished(out)) == {"step_0"}
    return out, dynamics(out, series)


def test_every_step_has_the_numbers_of_the_job_on_that_step_alone(killed: tuple[Path, Result], series: Path) -> None:
    _, result = killed
    alone = run_job(ABLATE, ABLATE.resolve(model=str(series / "checkpoint-20"), pairs="induction", limit=8), None).effects.set_index(
        "component"
    )
    values = result.series_values
    own = values[(values["step"] == 20) & (values["quantity"] == "effect")].set_index("component")
    assert len(own) > 10
    assert own[["value", "low", "high", "n"]].to_numpy() == pytest.approx(alone.loc[own.index, ["effect", "low", "high", "n"]].to_numpy())
    first, last = (values[values["step"] == step].drop(columns="step").reset_index(drop=True) for step in (0, 100))
    pd.testing.assert_frame_equal(first, last)  # the same weights


def test_a_kill_keeps_the_finished_steps_and_the_run_can_be_verified(killed: tuple[Path, Result]) -> None:
    out, result = killed
    done = [message for message in finished(out) if message.startswith("step")]
    assert list(dict.fromkeys(done)) == ["step_0", "step_20", "step_100"]
    assert done.index("step_20") == done.count("step_0")  # which was not done again
    assert set(verify(out)["status"]) == {"ok"}
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    assert "Step 100 has the weights of step 0" in page
    assert "withheld, as 3 steps are fewer than 8" in page


def test_steps_are_surveyed(killed: tuple[Path, Result]) -> None:
    steps = killed[1].series_steps
    assert steps["step"].tolist() == [0, 20, 100]
    assert steps["repeats"].fillna(-1).tolist() == [-1, -1, 0]
    assert steps["jumps"].tolist() == [False, True, False]  # its neighbours are the same model
    assert steps["moved"].tolist()[1:] == pytest.approx([steps["away"].iloc[1]] * 2)


def test_adapters_are_measured_beside_their_base_and_compared_with_it(tmp_path: Path, series: Path) -> None:
    base = series / "checkpoint-0"
    for number in (1, 2):
        save_adapter(tmp_path / "lora" / f"checkpoint-{number}", base, "llama")
    found = dynamics(None, tmp_path / "lora")
    assert found.series_steps["step"].tolist() == [0, 1, 2]
    assert found.series_steps["repeats"].fillna(-1).tolist() == [-1, -1, 1]
    assert found.series_steps["moved"].iloc[1] > 0
    assert set(found.series_values["table"]) == {"effects"}


def test_a_job_of_two_models_is_given_the_base_and_the_step(series: Path) -> None:
    found = dynamics(None, series, "weights", options=None, against_base=True)
    assert found.series_steps["step"].tolist() == [20, 100]
    changed = found.series_values[found.series_values["table"] == "weight_changes"]
    assert (changed.loc[(changed["step"] == 100) & (changed["unit"] == "share"), "value"].abs() < 1e-5).all()  # the base's own weights
    assert changed.loc[changed["step"] == 20, "value"].abs().max() > 0.1


def test_on_the_command_line_a_jobs_options_follow_it_and_mistakes_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], series: Path, tmp_path: Path
) -> None:
    def run(*words: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mechscope", "dynamics", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), " ".join(capsys.readouterr().err.split())

    assert run(series, "rolls") == (2, "error: JOB is 'rolls', which is not known: did you mean roles?")
    code, error = run(series, "roles", "--probe", 3)
    assert code == 2
    assert "'probe' is not known: did you mean 'probes'?" in error
    code, error = run(tmp_path / "gone", "roles")
    assert code == 2
    assert "no such folder" in error
    code, error = run(series, "roles", "--at-steps", "0,7", "--out", tmp_path / "out")
    assert code == 2
    assert "has no step 7: it has 0, 20, 100" in error
    assert (
        run(series, "roles", "--at-steps", "0;7")[1] == "error: --at-steps is '0;7': write numbers of steps joined by commas, as 0,100,400"
    )
    monkeypatch.setattr(
        "mechscope.studies.console.run", lambda job, settings, out, **_: print(settings.options, settings.seed, file=sys.stderr)
    )
    monkeypatch.setattr("mechscope.studies.console.show", lambda *_, **__: None)
    assert run(series, "roles", "--probes", 3, "--seed", 4, "--show=a1.h0") == (0, "--probes 3 --show=a1.h0 4")


def test_steps_of_two_trainings_are_refused_before_any_is_loaded(tmp_path: Path, series: Path) -> None:
    other = save(tmp_path / "checkpoint-3", "gpt2")
    with pytest.raises(ModelError, match="is not of one training: step 3 has model_type gpt2"):
        dynamics(None, f"{series / 'checkpoint-0'},{other}")
    with pytest.raises(SettingsError, match="'at_steps' is 'x'"):
        dynamics(None, series, at_steps="x")
