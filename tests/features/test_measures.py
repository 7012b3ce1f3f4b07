"""Measures are those of the definitions, over all tokens at once; losses are those of the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import Tensor

from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.features.affine import Affine
from mechscope.features.controls import controls_of, pca_control, random_control
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import autoencoder, cross_layer, crosscoder, transcoder
from mechscope.features.measures import Measures, difference_of, measure, measure_together
from mechscope.features.rows import Reader
from mechscope.features.rules import Rule
from mechscope.instrument import Execution
from mechscope.settings.features import TokenSettings
from mechscope.subject import Subject
from tests import families
from tests.features import oracle
from tests.features.test_harvest import texts
from tests.features.test_splice import by_hand, made

W, M = families.WIDTH, 50
LENGTHS = (14, 9, 11, 6, 12, 13, 7, 10)
ALL = TokenSettings(outlier=None)
every_family = pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])


def given(place: str = "resid1") -> Dictionary:
    return made(autoencoder(place, W, M, Rule("topk", 8)))


def kept_rows(subject: Subject, dictionary: Dictionary, pairs: Pairs) -> list[list[Tensor]]:
    """Return the activations at the dictionary's inputs and outputs, without each text's first token, text by text."""
    reader = Reader(subject, dictionary.layout.places, ALL)
    found = [reader.run(pairs, [index], Execution()).values for index in range(len(pairs))]
    return [[rows[place] for rows in found] for place in (*dictionary.layout.inputs, *dictionary.layout.outputs)]


@every_family
def test_measures_of_activations_are_their_definitions(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts(LENGTHS)
    layout = autoencoder("resid1", W, M, Rule("relu"))
    # some latents never speak
    tensors = layout.tensors(dtype=torch.float64)
    tensors["encoder_bias"][:7] = -1e3
    dictionary = Dictionary.plain(layout, tensors)
    found = measure(subject, dictionary, pairs, tokens=ALL, execution=Execution(tokens_per_batch=30))
    x = torch.cat(kept_rows(subject, dictionary, pairs)[0])
    f = oracle.encode(dictionary, [x])
    (y,) = oracle.reconstruct(dictionary, [x])
    tolerance = 1e-4 if family == "gemma2" else 1e-9
    expected = {
        "l0": (f != 0).sum(1).double().mean(),
        "explained variance": 1 - (x - y).square().sum() / (x - x.mean(0)).square().sum(),
        "cosine": torch.nn.functional.cosine_similarity(x, y).mean(),
        "norm ratio": (y.norm(dim=1) / x.norm(dim=1)).mean(),
        "reconstruction bias": y.square().sum() / (x * y).sum(),
        "dead": (f == 0).all(0).sum(),
    }
    for name, value in expected.items():
        assert found.value(name) == pytest.approx(float(value), rel=tolerance), name
    assert found.value("dead") >= 7
    np.testing.assert_allclose(found.latents["density"], (f != 0).double().mean(0), rtol=tolerance)
    active = (f != 0).any(0)
    np.testing.assert_allclose(found.latents["mean"][active.numpy()], (f.sum(0) / (f != 0).sum(0))[active], rtol=tolerance)
    assert found.tokens == len(x) == sum(LENGTHS) - len(LENGTHS)
    table = found.table.set_index("measure")
    assert (table["n"] == len(LENGTHS)).all()
    for name in ("l0", "explained variance", "cosine"):
        low, value, high = (float(table[column][name]) for column in ("low", "value", "high"))
        assert low < value < high


def losses(subject: Subject, ids: Tensor, change: Any) -> tuple[Tensor, Tensor]:
    """Return one text's mean loss and log-probabilities with the residual stream behind block 1 changed, except at the first token."""
    whole = families.Texts(ids[None], torch.ones(1, len(ids), dtype=torch.bool))

    def changed(x: Tensor) -> Tensor:
        new = x.clone()
        new[0, 1:] = change(x[0, 1:])
        return new

    logp = by_hand(subject, whole, 1, changed)[0].log_softmax(-1)
    return -logp[:-1].gather(1, ids[1:, None]).mean(), logp[:-1]


