"""An edit is undone to the last bit, stacks in its order, survives a file and a saved model, and fits no other model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mechscope.edit import Delta, LowRank, applied, down_map, save_edited
from mechscope.errors import ModelError, RunError
from mechscope.store.tables import write_tensors
from mechscope.subject.load import Subject, load
from tests import families

IDS = families.documents()[0][None]


def change(subject: Subject, layer: int = 1, seed: int = 0) -> Delta:
    """Return an edit of rank one with random directions."""
    here = down_map(subject, layer)
    # as the weight is stored: GPT-2 keeps (input, output)
    stored = here.stored(here.weight).shape
    left, right = (torch.randn(size, 1, generator=torch.Generator().manual_seed(seed + at)) for at, size in enumerate(stored))
    return Delta.of(subject, {here.parameter: LowRank(left, right)}, {"layer": layer})


def dense(change: torch.Tensor | LowRank) -> torch.Tensor:
    """Return a change as one matrix."""
    return change.left.double() @ change.right.double().T if isinstance(change, LowRank) else change


@torch.no_grad()
def logits(subject: Subject) -> torch.Tensor:
    """Return what the plain Hugging Face model says."""
    return subject.plain(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_an_edited_model_is_one_with_weights_replaced_by_hand_and_comes_back_to_the_bit(family: str, dtype: torch.dtype) -> None:
    subject = load(families.build(family, dtype))
    before, state = logits(subject), {name: value.clone() for name, value in subject.plain.state_dict().items()}
    delta = change(subject)
    (name,) = delta.changes
    seen: list[Any] = []

    def look_and_fail() -> None:
        with applied(subject, delta) as edited:
            seen.extend((logits(edited), edited.fingerprint))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look_and_fail()
    inside, fingerprint = seen
    for key, value in subject.plain.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(logits(subject), before)
    by_hand = families.build(family, dtype)
    weight = by_hand.get_parameter(name)
    weight.data = (weight.double() + dense(delta.changes[name])).to(dtype)
    assert torch.equal(inside, by_hand(IDS).logits)
    assert not torch.equal(inside, before)
    assert fingerprint == load(by_hand).fingerprint != subject.fingerprint


def test_edits_stack_in_the_order_in_which_they_were_made(tmp_path: Path) -> None:
    subject = load(families.build("llama"))
    first = change(subject)
    with applied(subject, first) as edited:
        second, elsewhere = change(edited, seed=5), change(edited, layer=2)
    with applied(subject, first, second, elsewhere) as edited:
        both = logits(edited)
    with applied(subject, first), applied(subject, second), applied(subject, elsewhere):
        assert torch.equal(logits(subject), both)
    # another layer's edit hangs on that layer's weights alone
    with applied(subject, elsewhere, first, second):
        assert torch.equal(logits(subject), both)
    message = r"the edit fits a model whose .* has the hash .*: apply it to the model it was made from, edits before it first"
    with pytest.raises(ModelError, match=message), applied(subject, second):
        pass
    with pytest.raises(ModelError, match="it is applied already"), applied(subject, first, first):
        pass
    assert torch.equal(logits(subject), logits(load(families.build("llama")))), "a refusal halfway leaves nothing behind"
    save_edited(subject, tmp_path / "model", first, second, elsewhere)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(IDS).logits, both, rtol=0, atol=0)


def test_it_survives_a_file(tmp_path: Path) -> None:
    subject = load(families.build("gpt2"))
    delta = change(subject)
    delta.save(tmp_path / "edit.safetensors")
    again = Delta.load(tmp_path / "edit.safetensors")
    assert (again.fits, again.gives, again.about) == (delta.fits, delta.gives, {"layer": 1})
    with applied(subject, delta):
        expected = logits(subject)
    with applied(subject, again):
        assert torch.equal(logits(subject), expected)
    assert (tmp_path / "edit.safetensors").stat().st_size < 4 * (32 + 128) + 1500, "rank one is two vectors"


def test_another_model_and_what_is_no_edit_are_refused(tmp_path: Path) -> None:
    delta = change(load(families.build("gpt2")))
    for other in (families.build("gpt2", seed=1), families.build("gpt2", torch.bfloat16), families.build("llama")):
        subject = load(other)
        with (
            pytest.raises(ModelError, match=r"the edit fits a model whose transformer\.h\.1\.mlp\.c_proj\.weight"),
            applied(subject, delta),
        ):
            pass
    write_tensors({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RunError, match="is not an edit"):
        Delta.load(tmp_path / "other.safetensors")
    meta = {"kind": "mechscope edit", "fits": {"w": "a"}, "gives": {"w": "b"}}
    write_tensors({"x": torch.zeros(1)}, tmp_path / "damaged.safetensors", meta=meta)
    with pytest.raises(RunError, match="damaged edit"):
        Delta.load(tmp_path / "damaged.safetensors")


def test_changes_that_do_not_fit_are_refused() -> None:
    subject = families.subject("gpt2")
    name = down_map(subject, 0).parameter
    with pytest.raises(ModelError, match="has no parameter 'nothing'"):
        Delta.of(subject, {"nothing": torch.zeros(2, 2)})
    with pytest.raises(ModelError, match=r"a change of shape \(32, 128\) does not fit .*, which is \(128, 32\)"):
        Delta.of(subject, {name: torch.zeros(32, 128)})
    with pytest.raises(ModelError, match="is not finite"):
        Delta.of(subject, {name: torch.full((128, 32), torch.nan)})
