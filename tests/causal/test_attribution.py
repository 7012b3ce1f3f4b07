"""Attribution is the derivative of patching: exact on a linear model, equal to finite differences on any."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mechscope.causal import attribution_patch, patch
from mechscope.causal.attribution import _drawn
from mechscope.causal.places import places
from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import PairBatch, Pairs, collate_pairs
from mechscope.data.scoring import Runs, batches, metric_of
from mechscope.errors import SettingsError
from mechscope.instrument import CachedRun, Edit, Gradients, Reading, gradients, intervene, unembed
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs
from tests.slips import slip

PAIRS = random_pairs()
SITES = ("embedding", "residual", "query", "key", "value", "pattern", "z", "attention_output", "neuron", "mlp_output")
FAMILIES = ("gpt2", "llama", "gpt_neox", "qwen3", "gemma2", "opt")


def slopes(subject: Subject, pairs: Pairs, site: str, positions: str, metric: str, step: float) -> np.ndarray:
    """Return d metric / d share of the clean value that is put into the corrupt run, by fourth-order differences: (place, text)."""
    where = places(subject.anatomy, site)[:12]
    found = np.empty((len(where), len(pairs)))
    place = {pair.id: at for at, pair in enumerate(pairs)}
    for batch in batches(pairs, 20):
        clean, corrupt = (CachedRun(subject, ids, batch.real, sites={site}) for ids in (batch.clean, batch.corrupt))
        runs = Runs(corrupt, metric_of(metric, batch, clean))
        units: list[Any] = []
        for one in where:
            old, new = (run.recording[one.site, one.layer] for run in (corrupt, clean))
            units += [(one.edit(old + size * step * (new - old), batch.positions(positions)),) for size in (1, -1, 2, -2)]
        values = runs.of(units)
        near, far = values[::4] - values[1::4], values[2::4] - values[3::4]
        found[:, [place[pair.id] for pair in batch.pairs]] = (8 * near - far) / (12 * step)
    return found


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_the_slope_of_the_patched_metric(family: str, site: str) -> None:
    subject = families.subject(family, torch.float64)
    for positions, metric in (("all", "logit-diff"), ("changed fact", "loss")):
        found = attribution_patch(subject, PAIRS, site=site, positions=positions, metric=metric, execution=Execution(tokens_per_batch=20))
        # RMSNorm rounds to float32 in transformers, whatever the type: there a step must stay large; OPT's ReLU has kinks: there it must be small
        rough = family in ("llama", "qwen3", "gemma2")
        expected = slopes(subject, PAIRS, site, positions, metric, step=4e-3 if rough else 1e-5 if family == "opt" else 1e-3)
        estimate = (found.values - found.unchanged)[: len(expected)]
        scale = np.abs(expected).max()
        assert scale > 1e-3 or site in ("query", "key")
        np.testing.assert_allclose(estimate, expected, rtol=0, atol=scale * (2e-3 if rough else 1e-6))


def linear() -> Subject:
    """Return a GPT-2 without norms and without a non-linear activation."""
    model = families.build("gpt2", torch.float64)
    for block in model.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
    model.transformer.ln_f = nn.Identity()
    return load(model)


@pytest.mark.parametrize("site", ["z", "attention_output", "mlp_output", "neuron", "residual", "embedding"])
def test_on_a_linear_model_attribution_is_patching(site: str) -> None:
    subject = linear()
    for pair in random_pairs(3):
        run = CachedRun(subject, torch.tensor([pair.clean]), sites={"pattern"})
        frozen = [Edit("pattern", layer, run.recording["pattern", layer]) for layer in range(3)]
        alone = Pairs((pair,), "one")
        with intervene(subject, *frozen):
            exact, estimate = patch(subject, alone, site=site), attribution_patch(subject, alone, site=site)
        np.testing.assert_allclose(estimate.values, exact.values, rtol=1e-9, atol=1e-10)
        assert np.abs(exact.values - exact.unchanged).max() > 1e-3


@pytest.mark.parametrize("site", ["query", "key"])
def test_with_the_softmax_recomputed_a_one_layer_linear_readout_is_exact(site: str) -> None:
    model = families.build("gpt2", torch.float64, n_layer=1)
    block = model.transformer.h[0]
    model.transformer.ln_f = nn.Identity()
    with torch.no_grad():  # nothing but attention between q, k and the logits
        block.mlp.c_proj.weight.zero_()
    subject = load(model)
    # one layer: only a last token that differs has another query
    pairs = Pairs(tuple(replace(pair, corrupt=(*pair.corrupt[:-1], 90 - pair.corrupt[-1])) for pair in PAIRS), "other ends")
    exact = patch(subject, pairs, site=site)
    found = attribution_patch(subject, pairs, site=site, softmax=True)
    np.testing.assert_allclose(found.values, exact.values, rtol=1e-9, atol=1e-10)
    plain = attribution_patch(subject, pairs, site=site)
    assert np.abs(plain.values - exact.values).max() > 1e-3, "without it, it is not"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_softmax_is_recomputed_per_query_head_in_grouped_families(family: str) -> None:
    subject = families.subject(family, torch.float64)
    for site in ("query", "key"):
        exact = patch(subject, PAIRS, site=site, components="layers:2")
        better = attribution_patch(subject, PAIRS, site=site, softmax=True, components="layers:2")
        plain = attribution_patch(subject, PAIRS, site=site, components="layers:2")
        errors = [np.abs(found.values - exact.values).mean() for found in (better, plain)]
        assert errors[0] < errors[1]


def test_grad_drop_averages_the_absolute_estimates_of_models_without_one_layers_gradient() -> None:
    subject, pairs = linear(), random_pairs(2, lengths=(8,))
    batch = collate_pairs(pairs.pairs)
    run = CachedRun(subject, batch.corrupt, sites={"pattern"})
    frozen = [Edit("pattern", layer, run.recording["pattern", layer]) for layer in range(3)]
    with intervene(subject, *frozen):
        clean, corrupt = (CachedRun(subject, ids, sites={"z", "attention_output", "mlp_output"}) for ids in (batch.clean, batch.corrupt))
        runs = Runs(corrupt, metric_of("logit-diff", batch, clean))
        found = attribution_patch(subject, pairs, site="head", grad_drop=True, components="a0.h1")
        total = np.zeros(2)
        for dropped in (1, 2):
            held = [Edit(site, dropped, corrupt.recording[site, dropped]) for site in ("attention_output", "mlp_output")]
            unit = [Edit("z", 0, clean.recording["z", 0], heads=(1,)), *held]
            total += np.abs((runs.of([unit]) - runs.unchanged())[0])
    np.testing.assert_allclose((found.values - found.unchanged)[0], total / 2, rtol=1e-9)


@pytest.mark.parametrize("site", ["embedding", "residual"])
def test_grad_drop_of_the_residual_stream_averages_over_all_layers_because_it_lies_in_none(site: str) -> None:
    subject, pairs = families.subject("gpt2", torch.float64), random_pairs(2, lengths=(8,))
    found = attribution_patch(subject, pairs, site=site, grad_drop=True)
    batch = collate_pairs(pairs.pairs)
    clean, corrupt = (CachedRun(subject, ids, sites={site, "attention_output", "mlp_output"}) for ids in (batch.clean, batch.corrupt))
    runs = Runs(corrupt, metric_of("logit-diff", batch, clean))
    step = 1e-4
    for row, place in enumerate(places(subject.anatomy, site)):
        old, new = (run.recording[site, place.layer] for run in (corrupt, clean))
        total = np.zeros(2)
        for dropped in range(3):
            held = [Edit(out, dropped, corrupt.recording[out, dropped]) for out in ("attention_output", "mlp_output")]
            above, below = (runs.of([[place.edit(old + size * (new - old)), *held]])[0] for size in (step, -step))
            total += np.abs(above - below) / (2 * step)
        np.testing.assert_allclose((found.values - found.unchanged)[row], total / 3, rtol=1e-5, err_msg=str(place))


def test_where_nothing_lies_behind_grad_drop_is_the_absolute_estimate() -> None:
    # the last residual stream has one way to the logits: nothing can cancel
    subject = families.subject("llama", torch.float64)
    plain, dropped = (attribution_patch(subject, PAIRS, site="residual", components="layers:2", grad_drop=drop) for drop in (False, True))
    np.testing.assert_allclose(dropped.values - dropped.unchanged, np.abs(plain.values - plain.unchanged), rtol=1e-9)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_equal_wherever_the_padding_is(family: str, padding: Any) -> None:
    subject = families.subject(family, torch.float64)
    batch = collate_pairs(PAIRS.pairs, padding=padding)
    for site in SITES:
        together = slopes_by_autograd(subject, batch, site)
        for row, pair in enumerate(PAIRS):
            alone = slopes_by_autograd(subject, collate_pairs([pair]), site)
            first = batch.shift(row)
            tokens = slice(first, first + len(pair.clean))
            assert together.score[row].item() == pytest.approx(alone.score.item(), rel=1e-9)
            for layer, expected in alone.gradients[0].items():
                found = together.gradients[0][layer][row]
                found = found[:, tokens, tokens] if site == "pattern" else found[tokens]
                if site == "pattern":  # keys that a query cannot see have a gradient, but never a difference to multiply
                    seen = torch.ones_like(expected[0]).tril().bool()
                    found, expected = found[seen], expected[0][seen]
                else:
                    expected = expected[0]
                # RMSNorm rounds to float32 in transformers, whatever the type
                torch.testing.assert_close(found, expected, rtol=1e-9 if family in ("gpt2", "gpt_neox", "opt") else 1e-4, atol=1e-8)


def slopes_by_autograd(subject: Subject, batch: PairBatch, site: Any) -> Gradients:
    metric = pair_metric("logit-diff", batch)
    return gradients(
        subject,
        batch.corrupt,
        batch.real,
        site,
        Reading.of(metric.where),
        lambda rows: metric.mean(metric.score(unembed(subject, rows), slice(None))),
    )


def test_checked_places_hold_the_exact_effect_and_say_how_good_the_estimate_is() -> None:
    subject = families.subject("gpt_neox", torch.float64)
    found, exact = attribution_patch(subject, PAIRS, check=7, execution=Execution(seed=3)), patch(subject, PAIRS)
    measured = found.table["exact"].notna()
    assert list(np.flatnonzero(measured)) == _drawn(12, 7, 3)
    np.testing.assert_allclose(found.table["exact"][measured], exact.table["effect"][measured], rtol=1e-9)
    error = (found.table["effect"] - exact.table["effect"])[measured].abs().mean()
    assert found.notes["mean_absolute_error"] == pytest.approx(error)
    correlation = np.corrcoef(found.table["effect"][measured], exact.table["effect"][measured])[0, 1]
    assert found.notes["correlation"] == pytest.approx(correlation)


def test_texts_without_a_position_do_not_count_in_the_exact_effect_either() -> None:
    subject = families.subject("gpt2", torch.float64)
    found, exact = (sweep(subject, PAIRS, positions="each", components="a1.h2") for sweep in (partial(attribution_patch, check=12), patch))
    assert set(found.table["n"]) == {1, 3, 4}, "texts of 7, 9, 9 and 12 tokens"
    np.testing.assert_allclose(found.table["exact"], exact.table["effect"], rtol=1e-9)


def test_a_sweep_over_all_heads_runs_each_block_twice_forward() -> None:
    subject = load(families.build("gpt2"))
    ran: list[int] = []
    for layer, block in enumerate(subject.anatomy.blocks):
        block.mlp_down.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    attribution_patch(subject, PAIRS, execution=Execution(tokens_per_batch=1000))
    assert sorted(ran) == [0, 0, 1, 1, 2, 2], "the clean and the corrupt run, once each"


def test_logits_of_many_rows_are_not_held_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, held = families.subject("gpt2", torch.float64), [0, 0]

    def attributed(at: int) -> np.ndarray:
        def kept(saved: torch.Tensor) -> torch.Tensor:
            # the unembedding's own weight is no logits
            if saved.ndim > 1 and saved.shape[-1] == families.VOCABULARY and saved.shape[-2] != families.WIDTH:
                held[at] = max(held[at], saved.shape[-2])
            return saved

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda saved: saved):
            return attribution_patch(subject, PAIRS, metric="loss").values

    whole = attributed(0)
    monkeypatch.setattr("mechscope.data.scoring._ROWS", 5)  # of the twelve rows
    np.testing.assert_allclose(attributed(1), whole, rtol=1e-9)
    assert held == [12, 0]


def test_the_model_keeps_no_gradients_and_no_hooks() -> None:
    subject = families.subject("gpt2", torch.float64)

    def hooks() -> list[int]:
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in subject.plain.modules()]

    before = hooks()  # transformers leaves its own on a model that ever was asked for maps or hidden states
    attribution_patch(subject, PAIRS, site="neuron", grad_drop=True)
    assert all(parameter.grad is None for parameter in subject.plain.parameters())
    assert hooks() == before


def test_options_that_make_no_sense_are_refused() -> None:
    subject = families.subject("gpt2", torch.float64)
    with pytest.raises(SettingsError, match="softmax is computed again for sites query and key, not for 'z'"):
        attribution_patch(subject, PAIRS, softmax=True)
    with pytest.raises(SettingsError, match="metric 'kl' has no gradient in the clean run"):
        attribution_patch(subject, PAIRS, metric="kl", direction="noise")
    with pytest.raises(SettingsError, match="grad_drop leaves out one layer at a time, and this model has only one"):
        attribution_patch(load(families.build("gpt2", n_layer=1)), PAIRS, grad_drop=True)
    with pytest.raises(SettingsError, match="direction 'both' is not known"):
        attribution_patch(subject, PAIRS, direction=slip("both"))
