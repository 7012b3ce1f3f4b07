"""Latents are classed by the thresholds alone, value by value at both sides of each, and found again among those that were judged alike."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features import crosscoder
from mechscope.features.dictionary import Dictionary
from mechscope.features.diffing import classified, found_again, nearest_by_chance
from mechscope.features.rules import Rule
from mechscope.settings.diffing import ExclusiveSettings

SETTINGS = ExclusiveSettings(exclusive=0.9, shared=0.6, nu_error=0.2, nu_reconstruction=0.5, least_tokens=10)
NAN = float("nan")


@pytest.mark.parametrize(
    ("relative", "tokens", "expected"),
    [
        (0.91, 10, "second only"),
        (0.91, 9, "silent"),
        (0.09, 10, "first only"),
        (0.11, 10, "between"),
        (0.39, 10, "between"),
        (0.41, 10, "shared"),
        (0.59, 10, "shared"),
        (0.61, 10, "between"),
        (0.89, 10, "between"),
    ],
)
def test_the_relative_norm_says_whose_a_latent_is(relative: float, tokens: int, expected: str) -> None:
    table = pd.DataFrame({"relative_norm": [relative], "tokens": [tokens], "nu_error": [0.0], "nu_reconstruction": [0.0]})
    found = classified(table, SETTINGS).iloc[0]
    assert found["by_norm"] == expected
    # of latents that are not one model's nothing more is said
    assert found["judged"] == {"second only": "new", "first only": "lost"}.get(expected, "")


@pytest.mark.parametrize(
    ("error", "reconstruction", "second", "first"),
    [
        (0.19, 0.49, "new", "lost"),
        (0.2, 0.0, "shrunk", "shrunk"),
        (0.0, 0.5, "decoupled", "decoupled"),
        # the other model has it itself: what else says the same there matters no more
        (0.2, 0.5, "shrunk", "shrunk"),
        (NAN, 0.0, "unclear", "unclear"),
        (0.0, NAN, "unclear", "unclear"),
        (-0.3, -0.6, "new", "lost"),
    ],
)
def test_what_scaling_takes_back_of_one_models_latents(error: float, reconstruction: float, second: str, first: str) -> None:
    table = pd.DataFrame({"relative_norm": [1.0, 0.0, 0.5], "tokens": 10, "nu_error": error, "nu_reconstruction": reconstruction})
    assert classified(table, SETTINGS)["judged"].tolist() == [second, first, ""]


def test_thresholds_by_which_a_latent_would_be_both_are_refused() -> None:
    table = pd.DataFrame({"relative_norm": [0.5], "tokens": 10, "nu_error": 0.0, "nu_reconstruction": 0.0})
    with pytest.raises(SettingsError, match=r"'shared' is 0\.8, above 'exclusive' 0\.7: no latent can be both"):
        classified(table, ExclusiveSettings(shared=0.8, exclusive=0.7))


def of(rows: list[list[float]]) -> Dictionary:
    """Return a crosscoder with these decoders: of the first model, two wide, then of the second."""
    layout = crosscoder("base:resid1,tuned:resid1", (2, 2), len(rows), Rule("relu"))
    tensors: dict[str, Tensor] = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in layout.shapes().items()}
    return Dictionary.plain(layout, {**tensors, "decoder.0": torch.tensor(rows, dtype=torch.float64)})


def judged(*said: str) -> pd.DataFrame:
    return pd.DataFrame({"latent": range(len(said)), "judged": said})


def test_a_latent_is_found_again_at_the_nearest_of_those_that_were_judged_alike() -> None:
    own = of([[9, 0, 0, 0], [0.1, 0, 3, 4], [1, 2, 0, 0.1]])
    # the nearest of all was not judged new; the nearest of the base's decoders is another latent's
    other = of([[0, 0, 3, 4], [5, 0, 1, 0], [0, 0, 0, 7], [0, -3, 1, 0], [0, 0, 0, 1]])
    found = found_again(own, judged("", "new", "lost"), other, judged("", "lost", "new", "lost", "new"))
    assert found["latent"].tolist() == [1]
    # (3, 4) / 5 with (0, 1)
    assert found["cosine"].tolist() == pytest.approx([0.8])
    assert found["match"].tolist() == [2]
    # lost latents by what the first model has of them: (1, 2) beside (5, 0) and (0, −3)
    lost = found_again(own, judged("", "new", "lost"), other, judged("", "lost", "new", "lost", "new"), judged="lost")
    assert lost.drop(columns=["chance", "chance_found"]).to_dict("list") == {
        "latent": [2],
        "cosine": [pytest.approx(5**-0.5)],
        "match": [1],
        "found": [False],
    }


def test_found_again_is_what_reaches_the_cosine_beside_as_many_mixtures_of_all_latents_there() -> None:
    own, other = of([[0, 0, 3, 4], [0, 0, 4, 3]]), of([[0, 0, 0, 7], [0, 0, 1, 0], [0, 0, 0, 1]])
    tables = judged("new", "new"), judged("new", "", "new")
    for recurs, again in ((0.8, [True, False]), (0.59, [True, True]), (0.81, [False, False])):
        assert found_again(own, tables[0], other, tables[1], recurs=recurs)["found"].tolist() == again
    found = found_again(own, *(tables[0], other, tables[1]), recurs=0.8, seed=3)
    expected = nearest_by_chance(torch.tensor([[3.0, 4], [4, 3]]), torch.tensor([[0.0, 7], [1, 0], [0, 1]]), 2, recurs=0.8, seed=3)
    np.testing.assert_array_equal(found[["chance", "chance_found"]].to_numpy().T, expected)


def test_where_nothing_was_judged_alike_nothing_is_found() -> None:
    own = of([[0, 0, 3, 4], [0, 0, 1, 0]])
    found = found_again(own, judged("new", "new"), own, judged("", "lost"))
    assert found["match"].tolist() == [-1, -1]
    assert np.isnan(found[["cosine", "chance"]]).all(axis=None)
    assert found["found"].tolist() == [False, False]
    assert found["chance_found"].tolist() == [0, 0]
    assert found_again(own, judged("", ""), own, judged("new", "new")).empty
