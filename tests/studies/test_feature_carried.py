"""Shares of a gain that sets of latents carry, on losses whose shares, intervals and comparisons can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from mechscope.features.diffing import Carried, LatentSet
from mechscope.studies.feature_carried import _sets, carried_rows, strongest
from tests.studies.jobs.running import findings

GAIN = np.array([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
TUNED = np.array([3.0, 2.0, 4.0, 3.0, 2.0, 3.0, 4.0, 2.5])
# adds up to zero, so that no mean is moved
NOISE = np.array([0.2, -0.1, 0.1, -0.2, -0.3, 0.3, 0.1, -0.1])
INTO, OUT = "put into base", "taken from tuned"
SETS = {
    "new": LatentSet((1, 5, 8)),
    "other latents 0": LatentSet((2, 3, 4)),
    "random vectors 0": LatentSet((1, 5, 8), draw=0),
    "other latents 1": LatentSet((6, 7, 9)),
    "random vectors 1": LatentSet((1, 5, 8), draw=1),
    "all latents": LatentSet(),
    "whole difference": LatentSet(instead="whole"),
}
# what each set carries of the gain, and how much of the noise: (put into base, taken from tuned)
SHARES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "new": ((0.5, 1.0), (0.25, 1.0)),
    "other latents 0": ((0.1, 0.0), (0.1, 0.0)),
    "other latents 1": ((0.3, 0.0), (0.4, 0.0)),
    "random vectors 0": ((-0.02, 0.0), (0.0, 0.0)),
    "random vectors 1": ((0.04, 0.0), (0.0, 0.5)),
    "all latents": ((0.6, 0.0), (0.5, 0.0)),
    "whole difference": ((0.8, 0.0), (0.9, 0.0)),
}
ENERGY = {name: float(at) for name, at in zip(SETS, (4, 1, 5, 3, 3, 8, 9), strict=True)}


def losses(gain: np.ndarray = GAIN, *, texts: int = 8, sets: dict[str, LatentSet] = SETS) -> Carried:
    """Return losses of which every set carries its share: less in the base, more in the tuned model."""
    gain, tuned, noise = gain[:texts], TUNED[:texts], NOISE[:texts]
    base = tuned + gain
    parts = {name: [share * gain + much * noise for share, much in SHARES[name]] for name in sets}
    into, out = ({name: each[side] for name, each in parts.items()} for side in (0, 1))
    return Carried(
        base,
        tuned,
        {name: base - part for name, part in into.items()},
        {name: tuned + part for name, part in out.items()},
        {name: ENERGY[name] for name in sets},
    )


def rows(found: Carried, sets: dict[str, LatentSet] = SETS) -> dict[tuple[str, str], Any]:
    return {(row["set"], row["change"]): row for row in carried_rows(found, sets, "new").to_dict("records")}


def of(row: Any, name: str) -> list[float]:
    return [row[name], row[f"{name}_low"], row[f"{name}_high"]]


def test_a_set_carries_its_part_of_the_gain_in_the_base_and_in_the_tuned_model() -> None:
    table = rows(losses())
    assert list(table) == [
        (group, change) for change in (INTO, OUT) for group in ("new", "other latents", "random vectors", "all latents", "whole difference")
    ]
    new = table["new", INTO]
    assert new["share"] == pytest.approx(0.5)
    assert table["new", OUT]["share"] == pytest.approx(0.25)
    assert (new["latents"], new["draws"], new["n"], new["withheld"]) == (3, 1, 8, "")
    # the base loses 0.5 × 1.5 nats per token of its 4.4375, the tuned model's 2.9375 grow by 0.25 × 1.5
    assert new["loss"] == pytest.approx(4.4375 - 0.75)
    assert table["new", OUT]["loss"] == pytest.approx(2.9375 + 0.375)
    assert {row["gain"] for row in table.values()} == {1.5}
    assert table["all latents", INTO]["latents"] == table["whole difference", INTO]["latents"] == 0
    assert table["whole difference", INTO]["share"] == pytest.approx(0.8)


def test_the_ends_of_an_interval_are_the_shares_that_a_t_test_just_refuses() -> None:
    table = rows(losses())
    for change, share in ((INTO, 0.5), (OUT, 0.25)):
        value, low, high = of(table["new", change], "share")
        assert low < value < high
        for end in (low, high):
            assert ttest_1samp(share * GAIN + NOISE - end * GAIN, 0).pvalue == pytest.approx(0.05, rel=1e-6)


def test_draws_stand_together_from_the_least_to_the_most() -> None:
    table = rows(losses())
    others, vectors = table["other latents", INTO], table["random vectors", INTO]
    assert of(others, "share") == pytest.approx([0.2] * 3)
    assert [others["least"], others["most"], others["draws"], others["energy"]] == pytest.approx([0.1, 0.3, 2, 2.0])
    assert others["loss"] == pytest.approx(4.4375 - 0.2 * 1.5)
    assert [vectors["share"], vectors["least"], vectors["most"], vectors["energy"]] == pytest.approx([0.01, -0.02, 0.04, 4.0])
    # of the mean of both draws, in which half of the second's noise is left
    _, low, high = of(table["random vectors", OUT], "share")
    for end in (low, high):
        assert ttest_1samp(0.25 * NOISE - end * GAIN, 0).pvalue == pytest.approx(0.05, rel=1e-6)
    # a set that is not drawn is its own least and most
    assert [table["new", INTO][name] for name in ("least", "most")] == pytest.approx([0.5, 0.5])


def test_latents_that_carry_more_than_others_are_told_from_those_that_do_not() -> None:
    table = rows(losses())
    # put in: 50 % beside a mean of 20 % for as many others, text by text
    more, low, high = of(table["new", INTO], "more")
    assert more == pytest.approx(0.3)
    assert 0 < low < more < high
    for end in (low, high):
        assert ttest_1samp(0.3 * GAIN + NOISE - end * GAIN, 0).pvalue == pytest.approx(0.05, rel=1e-6)
    # taken out: 25 % beside 25 %
    more, low, high = of(table["new", OUT], "more")
    assert more == pytest.approx(0.0, abs=1e-12)
    assert low < 0 < high
    for name, row in table.items():
        assert name[0] == "new" or all(math.isnan(value) for value in of(row, "more"))


@pytest.mark.parametrize(
    ("gain", "texts", "withheld"),
    [
        (-GAIN, 8, "fine-tuning did not lower the loss on these summaries: −1.5 ("),
        (GAIN * [9, -8, 8, -9, 4, -4, 4, -3], 8, "fine-tuning did not lower the loss on these summaries, as far as 8 texts show: 0.25 ("),
        (GAIN, 5, "too few texts: 5 of at least 6"),
    ],
    ids=["a loss", "no gain that the texts show", "too few texts"],
)
def test_shares_of_a_gain_that_is_not_there_are_withheld(gain: np.ndarray, texts: int, withheld: str) -> None:
    table = rows(losses(gain, texts=texts))
    for row in table.values():
        assert row["withheld"].startswith(withheld)
        assert all(math.isnan(row[name]) for name in ("share", "share_low", "share_high", "least", "most", "more", "more_low", "more_high"))
        # what was measured is said all the same
        assert row["n"] == texts
        assert row["gain"] == pytest.approx(gain[:texts].mean())
        assert math.isfinite(row["loss"])
    said = findings("feature-carried", feature_carried=named(gain, texts))
    assert not [sentence for sentence in said if "loses" in sentence]


def named(gain: np.ndarray = GAIN, texts: int = 8) -> pd.DataFrame:
    return carried_rows(losses(gain, texts=texts), SETS, "new").assign(comparison="crosscoder")


def test_where_there_are_no_others_nothing_is_compared() -> None:
    for sets in ({"new": SETS["new"], "all latents": LatentSet()}, {"other latents 0": SETS["other latents 0"]}):
        for row in rows(losses(sets=sets), sets).values():
            assert all(math.isnan(value) for value in of(row, "more"))
            assert row["withheld"] == ""


def test_the_sentence_says_what_is_lost_without_them_beside_as_many_others() -> None:
    table = named()
    row = rows(losses())["new", OUT]
    ends = [f"{100 * row[name]:.1f}" for name in ("share_low", "share_high")]
    said = findings("feature-carried", feature_carried=table)
    assert said[0].startswith(
        f"Without its 3 new latents the tuned model loses 25\u202f% [{ends[0]}, {ends[1]}] of the gain, beside 25\u202f% ["
    )
    # others write 2 of 4 on average: not less than half as much
    assert "without as many other latents and 0\u202f% [" in said[0]
    weak = table.assign(energy=table["energy"].where(table["set"] != "other latents", 1.9))
    assert "as many other latents (which write less than half as much)" in findings("feature-carried", feature_carried=weak)[0]


def test_the_strongest_latents_are_those_that_write_most() -> None:
    assert strongest(np.array([0.0, 3.0, 1.0, 3.0, 2.0]), 3).tolist() == [1, 3, 4]


def test_beside_the_first_group_stand_draws_of_other_latents_and_of_random_vectors() -> None:
    groups = {"new": np.array([1, 4]), "lost": np.array([], dtype=int), "new by thresholds": np.array([1, 2, 4])}
    energy = np.linspace(1.0, 2.0, 40)
    sets = _sets(groups, energy, draws=3, seed=7)
    drawn = [f"{kind} {draw}" for draw in range(3) for kind in ("other latents", "random vectors")]
    assert list(sets) == ["new", *drawn, "new by thresholds", "all latents"]
    assert sets["new"] == LatentSet((1, 4))
    assert sets["new by thresholds"] == LatentSet((1, 2, 4))
    assert sets["all latents"] == LatentSet()
    others = [sets[f"other latents {draw}"] for draw in range(3)]
    assert all(each.latents is not None and len(each.latents) == 2 and not {1, 4} & set(each.latents) for each in others)
    vectors = [sets[f"random vectors {draw}"] for draw in range(3)]
    assert all(each.latents == (1, 4) for each in vectors)
    # every draw is one of its own, in every run with another seed too
    again = _sets(groups, energy, draws=3, seed=8)
    seeds = [each[f"random vectors {draw}"].draw for each in (sets, again) for draw in range(3)]
    assert len(set(seeds)) == 6
    assert len({each.latents for each in others}) > 1
    assert others != [again[f"other latents {draw}"] for draw in range(3)]
    # where nothing is new there is nothing to draw beside, and where no other latent is active none is drawn
    assert list(_sets({"new": np.array([], dtype=int), "lost": np.array([3])}, energy, draws=2, seed=0)) == ["lost", "all latents"]
    alone = _sets({"new": np.array([0])}, np.array([1.0, 0.0]), draws=1, seed=0)
    assert list(alone) == ["new", "random vectors 0", "all latents"]
