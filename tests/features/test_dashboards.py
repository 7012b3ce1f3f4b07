"""Dashboards hold what a slow look at every token of every text gives: examples, histograms, correlations; random ones do not depend on the batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from mechscope.data.pairs import Pairs
from mechscope.errors import SettingsError
from mechscope.features import DashboardSettings, dashboard
from mechscope.features.dashboards import _correlations
from mechscope.features.observed import Heads, Latents, Neurons
from mechscope.features.reservoirs import Sample, Span
from mechscope.features.windows import LOWEST, STEPS, watch
from mechscope.instrument import Execution, record
from mechscope.settings.features import TokenSettings
from mechscope.subject import Subject
from tests import families
from tests.features import oracle
from tests.features.test_harvest import texts
from tests.features.test_measures import ALL, LENGTHS, M, every_family, given, kept_rows

MANY = (14, 9, 11, 6, 12, 13, 7, 10, 14, 14, 13, 12)


def codes_of(subject: Subject, pairs: Pairs) -> list[np.ndarray]:
    """Return every text's codes (token, latent), zero at its first token, which is left out."""
    found = [oracle.encode(given(), [x]).detach().numpy() for x in kept_rows(subject, given(), pairs)[0]]
    return [np.concatenate([np.zeros((1, M)), each]) for each in found]


@every_family
def test_a_dashboard_is_what_every_token_says(family: str) -> None:
    subject, pairs = families.subject(family), texts(MANY)
    settings = DashboardSettings(examples=3, of_decile=2, drawn=1000, before=3, after=2)
    found = dashboard(subject, given(), pairs, settings=settings, tokens=ALL, execution=Execution(tokens_per_batch=30))
    codes = codes_of(subject, pairs)
    together = np.concatenate([each[1:] for each in codes])
    energy = (together**2).sum(0)
    latents = found.latents.set_index("component")
    assert latents.index.tolist() == [f"resid1.f{latent}" for latent in np.argsort(-energy, kind="stable") if energy[latent] > 0]
    assert found.tokens == found.sample == len(together)
    for name, row in latents.iterrows():
        own = together[:, int(str(name).partition(".f")[2])]
        active = own[own > 0]
        assert row["active"] == row["sampled"] == len(active)
        assert row["density"] == pytest.approx(len(active) / len(own))
        assert row["share"] == pytest.approx((own**2).sum() / energy.sum(), rel=1e-4)
        assert row["largest"] == pytest.approx(own.max(), rel=1e-4)
        edges = 2.0 ** (LOWEST + (row["bar"] + np.arange(len(row["counts"]) + 1)) / STEPS)
        # a value at the edge of a bar may fall on either side
        assert np.abs(np.histogram(active, bins=edges)[0] - row["counts"]).sum() <= 2
        assert sum(row["counts"]) == len(active)
    for example in found.examples.to_dict("records"):
        own, at = codes[example["text"]][:, int(example["component"].partition(".f")[2])], example["position"]
        window = slice(example["start"], example["start"] + len(example["ids"]))
        assert example["start"] == max(0, at - 3)
        assert example["ids"] == list(pairs.pairs[example["text"]].clean[window])
        assert example["value"] == pytest.approx(own[at], rel=1e-4)
        assert own[at] > 0
        np.testing.assert_allclose(example["values"], own[window], rtol=2e-3, atol=1e-4)
        assert example["ids"][at - example["start"]] == pairs.pairs[example["text"]].clean[at]
    # every activation was drawn: what is left of the tenths has no overlap, and falls from tenth to tenth
    for _, random in found.examples[found.examples["decile"] > 0].groupby("component"):
        assert random["value"].is_monotonic_decreasing
        for _, of_text in random.groupby("text"):
            assert (np.diff(np.sort(of_text["position"])) >= 6).all()