@every_family
def test_losses_are_those_of_the_model_with_the_place_replaced_by_hand(family: str) -> None:
    subject, pairs, dictionary = families.subject(family, torch.float64), texts(LENGTHS), given()
    found = measure(subject, dictionary, pairs, tokens=ALL, execution=Execution(tokens_per_batch=30))
    x = kept_rows(subject, dictionary, pairs)[0]
    mean = torch.cat(x).mean(0)
    changes: dict[str, Any] = {
        "own": lambda x: x,
        "spliced": lambda x: oracle.reconstruct(dictionary, [x])[0],
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }
    runs = {name: [losses(subject, torch.tensor(pair.clean), change) for pair in pairs] for name, change in changes.items()}
    loss = {name: float(torch.stack([one for one, _ in run]).mean()) for name, run in runs.items()}
    kl = {
        name: float(
            torch.stack([(own.exp() * (own - other)).sum(1).mean() for (_, own), (_, other) in zip(runs["own"], run, strict=True)]).mean()
        )
        for name, run in runs.items()
    }
    tolerance = 1e-4
    assert found.value("loss") == pytest.approx(loss["own"], rel=tolerance)
    assert found.value("loss, spliced") == pytest.approx(loss["spliced"], rel=tolerance)
    assert found.value("kl") == pytest.approx(kl["spliced"], rel=tolerance)
    for run in ("zero", "mean"):
        assert found.value(f"loss, {run}") == pytest.approx(loss[run], rel=tolerance)
        row = found.table.set_index("measure").loc[f"loss recovered, {run}"]
        share = (loss[run] - loss["spliced"]) / (loss[run] - loss["own"])
        assert row["value"] == pytest.approx(share, rel=1e-3) if not row["withheld"] else "does not raise the loss" in row["withheld"]
        assert found.value(f"kl recovered, {run}") == pytest.approx(1 - kl["spliced"] / kl[run], rel=1e-3)


def test_a_dictionary_that_says_everything_is_perfect_and_one_that_says_nothing_explains_nothing() -> None:
    subject, pairs = families.subject("llama", torch.float64), texts(LENGTHS)
    layout = autoencoder("resid1", W, 2 * W, Rule("relu"))
    eye = torch.eye(W, dtype=torch.float64)
    both = torch.cat([eye, -eye])
    tensors = {**layout.tensors(dtype=torch.float64), "encoder.0": both, "decoder.0": both}
    perfect = measure(subject, Dictionary.plain(layout, tensors), pairs)
    for name, value in {
        "explained variance": 1,
        "cosine": 1,
        "norm ratio": 1,
        "reconstruction bias": 1,
        "kl": 0,
        "kl recovered, mean": 1,
    }.items():
        assert perfect.value(name) == pytest.approx(value, abs=1e-6)
    mean = torch.cat(kept_rows(subject, Dictionary.plain(layout, tensors), pairs)[0]).mean(0)
    silent = {**tensors, "encoder_bias": torch.full((2 * W,), -1e9, dtype=torch.float64), "decoder_bias": mean}
    nothing = measure(subject, Dictionary.plain(layout, silent), pairs, tokens=ALL)
    assert nothing.value("explained variance") == pytest.approx(0, abs=1e-9)
    assert nothing.value("loss, spliced") == pytest.approx(nothing.value("loss, mean"), rel=1e-9)
    assert nothing.value("dead") == 2 * W


def test_explained_variance_takes_the_mean_of_every_feature() -> None:
    # where features have means of their own, the mean of all numbers would do for none of them
    subject, pairs = families.subject("gpt2", torch.float64), texts(LENGTHS)
    dictionary = given()
    x = torch.cat(kept_rows(subject, dictionary, pairs)[0])
    (y,) = oracle.reconstruct(dictionary, [x])
    wrong = 1 - (x - y).square().sum() / (x - x.mean()).square().sum()
    found = measure(subject, dictionary, pairs, tokens=ALL).value("explained variance")
    assert abs(found - float(wrong)) > 1e-3


