"""Path patching equals brute force: every head and MLP frozen by hand, the receivers' inputs recorded and put in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechscope.causal import patch, path_patch
from mechscope.causal.paths import Receiver
from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import PairBatch, collate_pairs
from mechscope.errors import SettingsError
from mechscope.instrument import Edit, Recording, intervene, observed, record
from mechscope.instrument.walk import model_inputs
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs
from tests.slips import slip

PAIRS = random_pairs(3)
FAMILIES = ("gpt2", "llama", "gpt_neox", "qwen3", "gemma2", "phi")
SITES: tuple[Any, ...] = ("query", "key", "value", "z", "mlp_output", "attention_output", "residual", "logits")
RECEIVERS = (("logits",), ("a2.h1<k>",), ("a2.h1<q>", "a1.h0<v>"), ("m1",), ("m2", "logits"), ("a1.h3<k>", "m2", "logits"))
SENDERS = ("a0.h2", "a1.h1", "m0", "m1", "a2.h0")


@torch.no_grad()
def run(subject: Subject, ids: Tensor, batch: PairBatch, *changes: Any) -> Recording:
    with observed(subject), record(subject, *SITES) as computed, intervene(subject, *changes):  # what is recorded outside is not yet edited
        logits = subject.plain(**model_inputs(ids, batch.real), use_cache=False).logits
    computed.values["logits", 0] = logits
    return computed


def brute_force(subject: Subject, sender: str, receivers: tuple[str, ...], *, through_mlps: bool) -> np.ndarray:
    """Freeze everything but the sender by edits of whole outputs, note the receivers' inputs, and put them in."""
    batch = collate_pairs(PAIRS.pairs)
    base, source = run(subject, batch.clean, batch), run(subject, batch.corrupt, batch)
    layers = range(subject.anatomy.n_layers)
    kind, layer = sender[0], int(sender[1])
    frozen: list[Edit] = []
    for at in layers:
        heads = tuple(head for head in range(4) if sender != f"a{at}.h{head}")
        frozen.append(Edit("z", at, base["z", at], heads=heads))
        if not through_mlps and sender != f"m{at}":
            frozen.append(Edit("mlp_output", at, base["mlp_output", at]))
    if kind == "a":
        head = int(sender[4])
        frozen.append(Edit("z", layer, source["z", layer], heads=(head,)))
    else:
        frozen.append(Edit("mlp_output", layer, source["mlp_output", layer]))
    first = run(subject, batch.clean, batch, *frozen)
    changes: list[Edit] = []
    for text in receivers:
        receiver = Receiver.parse(text, subject.anatomy)
        if receiver.site == "logits":
            continue
        site: Any = receiver.site
        one = None if receiver.head is None else (receiver.head,)
        changes.append(Edit(site, receiver.layer, first[site, receiver.layer], heads=one))
    if "logits" in receivers:
        last = layers[-1]
        # an MLP that receives hands it on itself, in the run below
        ends = [int(text[1]) for text in receivers if text[0] == "m" and text != sender]
        frozen += [Edit("mlp_output", at, base["mlp_output", at]) for at in ends]
        with observed(subject), intervene(subject, *frozen), record(subject, "residual") as after:
            subject.plain(**model_inputs(batch.clean, batch.real), use_cache=False)
        delta = after["residual", last] - base["residual", last]
        changes.append(Edit("residual", last, lambda hidden: hidden + delta))
    with observed(subject), intervene(subject, *changes), torch.no_grad():
        logits = subject.plain(**model_inputs(batch.clean, batch.real), use_cache=False).logits
    return pair_metric("logit-diff", batch)(logits).numpy()


