"""Other libraries' names of hooks and mechscope's places say the same."""

from __future__ import annotations

import pytest

from mechscope.errors import SettingsError
from mechscope.features.formats.hooks import hook_of, place_of
from mechscope.features.places import Place


def test_hooks_and_places_say_the_same() -> None:
    for place in ("resid3", "a3", "m3", "m3.in", "a3.z"):
        assert place_of(hook_of(Place.parse(place))).name == place
    for name, place in {
        "blocks.4.hook_resid_pre": "resid3",
        "layers.5": "resid5",
        "model.layers.5.mlp": "m5",
        "transformer.h.2": "resid2",
        "mlp_out_layer_7": "m7",
    }.items():
        assert place_of(name).name == place
    for name in ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_mid", "blocks.2.attn.hook_k", "embed_tokens", ""):
        with pytest.raises(SettingsError, match="is no place of mechscope"):
            place_of(name)