def test_padding_and_batches_change_nothing() -> None:
    subject, pairs, dictionary = families.subject("gpt2", torch.float64), texts(LENGTHS), given()
    one, other = (measure(subject, dictionary, pairs, execution=Execution(tokens_per_batch=size)).table for size in (15, 10_000))
    np.testing.assert_allclose(one["value"], other["value"], rtol=1e-9)


def test_transcoders_and_crosscoders_have_their_places() -> None:
    subject, pairs = families.subject("llama", torch.float64), texts(LENGTHS)
    across = made(transcoder(1, W, M, Rule("gated"), skip=True))
    found = measure(subject, across, pairs, tokens=ALL)
    inside, outside = (torch.cat(rows) for rows in kept_rows(subject, across, pairs))
    (y,) = oracle.reconstruct(across, [inside])
    share = 1 - (outside - y).square().sum() / (outside - outside.mean(0)).square().sum()
    assert found.value("explained variance", "m1") == pytest.approx(float(share), rel=1e-6)
    models = {"base": subject, "tuned": families.subject("llama", torch.float64, seed=1)}
    both: Measures = measure(models, made(crosscoder("base:resid1,tuned:resid1", (W, W), M, Rule("topk", 8))), pairs)
    assert set(both.table["place"]) == {"base:resid1,tuned:resid1", "base:resid1", "tuned:resid1"}
    assert not both.table["measure"].str.contains("loss").any()


def test_controls_have_as_many_active_latents_and_principal_components_explain_what_they_do() -> None:
    subject, pairs = families.subject("llama", torch.float64), texts(LENGTHS)
    rows = torch.cat(kept_rows(subject, given(), pairs)[0])
    maps = (Affine(1.0, rows.mean(0)),)
    dictionary = Dictionary(given().layout, given().tensors, maps, maps)
    random, components = random_control(dictionary, 8), pca_control(dictionary, [rows], 8)
    assert measure(subject, random, pairs, tokens=ALL).value("l0") == pytest.approx(8, abs=0.5)
    centred = rows - rows.mean(0)
    basis = torch.linalg.svd(centred, full_matrices=False).Vh
    scores = centred @ basis.T
    largest = scores.abs().topk(8, dim=1).indices
    expected = (
        1 - (scores - torch.zeros_like(scores).scatter(1, largest, scores.gather(1, largest))).square().sum() / centred.square().sum()
    )
    found = measure(subject, components, pairs, tokens=ALL)
    assert found.value("l0") == 8
    assert found.value("explained variance") == pytest.approx(float(expected), rel=1e-6)
    both = crosscoder("resid0,resid1", (W, W), M, Rule("topk", 8))
    values = [rows, rows.flip(0)]
    exact = pca_control(Dictionary.plain(both, both.tensors(dtype=torch.float64)), values, 2 * W)
    for x, y in zip(values, exact(values), strict=True):
        # as many components as there are columns: nothing is lost but the mean, which these maps do not take off
        torch.testing.assert_close(y, x)


