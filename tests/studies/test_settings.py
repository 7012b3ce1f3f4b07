"""Settings: one declaration serves the configuration file and the flags, and says what is wrong with either."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import TypeAdapter

from mechscope.errors import SettingsError
from mechscope.settings import leaves, resolve
from mechscope.studies.jobs import jobs
from mechscope.studies.jobs.tune import TuneSettings
from mechscope.studies.paper_2505_17073.settings import StudySettings


@pytest.mark.parametrize("job", jobs().values(), ids=lambda job: job.name)
def test_every_setting_explains_itself(job):
    assert leaves(job.settings)
    for leaf in leaves(job.settings):
        assert leaf.help.endswith((".", ")", "?")), leaf.name
        assert leaf.help[0].isupper(), leaf.name


@pytest.mark.parametrize("job", jobs().values(), ids=lambda job: job.name)
def test_every_default_is_within_its_bounds(job):
    for leaf in leaves(job.settings):
        if leaf.default is not dataclasses.MISSING:
            assert TypeAdapter(leaf.hint).validate_python(leaf.default, strict=True) == leaf.default, leaf.name


def test_flags_go_before_the_configuration_file(tmp_path):
    config = tmp_path / "study.yaml"
    config.write_text("base: gpt2\ndata: a.jsonl\nmax-tokens: 64\nseed: 5\n")
    settings = resolve(StudySettings, config, seed=7, tuned=None)
    assert (settings.base, settings.max_tokens, settings.seed, settings.tuned) == ("gpt2", 64, 7, None)


def test_settings_written_to_a_file_come_back_equal(tmp_path):
    import yaml

    settings = resolve(StudySettings, base="gpt2", data="a.jsonl", max_steps=3, tuned="b")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(dataclasses.asdict(settings)))
    assert resolve(StudySettings, tmp_path / "study.yaml") == settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"base": "a"}, ["'data' is missing", "JSONL"]),
        ({"base": "a", "data": "b", "max_tokens": "many"}, ["'max_tokens' is 'many'", "integer"]),
        ({"base": "a", "data": "b", "maxtokens": 3}, ["'maxtokens' is not known", "did you mean 'max_tokens'"]),
        ({"base": "a", "data": "b", "resize": "grow"}, ["'resize' is 'grow'", "'refuse' or 'truncate'"]),
        ({"base": "a", "data": "b", "seeds": 0}, ["'seeds' is 0", "greater than or equal to 1"]),
        ({"base": "a", "data": "b", "layer_rule": "nonsense"}, ["'layer_rule' is 'nonsense'", "'layers_by_kl'", "'random_layers'"]),
        ({"base": "a", "data": "b", "circuit_method": "eap-gi"}, ["'circuit_method' is 'eap-gi'", "'eap-ig'"]),
        ({"base": "a", "data": "b", "circuit_size": 1.5}, ["'circuit_size' is 1.5", "less than or equal to 1"]),
        ({"base": "a", "data": "b", "warmup": 1.0}, ["'warmup' is 1.0", "less than 1"]),
        ({"base": "a", "data": "b", "strategies": "standard,best"}, ["'strategies'", "'best'", "targeted_layers"]),
        ({"base": "a", "data": "b", "protocols": "equal_time"}, ["'protocols'", "'equal_time'", "equal_rank"]),
        ({"base": "a", "data": "b", "strategies": "circuit", "circuit": False}, ["strategy circuit needs a circuit", "target_circuit"]),
        ({"base": "a", "data": "b", "learning_rate_full": float("nan")}, ["'learning_rate_full'", "finite"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_do(given, words):
    with pytest.raises(SettingsError) as error:
        resolve(StudySettings, **given)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", ["holds no settings"]),
        ("base: [", ["is not YAML"]),
        ("bse: gpt2\ndata: b\n", ["'bse'", "did you mean 'base'", "study.yaml"]),
    ],
)
def test_a_wrong_configuration_file_is_named(tmp_path, text, words):
    config = tmp_path / "study.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError) as error:
        resolve(StudySettings, config)
    for word in words:
        assert word in str(error.value)


def test_a_configuration_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"absent\.yaml.*cannot be read"):
        resolve(StudySettings, tmp_path / "absent.yaml")


def test_targets_are_for_lora():
    settings = resolve(TuneSettings, base="gpt2", data="a.jsonl", targets="layers:2")
    assert settings.method == "lora"
    assert resolve(TuneSettings, base="gpt2", data="a.jsonl").method == "full"
    with pytest.raises(SettingsError, match="targets 'layers:2' are for LoRA, but the method is full"):
        resolve(TuneSettings, base="gpt2", data="a.jsonl", targets="layers:2", method="full")
