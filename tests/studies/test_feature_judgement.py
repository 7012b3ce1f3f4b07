"""What is said of judged latents follows from their tables by hand: which are beyond control, listed first, kept, and planted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.features import crosscoder
from mechscope.features.dictionary import Dictionary
from mechscope.features.diffing import Comparison, Judged, Plant, ScalingSums
from mechscope.features.places import places
from mechscope.features.rules import Rule
from mechscope.settings.diffing import ExclusiveSettings
from mechscope.studies import feature_judgement as judgement
from tests import families


def test_beyond_control_is_what_is_new_and_found_again() -> None:
    own = pd.DataFrame({"latent": [0, 1, 2, 3], "judged": ["new", "new", "lost", ""]})
    half = pd.DataFrame({"latent": [0, 1, 2], "cosine": [0.7, 0.69, 0.9]})
    found = judgement.beyond_control(own, half, 0.7)
    assert found["beyond"].tolist() == [True, False, False, False]
    assert found["again"].tolist()[:2] == [0.7, 0.69]
    assert np.isnan(found["again"][3])
    without = judgement.beyond_control(own, None, 0.7)
    assert without[["beyond", "again"]].isna().all(axis=None)


def test_candidates_begin_with_what_says_most() -> None:
    rows = [
        # component, by_norm, judged, beyond, relative_norm, energy
        ("both, far", "between", "", False, 0.30, 9.0),
        ("both, near", "between", "", False, 0.70, 1.0),
        ("both, nearer", "between", "", False, 0.80, 0.5),
        ("unclear", "second only", "unclear", False, 0.95, 8.0),
        ("shrunk", "second only", "shrunk", False, 0.95, 2.0),
        ("decoupled", "second only", "decoupled", False, 0.95, 4.0),
        ("new", "second only", "new", False, 0.95, 5.0),
        ("beyond, weak", "second only", "new", True, 0.99, 0.25),
        ("beyond, strong", "second only", "new", True, 0.95, 0.5),
        ("shared", "shared", "", False, 0.55, 9.75),
        ("lost", "first only", "lost", False, 0.01, 10.0),
    ]
    own = pd.DataFrame(rows, columns=["component", "by_norm", "judged", "beyond", "relative_norm", "energy"])
    own["beyond"] = own["beyond"].astype("boolean")
    order = ["beyond, strong", "beyond, weak", "new", "decoupled", "shrunk", "unclear", "both, nearer", "both, near"]
    found = judgement.candidates(own, 20)
    assert found["component"].tolist() == order
    # of all 50
    assert found["share"].tolist() == pytest.approx([0.01, 0.005, 0.1, 0.08, 0.04, 0.16, 0.01, 0.02])
    assert judgement.candidates(own, 3)["component"].tolist() == order[:3]
    # without the other half nothing is beyond it
    alone = judgement.candidates(own.assign(beyond=None), 3)
    assert alone["component"].tolist() == ["new", "beyond, strong", "beyond, weak"]


def judged(missed: list[list[float]], active: list[float], tokens: list[float]) -> Judged:
    none = torch.zeros(0, 3, dtype=torch.float64)
    squares = np.full((len(missed), len(tokens)), 10.0)
    sums = ScalingSums(int(sum(tokens)), torch.zeros(3), torch.zeros(3), none, none)
    return Judged(sums, np.array(missed), squares, np.array(active), np.array(tokens))


def test_a_row_of_comparisons_counts_latents_and_gives_both_models_what_is_kept() -> None:
    latents = pd.DataFrame(
        {
            "by_norm": ["second only", "second only", "first only", "shared", "silent"],
            "judged": ["new", "shrunk", "lost", "", ""],
            "beyond": [True, False, False, False, False],
        }
    )
    # of the eight texts one has no token
    missed = [[1.0, 2, 1, 2, 1, 2, 1, 2], [5.0, 4, 5, 4, 5, 4, 5, 4]]
    seen = judged(missed, [6, 2, 4, 4, 2, 6, 8, 0], [1, 1, 2, 2, 1, 1, 8, 0])
    trained: Any = SimpleNamespace()
    row = judgement._comparison_row(Comparison("half", ("halfbase", "halftuned"), "half"), seen, latents, trained)
    assert (row["first"], row["second"], row["control"], row["n"], row["tokens"]) == ("halfbase", "halftuned", "half", 7, 16)
    # 32 active latents in 16 tokens, however they are spread over texts
    assert row["l0"] == 2
    assert (row["kept_first"], row["kept_second"]) == (pytest.approx(0.85), pytest.approx(0.55))
    for side in ("first", "second"):
        assert row[f"kept_{side}_low"] < row[f"kept_{side}"] < row[f"kept_{side}_high"]
    counts = {"second_only": 2, "first_only": 1, "shared": 1, "silent": 1, "between": 0, "new": 1, "shrunk": 1, "lost": 1, "beyond": 1}
    assert {name: row[name] for name in counts} == counts
    # a dictionary of one view has no first model and no classes
    trained = SimpleNamespace(recipe=SimpleNamespace(moved=lambda maps: 0.25), dictionaries={"difference": SimpleNamespace(output_maps=())})
    row = judgement._comparison_row(Comparison("difference", ("difference",)), judged([[1.0] * 8], [1] * 8, [1] * 8), None, trained)
    assert (row["first"], row["second"], row["moved"]) == ("", "difference", 0.25)
    assert "kept_first" not in row
    assert row["kept_second"] == pytest.approx(0.9)
    assert all(np.isnan(row[name]) for name in ("new", "shared", "beyond"))


def test_planted_directions_are_sought_among_the_second_models_decoders() -> None:
    place = places("resid1")[0]
    plant = Plant(((3, 5), (7,)), 0.5, 1)
    one, two = plant.directions(place, 6).float()
    nothing = torch.zeros(6)
    # a latent that writes the first direction into both, one that writes the second into the first model alone, and the second direction's negative
    rows = [torch.cat(pair) for pair in ((one, 3 * one), (two, nothing + 0.001 * one), (nothing, -two), (nothing, one + 2 * two))]
    layout = crosscoder("base:resid1,planted:resid1", (6, 6), 4, Rule("relu"))
    tensors = {name: torch.zeros(shape) for name, shape in layout.shapes().items()} | {"decoder.0": torch.stack(rows)}
    dictionary = Dictionary.plain(layout, tensors)
    latents = pd.DataFrame(
        {"nu_error": [0.1, 0.2, 0.3, 0.4], "nu_reconstruction": 0.0, "by_norm": "second only", "judged": ["shrunk", "new", "new", "new"]}
    )
    recipe = SimpleNamespace(plant=plant, places=(place,))
    trained: Any = SimpleNamespace(recipe=recipe, dictionaries={"planted": dictionary})
    pair = SimpleNamespace(tokenizer=families.tokenizer())
    run = SimpleNamespace(settings=SimpleNamespace(seed=0))
    request: Any = SimpleNamespace(pair=pair, run=run, settings=SimpleNamespace(exclusive=ExclusiveSettings(recurs=0.7)))
    ids = [(3, 3, 5, 8, 9), (7, 7, 8, 8, 8)]
    texts = Pairs(tuple(PromptPair(str(at), row, row) for at, row in enumerate(ids)), "by hand")
    found = judgement._planted(request, trained, texts, latents)
    assert found["direction"].tolist() == [1, 2]
    # first tokens are left aside
    assert found["share"].tolist() == [2 / 8, 1 / 8]
    assert found["kinds"].tolist() == [2, 1]
    nearest = int(torch.stack([row[6:] / row[6:].norm() for row in rows]).double().mv(two.double()).argmax())
    assert nearest == 3
    assert [name.rpartition(".f")[2] for name in found["component"]] == ["0", "3"]
    assert found["cosine"].tolist() == pytest.approx([1.0, float((one @ two + 2) / (one + 2 * two).norm())], abs=1e-6)
    # near enough, but shrunk; and near enough and new
    assert found["found"].tolist() == [False, found["cosine"][1] >= 0.7]
    assert found["nu_error"].tolist() == [0.1, 0.4]
    assert (found["chance"].abs() <= 1).all()


@pytest.mark.parametrize(
    ("control", "sought"),
    [("half", True), ("seed", True), ("shuffled", True), ("other", True), ("same", False), ("planted", False), ("shuffled pairs", False)],
)
def test_new_latents_are_sought_in_other_trainings_alone(control: str, sought: bool) -> None:
    assert (control in judgement._SOUGHT_IN) == sought
