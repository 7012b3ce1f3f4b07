"""Other libraries' names of hooks: what they hold, written out on each family's own modules, is what mechscope reads at the place, or the name is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features.activations import Live
from mechscope.features.formats.hooks import hook_of, place_of
from mechscope.features.places import Place
from mechscope.settings.features import HarvestSettings
from tests import families
from tests.features.test_harvest import texts

# the last block, and in it: the norm before the MLP, attention, its last map, the MLP
MODULES = {
    "gpt2": ("transformer.h.1", "ln_2", "attn", "attn.c_proj", "mlp"),
    "llama": ("model.layers.1", "post_attention_layernorm", "self_attn", "self_attn.o_proj", "mlp"),
    "gemma2": ("model.layers.1", "pre_feedforward_layernorm", "self_attn", "self_attn.o_proj", "mlp"),
}
# names that say the same in every family, and the place
EXACT = {
    "blocks.1.hook_resid_pre": "resid0",
    "blocks.1.hook_resid_post": "resid1",
    "model.layers.1": "resid1",
    "transformer.h.1": "resid1",
    "resid_post_layer_1": "resid1",
    "blocks.1.hook_attn_out": "a1",
    "blocks.1.hook_mlp_out": "m1",
    "blocks.1.mlp.hook_in": "m1.in",
    "blocks.1.attn.hook_z": "a1.z",
}
# names that hold the place in some families only
AMBIGUOUS = {
    "blocks.1.ln2.hook_normalized": "m1.in",
    "blocks.1.mlp.hook_out": "m1",
    "model.layers.1.mlp": "m1",
    "mlp_out_layer_1": "m1",
    "model.layers.1.self_attn": "a1",
    "transformer.h.1.attn": "a1",
    "attn_out_layer_1": "a1",
}


def held(family: str) -> dict[str, Tensor]:
    """Return what TransformerLens's names hold in one text, written out with what the family's own modules read and put out."""
    subject, (pair,) = families.subject(family, torch.float64), texts((14,))
    block, norm, attention, projection, mlp = MODULES[family]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            inside = args[0] if args else kwargs["hidden_states"]
            seen[name] = (inside[0], output[0][0] if isinstance(output, tuple) else output[0])

        return subject.plain.get_submodule(f"{block}.{name}".strip(".")).register_forward_hook(hook, with_kwargs=True)

    hooks = [keep(name) for name in ("", norm, attention, projection, mlp)]
    with torch.no_grad():
        subject.plain(torch.tensor([pair.clean]), use_cache=False)
    for each in hooks:
        each.remove()
    (before, after), (between, _) = seen[""], seen[norm]
    centred = between - between.mean(-1, keepdim=True) if family == "gpt2" else between
    own_mlp, own_attention = seen[mlp][1], seen[attention][1]
    return {
        "blocks.1.hook_resid_pre": before,
        **dict.fromkeys(("blocks.1.hook_resid_post", "model.layers.1", "transformer.h.1", "resid_post_layer_1"), after),
        # "that which is added to the residual stream", behind a norm where there is one
        "blocks.1.hook_attn_out": between - before,
        "blocks.1.hook_mlp_out": after - between,
        "blocks.1.mlp.hook_in": seen[mlp][0],
        "blocks.1.attn.hook_z": seen[projection][0],
        # divided by its size, and not yet multiplied by the weight
        "blocks.1.ln2.hook_normalized": centred / centred.square().mean(-1, keepdim=True).sqrt(),
        **dict.fromkeys(("blocks.1.mlp.hook_out", "model.layers.1.mlp", "mlp_out_layer_1"), own_mlp),
        **dict.fromkeys(("model.layers.1.self_attn", "transformer.h.1.attn", "attn_out_layer_1"), own_attention),
    }


def read(family: str, place: Place) -> Tensor:
    """Return what mechscope reads there in the same text."""
    settings = HarvestSettings(outlier=None, first=0)
    return Live(families.subject(family, torch.float64), texts((14,)), place, settings=settings).rows(0).values[place]


def equal(family: str, name: str, place: Place) -> bool:
    """Return whether a name holds what mechscope reads at a place; Gemma takes its norms in float32, whatever the type."""
    return torch.allclose(held(family)[name], read(family, place), rtol=1e-4, atol=1e-4 if family == "gemma2" else 1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_a_name_that_is_read_holds_what_the_place_does_in_every_family(name: str) -> None:
    place = place_of(name)
    assert place.name == EXACT[name]
    assert all(equal(family, name, place) for family in MODULES)


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_name_that_holds_a_place_in_some_families_only_is_refused(name: str) -> None:
    place = AMBIGUOUS[name]
    assert not all(equal(family, name, Place.parse(place)) for family in MODULES)
    with pytest.raises(SettingsError, match=f"if it is {place} in your model"):
        place_of(name)


@pytest.mark.parametrize("place", ["resid1", "a1", "m1", "m1.in", "a1.z"])
def test_the_name_that_is_written_for_a_place_holds_it_in_every_family(place: str) -> None:
    name = hook_of(Place.parse(place))
    assert all(equal(family, name, Place.parse(place)) for family in MODULES)
    assert place_of(name).name == place


@pytest.mark.parametrize("name", ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_mid", "blocks.2.attn.hook_k", "embed_tokens", ""])
def test_a_name_of_no_place_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="is no place of mechscope"):
        place_of(name)
