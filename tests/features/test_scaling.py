"""Latent scaling equals least squares on every latent's own residual, in parts or all at once, and tells a shrunken decoder from one that is not there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.errors import DataError, ModelError
from mechscope.features import crosscoder
from mechscope.features.dictionary import Dictionary
from mechscope.features.diffing import Decoders, ScalingSums, classified, found_again, latent_scaling, scaled_latents, scaling_sums
from mechscope.features.layout import Layout, autoencoder
from mechscope.features.rules import Rule
from mechscope.instrument import Execution, model_inputs, record
from mechscope.settings.diffing import ExclusiveSettings
from mechscope.settings.features import TokenSettings
from tests.causal.pairs import random_pairs
from tests.difference.oracle import models
from tests.features import oracle

RULES = (Rule("relu"), Rule("batchtopk", 5, by_norm=True))
ONE, TWO = crosscoder("base:resid1,tuned:resid1", (12, 12), 40, RULES[1]), "base:resid0,base:m1,tuned:resid0,tuned:m1"


def least_squares(f: Tensor, v: Tensor, y: Tensor) -> float:
    """Return the scale of f v in Y, token and dimension after dimension."""
    column = (f[:, None] * v).flatten()[:, None].numpy()
    return float(np.linalg.lstsq(column, y.flatten().numpy(), rcond=None)[0][0])


def by_hand(given: Dictionary, values: list[Tensor], latent: int) -> dict[str, float]:
    """Return ν of one latent by four regressions."""
    u = torch.cat([(value - each.centre) * each.scale for value, each in zip(values, given.output_maps, strict=True)], dim=1)
    f, decoder = oracle.encode(given, values), given.tensors["decoder.0"]
    rebuilt = f @ decoder + given.tensors["decoder_bias"]
    halves = [part.split(u.shape[1] // 2, dim=1) for part in (u, rebuilt, decoder)]
    norms = [part[latent].norm() for part in halves[2]]
    own = int(norms[1] >= norms[0])
    v = halves[2][own][latent]
    betas: dict[str, list[float]] = {"error": [], "reconstruction": []}
    for x, y, part in zip(*halves, strict=True):
        betas["error"].append(least_squares(f[:, latent], v, x - (y - f[:, latent, None] * part[latent])))
        betas["reconstruction"].append(least_squares(f[:, latent], v, y))
    return {f"nu_{name}": each[1 - own] / each[own] if each[own] > 0 else np.nan for name, each in betas.items()}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("where", ["base:resid1,tuned:resid1", TWO])
def test_nu_is_that_of_least_squares_on_every_latents_own_residual(where: str, rule: Rule) -> None:
    layout = crosscoder(where, (12,) * len(where.split(",")), 40, rule)
    given, values = oracle.dictionary(layout), oracle.inputs(layout)
    table = scaled_latents(given, scaling_sums(given, values)[0])
    active = table[table["tokens"] > 0]
    assert len(active) > 20
    for row in active.to_dict("records"):
        for name, expected in by_hand(given, values, row["latent"]).items():
            assert row[name] == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True), (row["latent"], name)
    assert table.loc[table["tokens"] == 0, "nu_error"].isna().all()


def test_tokens_in_parts_give_what_all_at_once_give_and_what_is_missed_token_by_token() -> None:
    given, values = oracle.dictionary(ONE), oracle.inputs(ONE)
    whole, counts, fit = scaling_sums(given, values)
    parts = [scaling_sums(given, [value[part] for value in values]) for part in (slice(0, 11), slice(11, 12), slice(12, None))]
    added = parts[0][0] + parts[1][0] + parts[2][0]
    for name in ("active", "squares", "error", "rebuilt"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    rebuilt = oracle.reconstruct(given, values)
    for model, (x, y, each) in enumerate(zip(values, rebuilt, given.output_maps, strict=True)):
        torch.testing.assert_close(fit[model, 0], ((x - y) * each.scale).square().sum(1))
        torch.testing.assert_close(fit[model, 1], ((x - each.centre) * each.scale).square().sum(1))
    assert counts.tolist() == (oracle.encode(given, values) != 0).sum(1).tolist()


def test_every_column_of_a_latent_is_worked_out_from_its_sums_and_its_two_decoders() -> None:
    layout = crosscoder("base:resid1,tuned:resid1", (2, 2), 4, RULES[0])
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in layout.shapes().items()}
    # the second model's is longer, at a right angle; the first's, along it; one that is silent; one that the second model alone has
    tensors["decoder.0"] = torch.tensor([[3.0, 0, 0, 4], [5, 0, 3, 0], [1, 0, 1, 0], [0, 0, 0, 2]], dtype=torch.float64)
    sums = ScalingSums(
        10,
        torch.tensor([2, 5, 0, 1]),
        torch.tensor([8.0, 4, 0, 1], dtype=torch.float64),
        torch.tensor([[64.0, -50, 0, 1], [-32, 10, 0, -8]], dtype=torch.float64),
        torch.tensor([[12.8, 50, 0, 0], [64, 10, 0, 2]], dtype=torch.float64),
    )
    table = scaled_latents(Dictionary.plain(layout, tensors), sums)
    nan = np.nan
    expected: dict[str, list[float]] = {
        "tokens": [2, 5, 0, 1],
        "density": [0.2, 0.5, 0, 0.1],
        "squares": [0.8, 0.4, 0, 0.1],
        "energy": [0.8 * 25, 0.4 * 34, 0, 0.1 * 4],
        "norm_first": [3, 5, 1, 0],
        "norm_second": [4, 3, 1, 2],
        "relative_norm": [0.625, 0.3, 0.5, 1],
        # (Σ f⟨x − x̂, v⟩ + Σ f² ⟨D, v⟩) / (Σ f² ‖v‖²): 0 + 64 and 128 − 32 of 128; 100 − 50 and 60 + 10 of 100; 1 and 4 − 8 of 4
        "beta_error": [0.75, 0.5, nan, -1],
        "nu_error": [0.5 / 0.75, 0.7 / 0.5, nan, nan],
        "beta_reconstruction": [0.5, 0.5, nan, 0.5],
        "nu_reconstruction": [0.2, 0.2, nan, 0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], values, atol=1e-12, err_msg=name)


def test_texts_of_which_no_token_is_left_are_refused() -> None:
    both = models("gpt2")
    width = both.base.anatomy.d_model
    given = oracle.dictionary(crosscoder("base:resid1,tuned:resid1", (width, width), 30, RULES[1]))
    with pytest.raises(DataError, match=r"no token of the 5 texts .* is left: the first 100 of each"):
        latent_scaling({"base": both.base, "tuned": both.tuned}, given, random_pairs(5), tokens=TokenSettings(first=100, outlier=None))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_two_models_are_read_on_the_same_tokens(family: str) -> None:
    both, texts = models(family), random_pairs(5)
    width = both.base.anatomy.d_model
    layout = crosscoder("base:resid1,tuned:resid1", (width, width), 30, RULES[1])
    given = oracle.dictionary(layout)
    table = latent_scaling(
        {"base": both.base, "tuned": both.tuned}, given, texts, tokens=TokenSettings(first=1, outlier=None), execution=Execution(24)
    )
    rows = []
    for subject in (both.base, both.tuned):
        parts = []
        for text in texts:
            with record(subject, "residual", layers={1}) as recording, torch.no_grad():
                subject.model(**model_inputs(torch.tensor([text.clean]), None))
            parts.append(recording["residual", 1][0, 1:])
        rows.append(torch.cat(parts))
    expected = scaled_latents(given, scaling_sums(given, rows)[0])
    assert (table["tokens"] > 0).sum() > 5
    for name in table:
        np.testing.assert_allclose(table[name], expected[name], rtol=1e-9, atol=1e-9)


def planted(base: float, *, twin: bool = False) -> tuple[Dictionary, list[Tensor]]:
    """Return activations with one direction, as long in the base as said, and a dictionary whose first latent has it for the tuned model alone.

    A second latent stands for another direction in both; with `twin` a third one says the first direction in the base.
    """
    layout = crosscoder("base:resid1,tuned:resid1", (12, 12), 3, Rule("relu"))
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in layout.shapes().items()}
    v, w = torch.eye(12, dtype=torch.float64)[:2]
    none = torch.zeros_like(v)
    tensors["decoder.0"] = torch.stack([torch.cat([none, v]), torch.cat([w, w]), torch.cat([v, none]) if twin else torch.cat([none, none])])
    tensors["encoder.0"] = torch.stack(
        [torch.cat([none, v]), torch.cat([none, w]), torch.cat([v, none]) if twin else torch.cat([none, none])]
    )
    strength = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = [strength[:, :1] * base * v + strength[:, 1:] * w, strength[:, :1] * v + strength[:, 1:] * w]
    return Dictionary.plain(layout, tensors), values


@pytest.mark.parametrize(
    ("base", "twin", "judged"), [(0.0, False, "new"), (0.6, False, "shrunk"), (0.6, True, "decoupled"), (0.05, False, "new")]
)
def test_a_direction_that_the_base_has_is_not_called_new_whatever_the_decoders_say(base: float, twin: bool, judged: str) -> None:
    given, values = planted(base, twin=twin)
    table = classified(scaled_latents(given, scaling_sums(given, values)[0]), ExclusiveSettings())
    assert table["by_norm"].tolist()[:2] == ["second only", "shared"]
    assert table["judged"].tolist()[0] == judged
    assert table["judged"][1] == ""
    assert table["nu_error"][0] == pytest.approx(0.0 if twin else base, abs=1e-9)
    assert table["nu_reconstruction"][0] == pytest.approx(base if twin else 0.0, abs=1e-9)


def test_the_classes_follow_the_thresholds_and_few_tokens_are_not_judged() -> None:
    given, values = planted(0.3)
    latents = scaled_latents(given, scaling_sums(given, values)[0])
    assert classified(latents, ExclusiveSettings(nu_error=0.4))["judged"][0] == "new"
    assert classified(latents, ExclusiveSettings(nu_error=0.2))["judged"][0] == "shrunk"
    few = classified(latents, ExclusiveSettings(least_tokens=201))
    assert set(few["by_norm"]) == {"silent"}
    assert set(few["judged"]) == {""}


def test_the_base_against_itself_has_no_latent_of_its_own() -> None:
    given, values = oracle.dictionary(ONE), oracle.inputs(ONE)
    decoder = given.tensors["decoder.0"]
    decoder[:, 12:] = decoder[:, :12]
    table = classified(scaled_latents(given, scaling_sums(given, values)[0]), ExclusiveSettings(least_tokens=1))
    assert set(table["by_norm"]) <= {"shared", "silent"}


def test_latents_are_found_again_by_their_longer_decoder_among_those_judged_alike() -> None:
    one, values = planted(0.0)
    other = replace(one, tensors={**one.tensors, "decoder.0": one.tensors["decoder.0"].roll(1, dims=0)})
    tables = [classified(scaled_latents(each, scaling_sums(each, values)[0]), ExclusiveSettings()) for each in (one, one)]
    tables[1] = tables[1].assign(judged=["", "new", ""])
    found = found_again(one, tables[0], other, tables[1])
    assert found[["latent", "cosine", "match"]].to_dict("list") == {"latent": [0], "cosine": [pytest.approx(1.0)], "match": [1]}
    none = found_again(one, tables[0], other, tables[1].assign(judged=""))
    assert none["match"].tolist() == [-1]
    assert none["cosine"].isna().all()


@pytest.mark.parametrize(
    "layout",
    [
        autoencoder("resid1", 12, 40, RULES[0]),
        crosscoder("base:resid1,tuned:resid2", (12, 12), 40, RULES[0]),
        crosscoder("base:resid1,base:resid2", (12, 12), 40, RULES[0]),
    ],
)
def test_a_dictionary_that_compares_no_two_models_is_refused(layout: Layout) -> None:
    with pytest.raises(ModelError, match="compares no two models: give a crosscoder of the same places"):
        Decoders.of(oracle.dictionary(layout))
