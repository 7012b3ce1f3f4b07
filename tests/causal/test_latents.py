"""Latents of dictionaries are components: ablating, patching, attributing and steering them is what a plain model with hooks does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.causal import ablate, attribution_patch, mean_of, patch
from mechscope.causal.places import latent_places
from mechscope.data.pairs import collate_pairs
from mechscope.errors import SettingsError
from mechscope.features import Dictionary, Rule, autoencoder
from mechscope.features.standing import Standing
from mechscope.studies.jobs.ablate import JOB as ABLATE
from mechscope.studies.jobs.patch import JOB as PATCH
from mechscope.studies.jobs.steer import JOB as STEER
from mechscope.subject import Components
from tests.causal.pairs import telling_pairs
from tests.features import oracle
from tests.features.node_world import PAIRS, decoders, every_family, exact, later, metric, parts, seen, standing
from tests.studies.jobs.running import PAIRS as PAIRS_OF_JOBS
from tests.studies.jobs.running import refuses, run, shown, subject

# of a rule that decides for each latent alone, and of TopK
LATENTS = ("a1.f3", "resid0.f2", "resid0.f9", "resid1.f5", "m1.f7")
NAMES = ",".join(LATENTS)


def setting(each: Standing, latent: int, value: Tensor | float, where: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return the change that sets a latent at some tokens; at those that count, all but the first of each text, where none are given."""
    tokens = later(PAIRS)[..., 0] if where is None else where

    def change(x: Tensor) -> Tensor:
        f = parts(each, x)[0][..., latent]
        moved = x + (value - f)[..., None] * decoders(each)[latent]
        return torch.where(tokens[..., None], moved, x)

    return change


def of(family: str, name: str) -> tuple[Standing, int]:
    """Return the dictionary of a latent, and which it is."""
    place, _, latent = name.rpartition(".f")
    return next(each for each in standing(family) if each.place.name == place), int(latent)


@pytest.mark.parametrize("source", ["zero", "corrupt", "mean"])
@every_family
def test_ablating_a_latent_sets_it_and_nothing_else(family: str, source: str) -> None:
    model, others = exact(family), standing(family)
    given = mean_of(model, PAIRS, [], standing=others) if source == "mean" else source
    found = ablate(model, PAIRS, sites=["latent"], source=given, metric="logit-diff", components=NAMES, standing=others)
    assert found.table["component"].tolist() == sorted(LATENTS, key=lambda name: (name.rpartition(".f")[0], int(name.rpartition("f")[2])))
    assert set(found.table["site"]) == {"latent"}
    corrupt = seen(model, PAIRS, [each.place for each in others], corrupt=True)
    clean = seen(model, PAIRS, [each.place for each in others])
    read = later(PAIRS)[..., 0]
    for name, row in zip(found.table["component"], found.values, strict=True):
        each, latent = of(family, name)
        values: dict[str, Tensor | float] = {
            "zero": 0.0,
            "corrupt": parts(each, corrupt[each.place])[0][..., latent],
            "mean": float(parts(each, clean[each.place])[0][..., latent][read].mean()),
        }
        expected = metric(model, PAIRS, {each.place: setting(each, latent, values[source])})
        np.testing.assert_allclose(row, expected, rtol=1e-7, atol=1e-9)
    assert (np.abs(found.table["effect"]) > 1e-6).sum() >= 2