@every_family
def test_correlations_are_those_of_all_tokens(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts(MANY)
    found = dashboard(subject, given().to(torch.float64), pairs, settings=DashboardSettings(related=3), tokens=ALL)
    # heads of the blocks up to the one behind which latents are read, as recorded one text at a time
    norms = []
    for pair in pairs:
        with record(subject, "head_output", layers=[0, 1]) as recording, torch.no_grad():
            subject.model(torch.tensor([pair.clean]))
        norms.append(torch.cat([recording["head_output", layer][0, 1:].norm(dim=-1) for layer in (0, 1)], dim=1))
    heads, latents = torch.cat(norms).numpy(), np.concatenate([each[1:] for each in codes_of(subject, pairs)])
    names = [f"a{layer}.h{head}" for layer in (0, 1) for head in range(subject.anatomy.n_heads)]
    tolerance = 2e-3 if family == "gemma2" else 1e-5
    told = 0
    for component, own in found.correlations.groupby("component"):
        latent = int(str(component).partition(".f")[2])
        with np.errstate(invalid="ignore", divide="ignore"):
            both = np.corrcoef(latents.T)[latent]
            with_heads = np.array([np.corrcoef(latents[:, latent], column)[0, 1] for column in heads.T])
        both[latent] = -1
        listed = dict(tuple(own.groupby("kind")))
        assert listed["head"]["correlation"].tolist() == pytest.approx(
            with_heads[np.argsort(-np.abs(with_heads), kind="stable")[:3]].tolist(), abs=tolerance
        )
        best = np.sort(np.nan_to_num(both, nan=-1))[::-1][:3]
        assert listed["latent"]["correlation"].tolist() == pytest.approx([each for each in best if each > 0], abs=tolerance)
        for row in listed["head"].to_dict("records"):
            assert row["correlation"] == pytest.approx(with_heads[names.index(row["other"])], abs=tolerance)
        told += 1
    # those that are active in ten tokens or more, and no others
    assert told == ((latents > 0).sum(0) >= 10).sum() > 5
    assert (found.chance["largest"] >= 0).all()
    assert set(found.chance["kind"]) == {"latent", "head"}


def sampled(codes: list[list[float]], heads: list[list[float]]) -> Any:
    """Return what was seen where a sample of tokens is all that counts, unit by unit."""
    sample = Sample(np.zeros(40, dtype=int), np.arange(40), csr_matrix(np.array(codes).T), np.array(heads).T)
    return SimpleNamespace(names=[f"resid0.f{unit}" for unit in range(len(codes))], sample=sample)


HALF, BUT_ONE, ONE = [1.0] * 20 + [0.0] * 20, [1.0] * 39 + [0.0], [0.0] * 39 + [5.0]


def test_by_chance_correlations_are_those_worked_out_by_hand() -> None:
    """Of 40 tokens a latent is active in 20 or in 39, alike in each: whatever the order, few correlations are possible."""
    edge, seen = 1 / 39**0.5, list[float]()
    for seed in range(200):
        units = sampled([HALF, BUT_ONE], [ONE])
        told, chance, active = _correlations(units, [0, 1], ["a0.h0"], 3, seed)
        assert active == [20, 39]
        by_chance, largest = (chance.set_index(["component", "kind"])[name].astype(float).to_dict() for name in ("shuffled", "largest"))
        # a head that stands out at one token: with a half of all ±1/√39 wherever that token goes, and by its size
        assert by_chance["resid0.f0", "head"] == pytest.approx(edge)
        # with the latent that is silent at one token: −1/39 where the tokens differ, which is 1/39 by its size, and 1 where they are the same
        assert round(by_chance["resid0.f1", "head"] * 39) in (1, 39)
        assert largest["resid0.f1", "head"] == pytest.approx(1)
        # of its own kind the half, and itself as a candidate like any other
        seen.append(by_chance["resid0.f1", "latent"])
        assert told["correlation"].abs().max() <= 1 + 1e-12
    # at its silent token comes one of the half's 20 active tokens, one of 19 others (then its own −1/39 is more than −1/√39), or that token itself
    possible = np.array([edge, -1 / 39, 1])
    kinds = np.abs(np.array(seen)[:, None] - possible).argmin(1)
    assert seen == pytest.approx(possible[kinds].tolist())
    for kind, share in enumerate((20 / 40, 19 / 40, 1 / 40)):
        # four standard deviations
        assert np.mean(kinds == kind) == pytest.approx(share, abs=4 * (share * (1 - share) / len(seen)) ** 0.5)


def test_what_goes_with_a_latent_for_certain_is_chance_with_the_tokens_shuffled() -> None:
    """Two columns put side by side at random have a mean correlation of 0 and a mean square of 1 / (n − 1)."""
    shuffled: dict[str, list[float]] = {"latent": [], "head": []}
    for seed in range(300):
        _, chance, _ = _correlations(sampled([HALF, HALF], [HALF]), [0], ["a0.h0"], 1, seed)
        for row in chance.to_dict("records"):
            assert row["largest"] == pytest.approx(1)
            shuffled[row["kind"]].append(row["shuffled"])
    for values in shuffled.values():
        squares = np.square(values)
        assert squares.mean() == pytest.approx(1 / 39, abs=4 * squares.std() / len(squares) ** 0.5)
    assert np.mean(shuffled["latent"]) == pytest.approx(0, abs=4 / (39 * 300) ** 0.5)


def test_random_examples_depend_on_the_seed_alone() -> None:
    subject, pairs = families.subject("gpt2"), texts(LENGTHS)
    settings = DashboardSettings(examples=1, drawn=4, of_decile=1, before=0, after=1, sample=20, latents=7)
    runs = {
        (tokens, seed): dashboard(subject, given(), pairs, settings=settings, execution=Execution(tokens_per_batch=tokens, seed=seed))
        for tokens, seed in ((10_000, 0), (20, 0), (10_000, 1))
    }
    one, other, another = (
        [*zip(run.examples["component"], run.examples["text"], run.examples["position"], strict=True)] for run in runs.values()
    )
    assert one == other
    assert one != another
    first, second, _ = (run.correlations for run in runs.values())
    assert first["other"].tolist() == second["other"].tolist()


def test_random_activations_are_drawn_from_all_alike() -> None:
    subject, pairs = families.subject("gpt2"), texts((40,) * 40)
    kept = [
        watch(Latents(subject, given(), pairs), pairs, top=1, drawn=10, execution=Execution(seed=seed, tokens_per_batch=200))
        for seed in range(3)
    ]
    # unit by unit, the text of a draw from the middle of those in which it is active: half of them below
    below = total = 0
    for seen in kept:
        for unit in range(M):
            if seen.active[unit] < 200:
                continue
            # by the text alone: tokens of all texts are alike
            below += int((seen.drawn.of(unit).text < 20).sum())
            total += 10
    assert total > 300
    assert abs(below / total - 0.5) < 4 * 0.5 / total**0.5
    # a unit's draws are its own
    assert len({tuple(seen.drawn.of(unit).position.tolist()) for seen in kept for unit in range(M) if seen.active[unit] > 200}) > 30


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_neurons_and_heads_are_active_where_they_are_largest(family: str) -> None:
    subject, pairs = families.subject(family), texts(MANY)
    neurons, heads = ["m1.n3", "m0.n7"], ["a1.h2", "a0.h0"]
    gated = family in ("llama", "gemma2")
    truth: dict[str, list[np.ndarray]] = {name: [] for name in (*neurons, *heads)}
    for pair in pairs:
        with record(subject, "neuron", "head_output", layers=[0, 1]) as recording, torch.no_grad():
            subject.model(torch.tensor([pair.clean]))
        for name, layer, neuron in (("m1.n3", 1, 3), ("m0.n7", 0, 7)):
            own = recording["neuron", layer][0, :, neuron]
            truth[name].append((own.abs() if gated else own)[1:].numpy())
        for name, layer, head in (("a1.h2", 1, 2), ("a0.h0", 0, 0)):
            truth[name].append(recording["head_output", layer][0, 1:, head].norm(dim=-1).numpy())
    for kind, names in ((Neurons, neurons), (Heads, heads)):
        observed = kind(subject, names, pairs, share=0.2, tokens=TokenSettings(outlier=None), execution=Execution(tokens_per_batch=40))
        seen = watch(observed, pairs, top=4, span=Span(1, 1))
        for unit, name in enumerate(names):
            every = np.concatenate(truth[name])
            threshold = max(0.0, float(np.quantile(every, 0.8)))
            assert seen.active[unit] == pytest.approx((every > threshold).sum(), abs=1)
            best = np.sort([each.max() for each in truth[name]])[::-1][:4]
            np.testing.assert_allclose(seen.top.of(unit).value, best, rtol=1e-3)
            for at in range(4):
                text, position = int(seen.top.of(unit).text[at]), int(seen.top.of(unit).position[at])
                assert truth[name][text][position - 1] == pytest.approx(best[at], rel=1e-3)


def test_what_does_not_exist_is_refused() -> None:
    subject, pairs = families.subject("gpt2"), texts(LENGTHS)
    with pytest.raises(SettingsError, match=r"neuron m0\.n999 does not exist"):
        Neurons(subject, ["m0.n999"], pairs)
    with pytest.raises(SettingsError, match=r"component a9\.h0 does not exist: the model has layers 0-2 with heads 0-3"):
        Heads(subject, ["a9.h0"], pairs)
    for other in ("a1.h0,a1.h1", "m1", "none"):
        with pytest.raises(SettingsError, match=f"'{other}' is not one head: write a3.h5"):
            Heads(subject, [other], pairs)
    with pytest.raises(SettingsError, match=r"neuron 'a1' is not understood: write m3\.n1024"):
        Neurons(subject, ["a1"], pairs)
    with pytest.raises(SettingsError, match="latent 50 does not exist"):
        Latents(subject, given(), pairs, latents=[50])
    with pytest.raises(SettingsError, match="show at least one token"):
        dashboard(subject, given(), pairs, settings=DashboardSettings(before=0, after=0))
