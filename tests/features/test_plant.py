"""What is planted stands on rare tokens that make up its share, by counts worked out by hand, along directions of each place's own."""

from __future__ import annotations

import pytest
import torch

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.errors import DataError
from mechscope.features.diffing import Plant
from mechscope.features.places import places

# behind their first tokens ten texts have 40 others: of 8 kinds two each, of 8 further ones three each
TWICE, THRICE = tuple(range(20, 28)), tuple(range(40, 48))
_BODY = sorted([*TWICE * 2, *THRICE * 3], key=lambda token: (token * 7) % 31)
TEXTS = Pairs(
    tuple(PromptPair(str(at), ids, ids) for at, ids in enumerate((100 + at, *_BODY[4 * at : 4 * at + 4]) for at in range(10))), "by hand"
)


def chosen(directions: int, share: float, seed: int = 1) -> Plant:
    return Plant.chosen(TEXTS, directions=directions, share=share, strength=0.5, seed=seed)


@pytest.mark.parametrize(
    ("share", "directions", "sizes", "among"),
    [
        # a fifth of 40 tokens are 8: four kinds of two, and a kind of three would be more than a quarter of them
        (0.2, 2, [4, 4], TWICE),
        # three are more than a quarter of 11 tokens, and of 12 they are a quarter
        (0.275, 1, [6], TWICE),
        (0.3, 1, None, TWICE + THRICE),
    ],
)
def test_a_direction_has_rare_kinds_until_they_make_up_its_share(
    share: float, directions: int, sizes: list[int] | None, among: tuple[int, ...]
) -> None:
    plant = chosen(directions, share)
    every = [token for kinds in plant.kinds for token in kinds]
    assert len(every) == len(set(every))
    assert set(every) <= set(among)
    if sizes is not None:
        assert [len(kinds) for kinds in plant.kinds] == sizes
    else:
        assert set(every) & set(THRICE)
    for kinds in plant.kinds:
        counts = [3 if token in THRICE else 2 for token in kinds]
        # the last was needed
        assert sum(counts) >= share * 40 > sum(counts) - max(counts)
        assert list(kinds) == sorted(kinds)
    assert (plant.strength, plant.seed) == (0.5, 1)


def test_the_seed_decides_which_kinds_a_direction_has() -> None:
    assert chosen(2, 0.2) == chosen(2, 0.2)
    assert chosen(2, 0.2).kinds != chosen(2, 0.2, seed=2).kinds


@pytest.mark.parametrize(
    ("directions", "share", "said"),
    [
        (3, 0.2, "by hand has rare tokens for 2 of 3 planted directions: give more texts, plant fewer"),
        # a kind that occurs once would do for any share, and there is none
        (1, 0.05, "rare tokens for 0 of 1 planted directions"),
    ],
)
def test_texts_with_too_few_kinds_are_refused(directions: int, share: float, said: str) -> None:
    with pytest.raises(DataError, match=said):
        chosen(directions, share)


def test_every_place_and_seed_has_directions_of_its_own_whatever_the_model() -> None:
    plant = Plant(((1,), (2,)), 0.5, 3)
    where = places("resid1,resid2,a1,a1.z,m1")
    found = {place.name: plant.directions(place, 6) for place in where}
    for rows in found.values():
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    flat = [*(row for rows in found.values() for row in rows), *Plant(((1,), (2,)), 0.5, 4).directions(where[0], 6)]
    cosines = torch.stack(flat) @ torch.stack(flat).T - torch.eye(len(flat))
    assert cosines.abs().max() < 0.999
    named = places("tuned:resid1")[0]
    assert torch.equal(plant.directions(named, 6), found["resid1"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_direction_is_added_on_its_own_tokens_and_nothing_on_others(dtype: torch.dtype) -> None:
    plant, (place,) = Plant(((7, 9), (11,)), 0.25, 3), places("resid1")
    ids = torch.tensor([7, 8, 11, 9, 0])
    assert plant.of_tokens(ids).tolist() == [0, -1, 1, 0, -1]
    x = torch.arange(20.0).view(5, 4).to(dtype)
    one, two = plant.directions(place, 4)
    expected = x.double() + 0.25 * 8 * torch.stack([one, torch.zeros(4), two, one, torch.zeros(4)])
    found = plant.added(x, ids, place, 8.0)
    # a narrow type would round away what is small beside the activations
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
