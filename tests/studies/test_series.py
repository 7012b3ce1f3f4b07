"""A job's own options reach it, steps are compared with the right base, and mistakes are one sentence before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mechscope.errors import SettingsError
from mechscope.store.series import Series
from mechscope.studies.jobs import jobs
from mechscope.studies.series import able, job_named, job_settings, plan


def series(folder: Path, *numbers: int, file: str = "config.json", text: str = "{}") -> Series:
    for number in numbers:
        (step := folder / f"checkpoint-{number}").mkdir(parents=True)
        (step / file).write_text(text)
    return Series.find(folder)


def test_jobs_that_measure_models_can_be_run_over_a_series() -> None:
    can = {name for name, job in jobs().items() if able(job)}
    assert {"roles", "probe", "diff", "circuit", "circuit-diff", "weights", "lens", "ablate"} <= can
    assert can.isdisjoint({"tune", "demo", "bakeoff", "summarization", "calibrate", "dynamics"})


def test_options_are_those_of_the_jobs_own_command_line() -> None:
    settings = job_settings(
        job_named("diff"),
        "--data 'my articles.jsonl' --documents=7 --gini --no-chat --noise-draws 3",
        {"dtype": "bfloat16", "seed": 5},
    )
    assert (settings.data, settings.documents, settings.gini, settings.chat) == ("my articles.jsonl", 7, True, False)
    assert (settings.noise_draws, settings.dtype, settings.seed) == (3, "bfloat16", 5)
    roles = job_settings(job_named("roles"), "", {"tokens_per_batch": 64, "seed": 1})
    assert (roles.tokens_per_batch, roles.tuned) == (64, None)


@pytest.mark.parametrize(
    ("job", "options", "words"),
    [
        ("rolls", "", "'job' is 'rolls', which is not known: did you mean roles"),
        ("tune", "", "does not measure a model at a time: use one of"),
        ("roles", "--probe 3", "'probe'.*did you mean 'probes'"),
        ("roles", "--probes", "option --probes of roles needs a value"),
        ("roles", "--nothing", "roles has no option --nothing"),
        ("roles", "16", "'16' is not an option of roles"),
        ("roles", "--probes 0", "'probes' is '0'"),
        ("roles", "--model x", "option --model of roles is given by the series"),
        ("roles", "--seed 3", "option --seed of roles is given by the series"),
        ("roles", "--show 'a", "'options' is .*closing quotation"),
        ("diff", "", "setting 'data' is missing"),
    ],
)
def test_a_job_or_an_option_that_is_none_is_refused_by_name(job: str, options: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        job_settings(job_named(job), options, {})


def planned(job: str, found: Series, base: Any = None, **settings: Any) -> Any:
    job_ = job_named(job)
    options = "--data newsroom" if job == "diff" else ""
    return plan(job_, job_settings(job_, options, {}), found, base, **{"against_base": False, **settings})


def numbers(which: Any) -> list[int]:
    return [step.number for step in which.steps]


def test_a_job_of_one_model_measures_the_base_as_step_0_and_one_of_two_compares_later_steps_with_it(tmp_path: Path) -> None:
    whole, later = series(tmp_path / "whole", 0, 5, 10), series(tmp_path / "later", 5, 10)
    adapters = series(tmp_path / "adapters", 5, 10, file="adapter_config.json", text='{"base_model_name_or_path": "the/base"}')
    assert numbers(planned("roles", whole)) == [0, 5, 10]
    assert numbers(planned("roles", later)) == [5, 10]
    assert numbers(planned("roles", later, "some/base")) == [0, 5, 10]
    assert numbers(planned("roles", whole, str(tmp_path / "whole" / "checkpoint-5"))) == [0, 5, 10]
    alone = planned("roles", adapters)
    assert (alone.steps[0].number, alone.steps[0].source) == (0, "the/base")
    assert not alone.compares
    for job, settings in (("diff", {}), ("roles", {"against_base": True})):
        compared = planned(job, whole, **settings)
        assert (numbers(compared), compared.base) == ([5, 10], str(tmp_path / "whole" / "checkpoint-0"))
        assert compared.settings.tuned is not None
        assert (numbers(planned(job, adapters, **settings)), planned(job, adapters, **settings).base) == ([5, 10], "the/base")
        middle = planned(job, whole, str(tmp_path / "whole" / "checkpoint-10"), **settings)
        assert numbers(middle) == [0, 5]
    with pytest.raises(SettingsError, match="'against_base' is for jobs of one or two models, and positions takes one"):
        planned("positions", whole, against_base=True)


def test_a_steps_result_hangs_on_the_options_the_files_they_name_and_the_base(tmp_path: Path) -> None:
    found = series(tmp_path / "series", 0, 5, 10)
    data = tmp_path / "texts.jsonl"
    data.write_text("{}")
    job = job_named("diff")

    def fingerprint(options: str, base: Any = None) -> Any:
        return plan(job, job_settings(job, options, {}), found, base, against_base=False).fingerprint

    first = fingerprint(f"--data {data}")
    assert first == fingerprint(f"--data {data}")
    assert first != fingerprint(f"--data {data} --documents 3")
    data.write_text("{} {}")
    assert first != fingerprint(f"--data {data}")
    assert fingerprint("--data newsroom")["base"] is not None