def test_a_transcoder_stands_beside_the_best_linear_map_and_a_cross_layer_one_beside_random_directions_that_can_run() -> None:
    subject, pairs = families.subject("llama", torch.float64), texts(LENGTHS)
    across = made(transcoder(1, W, M, Rule("topk", 8)))
    inside, outside = (torch.cat(rows) for rows in kept_rows(subject, across, pairs))
    controls = controls_of(across, [inside], [outside])
    assert set(controls) == {"random directions", "linear map"}
    found = measure_together(subject, {"": across, **controls}, pairs, tokens=ALL)
    design = torch.cat([inside, torch.ones(len(inside), 1)], dim=1)
    fitted = design @ torch.linalg.lstsq(design, outside).solution
    share = 1 - (outside - fitted).square().sum() / (outside - outside.mean(0)).square().sum()
    assert found["linear map"].value("explained variance") == pytest.approx(float(share), abs=1e-4)
    assert found["linear map"].value("l0") == 0
    assert found["random directions"].value("l0") == pytest.approx(found[""].value("l0"), abs=0.6)
    layered = made(cross_layer((0, 1), W, M, Rule("jumprelu")))
    rows = Reader(subject, layered.layout.places, ALL).run(pairs, range(len(pairs)), Execution()).values
    inputs, outputs = ([rows[place] for place in where] for where in (layered.layout.inputs, layered.layout.outputs))
    (random,) = controls_of(layered, inputs, outputs).values()
    one, other = measure_together(subject, {"": layered, "random": random}, pairs, tokens=ALL).values()
    assert other.value("l0") == pytest.approx(one.value("l0"), abs=0.6)
    assert np.isfinite(other.value("loss, spliced"))


@every_family
def test_dictionaries_measured_together_are_what_each_is_alone_with_one_run_of_the_model(family: str) -> None:
    subject, pairs, dictionary = families.subject(family, torch.float64), texts(LENGTHS), given()
    others = {"": dictionary, "random": random_control(dictionary, 8)}
    passes = [0]
    hook = subject.anatomy.blocks[1].module.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    try:
        together = measure_together(subject, others, pairs, tokens=ALL)
    finally:
        hook.remove()
    # the activations; the model's own run, with zero, with the mean, and through each dictionary
    assert passes[0] == 1 + 3 + len(others)
    for name, each in others.items():
        alone = measure(subject, each, pairs, tokens=ALL)
        assert_frame_equal(together[name].table, alone.table, rtol=1e-9)
        assert_frame_equal(together[name].latents, alone.latents)
    with pytest.raises(SettingsError, match=r"dictionary 'far' reads resid0 and writes resid0, the first .* resid1"):
        measure_together(subject, {"": dictionary, "far": given("resid0")}, pairs)
    with pytest.raises(SettingsError, match="no dictionary to measure"):
        measure_together(subject, {}, pairs)


def test_too_few_texts_and_what_does_not_fit_are_told() -> None:
    subject = families.subject("gpt2", torch.float64)
    few = measure(subject, given(), texts((9, 8)))
    row = few.table.set_index("measure").loc["explained variance"]
    assert np.isnan(row["value"])
    assert "2" in row["withheld"]
    with pytest.raises(ModelError, match="width 12 at resid1"):
        measure(subject, oracle.dictionary(autoencoder("resid1", 12, M, Rule("relu"))), texts())
    with pytest.raises(DataError, match="no token of the"):
        measure(subject, given(), texts((3, 3)), tokens=TokenSettings(first=5))


def test_the_difference_of_two_dictionaries_is_that_of_their_measures_and_surer_than_each() -> None:
    subject, pairs = families.subject("llama", torch.float64), texts(LENGTHS)
    rows = torch.cat(kept_rows(subject, given(), pairs)[0])
    maps = (Affine(1.0, rows.mean(0)),)
    dictionary = Dictionary(given().layout, given().tensors, maps, maps)
    one, other = (measure(subject, pca_control(dictionary, [rows], k), pairs, tokens=ALL) for k in (12, 10))
    found = difference_of(one, other).set_index("measure")
    for name in ("l0", "explained variance", "cosine", "loss, spliced", "kl"):
        assert found.loc[name, "value"] == pytest.approx(one.value(name) - other.value(name))
    row, alone = found.loc["explained variance"], one.table.set_index("measure").loc["explained variance"]
    assert row["low"] > 0
    assert row["high"] - row["low"] < alone["high"] - alone["low"]
    with pytest.raises(SettingsError, match="measures of different texts"):
        difference_of(one, measure(subject, dictionary, texts(LENGTHS[:-1]), tokens=ALL))