@every_family
def test_patching_a_latent_puts_the_other_runs_value_there(family: str) -> None:
    model, others = exact(family), standing(family)
    places = [each.place for each in others]
    runs = {side: seen(model, PAIRS, places, corrupt=side == "corrupt") for side in ("clean", "corrupt")}
    where = collate_pairs(PAIRS.pairs).positions([2, 5])
    ways: tuple[tuple[Literal["denoise", "noise"], str, str], ...] = (("denoise", "clean", "corrupt"), ("noise", "corrupt", "clean"))
    for direction, given, changed in ways:
        found = patch(
            model,
            PAIRS,
            site="latent",
            direction=direction,
            positions=[2, 5],
            components=NAMES,
            standing=others,
        )
        estimated = attribution_patch(
            model,
            PAIRS,
            site="latent",
            direction=direction,
            positions=[2, 5],
            components=NAMES,
            standing=others,
            check=len(LATENTS),
        )
        np.testing.assert_allclose(estimated.table["exact"], found.table["effect"], rtol=1e-7, atol=1e-9)
        unchanged = metric(model, PAIRS, {}, corrupt=changed == "corrupt")
        for name, row, estimate in zip(found.table["component"], found.values, estimated.values, strict=True):
            each, latent = of(family, name)
            value, now = (parts(each, runs[side][each.place])[0][..., latent] for side in (given, changed))
            change = setting(each, latent, value, where)
            np.testing.assert_allclose(row, metric(model, PAIRS, {each.place: change}, corrupt=changed == "corrupt"), rtol=1e-7, atol=1e-9)
            # to first order: the derivative on the way there
            step = (value - now)[..., None] * decoders(each)[latent] * where[..., None]
            ends = [
                metric(model, PAIRS, {each.place: partial(torch.add, sign * 1e-5 * step)}, corrupt=changed == "corrupt") for sign in (1, -1)
            ]
            np.testing.assert_allclose(estimate - unchanged.numpy(), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)


def test_all_latents_of_all_dictionaries_are_estimated_at_once() -> None:
    model, others = exact("gpt2"), standing("gpt2")
    every = attribution_patch(model, PAIRS, site="latent", positions=["all", "changed"], standing=others)
    assert len(every.table) == 2 * 24 * len(others)
    some = attribution_patch(model, PAIRS, site="latent", positions=["all", "changed"], components=NAMES, standing=others)
    at = every.table.set_index(["component", "positions"])["effect"]
    for row in some.table.to_dict("records"):
        assert row["effect"] == pytest.approx(at[row["component"], row["positions"]], rel=1e-9, abs=1e-12)
    # each set of tokens by itself
    for positions in ("all", "changed"):
        alone = attribution_patch(model, PAIRS, site="latent", positions=positions, components=NAMES, standing=others).table
        own = some.table[some.table["positions"] == positions].set_index("component")["effect"]
        np.testing.assert_allclose(alone.set_index("component")["effect"], own, rtol=1e-9, atol=1e-12)
    both = some.table.pivot(index="component", columns="positions", values="effect")
    assert (both["all"] - both["changed"]).abs().max() > 1e-3


def test_keeping_one_latent_sets_all_others_of_those_named() -> None:
    model, others = exact("llama"), standing("llama")
    found = ablate(model, PAIRS, sites=["latent"], mode="keep", metric="logit-diff", components="a1.f3,a1.f4,m1.f7", standing=others)
    (a1, three), (_, four), (m1, seven) = (of("llama", name) for name in ("a1.f3", "a1.f4", "m1.f7"))
    expected = {
        "a1.f3": {a1.place: setting(a1, four, 0.0), m1.place: setting(m1, seven, 0.0)},
        "m1.f7": {a1.place: lambda x: setting(a1, three, 0.0)(x) + setting(a1, four, 0.0)(x) - x},
    }
    for name, changes in expected.items():
        row = found.table["component"].tolist().index(name)
        np.testing.assert_allclose(found.values[row], metric(model, PAIRS, changes), rtol=1e-7, atol=1e-9)


@pytest.fixture
def dictionary(tmp_path: Path) -> str:
    """A file with a dictionary of the small model of jobs."""
    given = oracle.dictionary(autoencoder("resid1", subject().anatomy.d_model, 30, Rule("topk", 5)))
    given.to(torch.float32).save(tmp_path / "resid1.safetensors")
    return str(tmp_path / "resid1.safetensors")