@pytest.mark.parametrize("through_mlps", [False, True], ids=["direct", "through MLPs"])
@pytest.mark.parametrize("receivers", RECEIVERS, ids=",".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_path_patching_equals_brute_force(family: str, receivers: tuple[str, ...], through_mlps: bool) -> None:
    subject = families.subject(family, torch.float64)
    # every path behind a receiver may be recomputed, so an MLP that receives is not frozen for what it writes itself
    for sender in SENDERS:
        found = path_patch(subject, PAIRS, sender, receivers, through_mlps=through_mlps)
        expected = brute_force(subject, sender, receivers, through_mlps=through_mlps)
        np.testing.assert_allclose(found.values[0], expected, rtol=1e-9, atol=1e-10, err_msg=sender)


def linear() -> Subject:
    """Return a GPT-2 without norms and without a non-linear activation."""
    model = families.build("gpt2", torch.float64)
    for block in model.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
    model.transformer.ln_f = nn.Identity()
    return load(model)


def test_a_path_that_belongs_to_two_receivers_counts_once() -> None:
    subject = linear()

    def effect(receivers: list[str], *, through_mlps: bool) -> np.ndarray:
        found = path_patch(subject, PAIRS, "m0", receivers, through_mlps=through_mlps)
        return (found.values - found.unchanged)[0]

    # m0 → … → m2 → logits is a path through MLPs to the logits, and a path to m2: naming m2 as well adds none
    logits = effect(["logits"], through_mlps=True)
    np.testing.assert_allclose(effect(["m2", "logits"], through_mlps=True), logits, rtol=1e-9)
    # only direct ones: m0 → logits and m0 → m2 → logits have none in common
    apart = effect(["logits"], through_mlps=False) + effect(["m2"], through_mlps=False)
    np.testing.assert_allclose(effect(["m2", "logits"], through_mlps=False), apart, rtol=1e-9)
    # and m0 → m1 → logits is what is left to the logits once m2 is a receiver of its own
    assert np.abs(logits - apart).max() > 1e-3


def test_all_direct_paths_of_a_sender_in_a_linear_model_add_up_to_its_whole_effect() -> None:
    subject, total = linear(), np.zeros(3)
    # the MLP of the layer before the last reaches the logits, the last MLP, and the last heads, whose patterns do not change with v
    for receiver in ("logits", "m2", *(f"a2.h{head}<v>" for head in range(4))):
        found = path_patch(subject, PAIRS, "m1", [receiver])
        total += (found.values - found.unchanged)[0]
    batch = collate_pairs(PAIRS.pairs)
    base, source = run(subject, batch.clean, batch), run(subject, batch.corrupt, batch)
    held = Edit("pattern", 2, patterns(subject, batch))
    given = Edit("mlp_output", 1, source["mlp_output", 1])
    before, after = (
        pair_metric("logit-diff", batch)(x["logits", 0]).numpy() for x in (base, run(subject, batch.clean, batch, held, given))
    )
    np.testing.assert_allclose(total, after - before, rtol=1e-9, atol=1e-9)


def patterns(subject: Subject, batch: PairBatch) -> Tensor:
    with torch.no_grad(), record(subject, "pattern") as computed:
        subject.plain(**model_inputs(batch.clean, batch.real), use_cache=False)
    return computed["pattern", 2]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_the_last_layers_direct_path_to_the_logits_is_all_its_effect(family: str) -> None:
    subject = families.subject(family, torch.float64)
    # behind the last MLP there is nothing but the logits
    path = path_patch(subject, PAIRS, "m2", ["logits"])
    whole = patch(subject, PAIRS, site="mlp", direction="noise", components="m2")
    np.testing.assert_allclose(path.values, whole.values, rtol=1e-9)


def test_a_sender_behind_the_receiver_has_no_effect() -> None:
    subject = families.subject("llama", torch.float64)
    found = path_patch(subject, PAIRS, "a1.h0,a2.h1,m1", ["a1.h0<q>", "m0"])
    np.testing.assert_allclose(found.values, np.tile(found.unchanged, (3, 1)), rtol=1e-12)


def test_an_mlp_reads_its_own_layers_heads_only_where_blocks_are_sequential() -> None:
    for family, reads in (("gpt2", True), ("gpt_neox", False), ("phi", False)):
        found = path_patch(families.subject(family, torch.float64), PAIRS, "a0.h0", ["m0"])
        assert (np.abs(found.values - found.unchanged).max() > 1e-6) is np.bool_(reads), family


def test_rows_are_all_heads_and_mlps_or_the_senders_together() -> None:
    subject = families.subject("gpt2", torch.float64)
    every = path_patch(subject, PAIRS, None, ["logits"])
    assert list(every.table["component"][:6]) == ["a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "a1.h0"]
    together = path_patch(subject, PAIRS, "a0.h1,m1", ["logits"], together=True)
    assert list(together.table["component"]) == ["a0.h1,m1"]
    assert together.values.shape == (1, 3)


def test_what_cannot_receive_is_named() -> None:
    subject = families.subject("gpt2")
    for text, message in (
        ("a1.h1", r"receiver 'a1.h1' is not understood: write a5.h1<q>"),
        ("a7.h1<q>", r"component a7.h1 does not exist"),
        ("m9", "component m9 does not exist"),
    ):
        with pytest.raises(SettingsError, match=message):
            path_patch(subject, PAIRS, "a0.h0", [text])
    with pytest.raises(SettingsError, match="direction 'both' is not known: use denoise"):
        path_patch(subject, PAIRS, "a0.h0", ["logits"], direction=slip("both"))
    with pytest.raises(SettingsError, match="no receiver was given"):
        path_patch(subject, PAIRS, "a0.h0", [])
