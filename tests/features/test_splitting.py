"""A wider dictionary is told to keep, split or add latents as it was made to, beside random directions."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import autoencoder, crosscoder
from mechscope.features.rules import Rule
from mechscope.features.splitting import splitting

D = 64


def of(rows: torch.Tensor) -> Dictionary:
    layout = autoencoder("resid0", D, len(rows), Rule("relu"))
    return Dictionary.plain(layout, {**layout.tensors(), "decoder.0": rows})


def values(table: pd.DataFrame, control: str = "") -> dict[str, float]:
    own = table[table["control"] == control]
    return dict(zip(own["measure"], own["value"], strict=True))


def test_latents_that_are_kept_split_and_new_are_counted() -> None:
    rows = torch.eye(D)[:10] * 3.0
    # the first four are kept, four more are split in two (cosine 0.8), the last two are gone; five are new
    split = torch.cat([0.8 * torch.eye(D)[4:8] + 0.6 * torch.eye(D)[at : at + 4] for at in (20, 30)])
    wide = torch.cat([torch.eye(D)[:4], split, torch.eye(D)[50:55]])
    found = splitting(of(rows), of(wide))
    assert values(found) == pytest.approx(
        {"largest cosine": (4 + 4 * 0.8) / 10, "found again": 0.8, "split into": (4 + 8) / 10, "new in the other": 5 / 17}
    )
    chance = values(found, "random directions")
    assert chance["found again"] == 0
    assert 0.1 < chance["largest cosine"] < 0.4
    own = found[(found["measure"] == "found again") & (found["control"] == "")].iloc[0]
    assert own["n"] == 10
    assert own["low"] < 0.8 < own["high"]


def test_parts_of_a_nested_dictionary_are_compared_and_other_places_refused() -> None:
    rows = torch.cat([torch.eye(D)[:8], torch.eye(D)[:4], torch.eye(D)[40:44]])
    found = values(splitting(of(rows), of(rows), latents=range(8), others=range(8, 16)))
    assert found == pytest.approx({"largest cosine": 0.5, "found again": 0.5, "split into": 0.5, "new in the other": 0.5})
    layout = crosscoder("resid0,resid1", (D, D), 8, Rule("relu"))
    with pytest.raises(SettingsError, match="one dictionary writes resid0, the other resid0, resid1"):
        splitting(of(rows), Dictionary.plain(layout, layout.tensors()))
    few = splitting(of(rows), of(rows), latents=range(3))
    assert few["withheld"].iloc[0] == "too few latents: 3 of at least 6"