def test_jobs_take_latents_beside_heads_and_by_themselves(tmp_path: Path, dictionary: str) -> None:
    loaded = Standing.of(Dictionary.load(dictionary), subject())
    both = run(ABLATE, tmp_path / "ablate", components="a1.h2,resid1.f3", dictionary=dictionary).effects
    assert both["component"].tolist() == ["a1.h2", "resid1.f3"]
    assert both["site"].tolist() == ["z", "latent"]
    assert both["feature"].tolist() == [-1, 3]
    alone = run(ABLATE, None, components="resid1.f3", dictionary=dictionary).effects
    assert alone["effect"].tolist() == pytest.approx(both["effect"].tolist()[1:])
    assert "resid1.f3" in shown(run(ABLATE, tmp_path / "ablate", components="a1.h2,resid1.f3", dictionary=dictionary), "effects")
    patched = run(PATCH, None, components="resid1.f3,resid1.f4", dictionary=dictionary).effects
    expected = patch(subject(), PAIRS_OF_JOBS, site="latent", components="resid1.f3,resid1.f4", standing=[loaded])
    np.testing.assert_allclose(patched["effect"], expected.table["effect"])
    every = run(PATCH, None, site="latent", method="attribution", dictionary=dictionary).effects
    assert len(every) == 30


def test_steering_by_a_latent_adds_what_it_writes(tmp_path: Path, dictionary: str) -> None:
    pairs = telling_pairs(subject(), 8)
    result = run(STEER, tmp_path / "steer", pairs=pairs, latent="resid1.f3", strengths="-2,3", controls=1, dictionary=dictionary)
    table = result.steer
    assert set(table.loc[table["draw"] < 0, "direction"]) == {"resid1.f3"}
    (place,) = latent_places([Standing.of(Dictionary.load(dictionary), subject())], "resid1.f3")
    row = place.standing.decoders[3]
    for strength in (-2.0, 3.0):
        own = table[(table["strength"] == strength) & (table["draw"] < 0) & (table["texts"] == "pairs")].iloc[0]
        steered = metric(subject(), pairs, {place.standing.place: partial(torch.add, strength * row)})
        assert own["value"] == pytest.approx(float(steered.detach().mean()), rel=1e-4)
        # all pairs: none is needed to find the direction
        assert own["n"] == len(pairs)
    assert "resid1.f3" in shown(result, "steer")


def test_latents_without_their_dictionary_or_where_none_are_taken_are_refused(tmp_path: Path, dictionary: str) -> None:
    refuses(
        ABLATE,
        tmp_path / "ablate",
        SettingsError,
        r"resid1\.f3 is a latent of a dictionary at resid1, and there is no dictionary",
        components="resid1.f3",
    )
    refuses(
        PATCH,
        tmp_path / "patch",
        SettingsError,
        r"a latent of a dictionary at a0, and dictionaries stand at resid1",
        components="a0.f3",
        dictionary=dictionary,
    )
    refuses(PATCH, tmp_path / "patch", SettingsError, r"latent resid1\.f30 does not exist", components="resid1.f30", dictionary=dictionary)
    refuses(PATCH, tmp_path / "patch", SettingsError, "there is no dictionary: latents are written", site="latent")
    refuses(STEER, tmp_path / "steer", SettingsError, "give one latent", latent="resid1.f3,resid1.f4", dictionary=dictionary)
    with pytest.raises(SettingsError, match="give either --layer"):
        STEER.resolve(model="m", pairs="p", layer=1, latent="resid1.f3")
    with pytest.raises(SettingsError, match="leave --positive, --negative and --head out"):
        STEER.resolve(model="m", pairs="p", latent="resid1.f3", head=1)
    with pytest.raises(SettingsError, match=r"component resid1\.f3 is a latent of a dictionary, and heads, MLPs or layers are needed here"):
        Components.parse("a1.h2,resid1.f3").validate(subject().anatomy)


def test_a_selection_with_latents_is_read_written_and_combined() -> None:
    chosen = Components.parse("a3.h5,resid6.f1024,a2.z.f3,m3,m3.f2")
    assert str(chosen) == "a3.h5,m3,a2.z.f3,m3.f2,resid6.f1024"
    assert Components.parse(str(chosen)) == chosen
    assert len(chosen) == 5
    assert str(chosen - Components.parse("m3.f2,a3.h5")) == "m3,a2.z.f3,resid6.f1024"
    assert str(chosen & Components.parse("m3.f2,a3.h5")) == "a3.h5,m3.f2"
    assert str(chosen.without_latents | Components.parse("m3.f2")) == "a3.h5,m3,m3.f2"
    assert chosen.expand(2).latents == chosen.latents
