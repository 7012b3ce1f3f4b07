"""Bad input gives one line that says what, what was found and what to do; what was finished is kept."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mechscope.data.pairs import Pairs, from_tokens
from mechscope.errors import DataError, MechscopeError, ModelError, RunError, SettingsError
from mechscope.features import Dictionary, FeatureTraining, HarvestSettings, Live, Plan, Rule, autoencoder, harvest, splice, train
from mechscope.features.formats import read_dictionary_learning
from mechscope.features.measures import measure
from mechscope.subject import Subject
from tests import families
from tests.features.test_harvest import SMALL, texts

W = families.WIDTH


class Tokens:
    """A tokenizer as far as its vocabulary."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.vocabulary = {f"t{number}": (number + first) % count for number in range(count)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def with_tokens(tokens: Tokens) -> Subject:
    subject = copy(families.subject("gpt2"))
    object.__setattr__(subject, "tokenizer", tokens)
    return subject


@pytest.fixture(scope="module")
def trained() -> Dictionary:
    """A dictionary of a model whose tokenizer has 60 tokens."""
    plans = {"one": Plan(autoencoder("resid1", W, 40, Rule("topk", 4)))}
    live = Live(with_tokens(Tokens(60)), texts(), "resid1", settings=SMALL)
    return train(live, plans, training=FeatureTraining(steps=2, batch=4))["one"].dictionary


def one_line(error: pytest.ExceptionInfo[MechscopeError]) -> str:
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 400
    return said


def test_a_dictionary_of_another_tokenizer(trained: Dictionary) -> None:
    assert trained.check(with_tokens(Tokens(60))) is trained
    # tokens added at the end, and a model of which no tokenizer is known, read the same
    more = Tokens(60)
    more.vocabulary["added"] = 60
    assert trained.check(with_tokens(more)) is trained
    assert trained.check(families.subject("gpt2")) is trained
    for other in (Tokens(60, first=1), Tokens(50)):
        with pytest.raises(ModelError, match=r"made for a model with another tokenizer \(60 tokens\)") as error:
            trained.check(with_tokens(other), other_model=True)
        one_line(error)


@pytest.mark.parametrize(
    ("place", "width", "kind", "words"),
    [
        ("resid1", W + 1, ModelError, "width 33 at resid1, model .* has 32: it was made for another model"),
        ("resid7", W, SettingsError, "resid7 does not exist: .* has layers 0-"),
        ("tuned:resid1", W, SettingsError, "place tuned:resid1 is of a model 'tuned', given are ''"),
        ("m1.in", W, SettingsError, "read by the MLP and written by no one"),
    ],
)
def test_a_dictionary_of_another_width_or_site(place: str, width: int, kind: type[MechscopeError], words: str) -> None:
    layout = autoencoder(place, width, 8, Rule("topk", 2))
    with pytest.raises(kind, match=words) as error, splice(families.subject("gpt2"), {place: Dictionary.plain(layout, layout.tensors())}):
        pass
    one_line(error)


def test_a_dictionary_of_another_model(trained: Dictionary) -> None:
    other = families.subject("gpt2", seed=1)
    with pytest.raises(ModelError, match=r"other weights .* pass other_model=True") as error:
        measure(other, trained, texts())
    one_line(error)
    assert measure(other, trained, texts(), other_model=True).tokens


class _Runs:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_a_pickle_with_anything_but_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder", "submodule_name": "resid_post_layer_1"}}')
    for state in ({"bias": torch.zeros(3), "code": _Runs()}, {"bias": torch.zeros(3), "number": 3}):
        torch.save(state, tmp_path / "ae.pt")
        with pytest.raises(ModelError, match="holds more than tensors") as error:
            read_dictionary_learning(tmp_path)
        one_line(error)
    assert "this ran" not in capsys.readouterr().out


def test_more_active_latents_than_there_are() -> None:
    with pytest.raises(SettingsError, match="k=9 of 8 latents cannot be active: give a smaller k or more latents") as error:
        autoencoder("resid1", W, 8, Rule("topk", 9))
    one_line(error)


def test_texts_of_which_nothing_is_left(tmp_path: Path) -> None:
    short = Pairs(tuple(from_tokens(torch.tensor([[at, at + 1, at + 2]])).pairs[0] for at in range(3, 6)), "short ones")
    with pytest.raises(DataError, match="no token of the 3 texts of short ones is left: the first 3 of each") as error:
        harvest(families.subject("gpt2"), short, "resid0", tmp_path / "h", settings=HarvestSettings(first=3))
    one_line(error)
    assert not (tmp_path / "h").exists()


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Let no file grow beyond a few kilobytes, as on a disk or quota that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_during_a_harvest(tmp_path: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, given = families.subject("gpt2"), texts()
    from mechscope.features import activations

    keep, done = activations._keep, list[Path]()

    def filling(rows: Any, path: Path, dtype: torch.dtype) -> dict[str, Any]:
        if done:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        found = keep(rows, path, dtype)
        done.append(path)
        return found

    monkeypatch.setattr(activations, "_keep", filling)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(RunError, match=r"block-00001\.safetensors.*(space|large|limit)") as error:
        harvest(subject, given, "resid0", tmp_path / "h", settings=SMALL)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    one_line(error)
    (kept,) = done
    written = kept.read_bytes()
    monkeypatch.setattr(activations, "_keep", keep)
    whole = harvest(subject, given, "resid0", tmp_path / "h", settings=SMALL)
    assert (whole.path / kept.name).read_bytes() == written, "the block that was finished is not made again"
    whole.verify()
