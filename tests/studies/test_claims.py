"""The claims about attention, on tables made to say one thing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.difference.selection import selection_table
from mechscope.errors import SettingsError
from mechscope.studies.paper_2505_17073.attention import PAPER_KL
from mechscope.studies.paper_2505_17073.claims import CLAIMS, NEEDED, claims_table

COLUMNS = ["claim", "statement", "paper", "measured", "value", "low", "high", "verdict", "note", "unit", "overturn"]
OF_ATTENTION = ["most_changed_layers", "heads_focused_all", "heads_focused_selected", "change_concentrated"]


def difference(
    kl: tuple[float, ...] = PAPER_KL, *, n_heads: int = 12, focused: float = 0.8, significant: bool = True, error: float = 1e-4
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return heads and layers tables of a model with given KL per layer and share of heads with decreased entropy."""
    n_layers = len(kl)
    heads = pd.DataFrame([("all", i, j) for i in range(n_layers) for j in range(n_heads)], columns=["rows", "layer", "head"])
    heads["kl_base_tuned"] = [kl[layer] for layer in heads["layer"]]
    heads["kl_base_tuned_se"] = error
    # spread evenly through the layers, so that any choice of layers has the same share
    falls = (np.arange(len(heads)) * focused) % 1 + focused >= 1 - 1e-9
    heads["entropy_change"] = np.where(falls, -0.05, 0.05)
    heads["entropy_change_p"] = 1e-6 if significant else 0.6
    heads["entropy_change_q"] = 1e-5 if significant else 0.6
    heads["n"] = 40
    heads["z_cosine_distance"] = heads["weight_change"] = 0.1
    layers = heads.groupby(["rows", "layer"], as_index=False)[["kl_base_tuned", "entropy_change", "weight_change"]].mean()
    layers["cosine_distance"] = 0.1
    return heads, layers


Trained = tuple[pd.DataFrame, pd.DataFrame]


def trainings(**groups: list[Trained]) -> dict[str, pd.DataFrame]:
    """Return the tables of controls, from the heads and layers of trainings by kind; the first of `tuned` is the tuned model."""
    models = [
        (f"{kind} {i}" if i or kind != "tuned" else "tuned", kind, made) for kind, group in groups.items() for i, made in enumerate(group)
    ]
    models = [(name, "seed" if kind == "tuned" and name != "tuned" else kind, made) for name, kind, made in models]
    return {
        "controls": pd.DataFrame([{"control": name, "kind": kind, "n": 20} for name, kind, _ in models]),
        "control_heads": pd.concat([made[0].assign(control=name, kind=kind) for name, kind, made in models]),
        "control_layers": pd.concat([made[1].assign(control=name, kind=kind) for name, kind, made in models]),
    }


def shares(*focused: float, **options: Any) -> list[Trained]:
    """Return trainings of these shares of heads that became more focused."""
    return [difference(focused=share, **options) for share in focused]


def judged(heads: pd.DataFrame, layers: pd.DataFrame, *, noise: float = 0.0, controls: dict[str, pd.DataFrame] | None = None) -> Any:
    """Return the claims, by name, with a selection resampled with the given noise per layer."""
    shape = (len(layers), len(heads) // len(layers))
    mean = heads["kl_base_tuned"].to_numpy().reshape(1, *shape)
    resampled = {"kl_base_tuned": mean + noise * np.random.default_rng(0).normal(size=(400, shape[0], 1))}
    selection = selection_table(heads, layers, resampled, rules=["layers_by_kl", "heads_by_kl"])
    return claims_table({"heads": heads, "layers": layers, "selection": selection, **(controls or {})}).set_index("claim")


REPLICATION = (0.061, 0.101, 0.246, 0.274, 0.272, 0.372, 0.320, 0.341, 0.290, 0.299, 0.282, 0.284)


@pytest.mark.parametrize("kl", [PAPER_KL, REPLICATION, (0.01,) * 12])
@pytest.mark.parametrize("focused", [0.0, 0.5, 1.0])
def test_two_models_alone_decide_nothing_about_fine_tuning(kl: tuple[float, ...], focused: float) -> None:
    claims = judged(*difference(kl, focused=focused))
    for name in OF_ATTENTION:
        assert claims.loc[name, "verdict"] == "undecided"
        assert claims.loc[name, "unit"] == "document"
        assert claims.loc[name, "note"].startswith("Undecided: no control.")
        assert claims.loc[name, "measured"].startswith("Of these two models, ")
        assert "at least 3 more on shuffled summaries (mechscope tune --control shuffled)" in claims.loc[name, "overturn"]


def test_what_two_models_show_is_said_of_these_two() -> None:
    claims = judged(*difference(focused=0.62, error=1e-4))
    assert claims.loc["most_changed_layers", "value"] == 1.0
    assert "layers 2, 3, 5 of 12" in claims["measured"]["most_changed_layers"]
    # (.0236 + .0179 + .0136) / .1174
    assert claims.loc["change_concentrated", "value"] == pytest.approx(0.4693, abs=1e-4)
    assert claims.loc["heads_focused_all", "value"] == pytest.approx(0.62, abs=0.01)
    assert "layers 5, 6, 7" in judged(*difference(REPLICATION))["measured"]["most_changed_layers"]


def test_heads_count_where_their_sign_is_sure_by_holms_correction() -> None:
    heads, layers = difference(focused=0.75)
    # by hand: of 144 heads the smallest one-sided p may be .025/144 = 1.736e-4, the next .025/143 = 1.748e-4, …
    heads["entropy_change_p"] = 0.9
    falls, rises = heads.index[heads["entropy_change"] < 0], heads.index[heads["entropy_change"] > 0]
    heads.loc[falls[:3], "entropy_change_p"] = [2 * 1.73e-4, 2 * 1.74e-4, 2 * 1.8e-4]
    heads.loc[rises[0], "entropy_change_p"] = 2 * 1.73e-4
    row = judged(heads, layers).loc["heads_focused_all"]
    assert (row["low"], row["high"]) == pytest.approx((2 / 144, 143 / 144))
    assert "surely at least 2 and at most 143 (40 documents)" in row["measured"]


@pytest.mark.parametrize(
    ("tuned", "shuffled", "verdict"),
    [
        ((0.8, 0.78, 0.83), (0.5, 0.47, 0.52), "supported"),
        ((0.3, 0.28, 0.33), (0.5, 0.47, 0.52), "contradicted"),
        # more than controls, but no majority: not what the paper says
        ((0.45, 0.43, 0.46), (0.2, 0.22, 0.18), "undecided"),
        ((0.8, 0.5, 0.6), (0.5, 0.7, 0.6), "undecided"),
        # one training is one observation, however many controls there are
        ((1.0,), (0.5, 0.47, 0.52, 0.5, 0.49, 0.51, 0.5, 0.5), "undecided"),
        ((1.0, 1.0), (0.5, 0.47, 0.52, 0.5, 0.49, 0.51, 0.5, 0.5), "undecided"),
        ((1.0, 1.0, 1.0), (0.5, 0.47), "undecided"),
    ],
)
def test_trainings_decide_whether_fine_tuning_focuses_heads(tuned: tuple[float, ...], shuffled: tuple[float, ...], verdict: str) -> None:
    ours = shares(*tuned)
    row = judged(*ours[0], controls=trainings(tuned=ours, shuffled=shares(*shuffled))).loc["heads_focused_all"]
    assert row["verdict"] == verdict
    if len(tuned) >= 3 <= len(shuffled):
        assert row["unit"] == "training"
        assert row["value"] == pytest.approx(np.mean(tuned) - np.mean(shuffled), abs=0.03)
    else:
        assert row["note"].startswith("Undecided: too few trainings.")
        assert row["overturn"].startswith("More trainings: at least")


def test_an_undecided_claim_says_how_many_trainings_would_decide() -> None:
    tuned, controls = (0.62, 0.75, 0.7), (0.5, 0.62, 0.55)
    ours = shares(*tuned)
    row = judged(*ours[0], controls=trainings(tuned=ours, shuffled=shares(*controls))).loc["heads_focused_all"]
    assert row["verdict"] == "undecided"
    assert re.match(r"About [4-9] trainings of each kind", row["overturn"])


def test_seeds_are_no_controls_and_noise_is_no_training() -> None:
    ours = shares(0.8, 0.8, 0.8)
    row = judged(*ours[0], controls=trainings(tuned=ours, noise=shares(*[0.5] * 8))).loc["heads_focused_all"]
    assert row["verdict"] == "undecided"
    assert "no control" in row["note"]
    assert "Other seeds: 80\u202f%, 80\u202f%." in row["note"]


def test_every_training_is_counted_in_the_layers_that_itself_changed_most() -> None:
    # of the tuned ones heads focus in layers 2, 3, 5, where they changed most; of controls in layers 8, 9, 10, where those did
    def training(top: tuple[int, ...]) -> Trained:
        heads, layers = difference(tuple(0.02 if layer in top else 0.001 for layer in range(12)), focused=0.0)
        heads.loc[heads["layer"].isin(top), "entropy_change"] = -0.05
        return heads, layers

    ours = [training((2, 3, 5)) for _ in range(3)]
    claims = judged(*ours[0], controls=trainings(tuned=ours, shuffled=[training((8, 9, 10)) for _ in range(3)]))
    assert "all at none, or all at all" in claims["note"]["heads_focused_selected"]
    assert claims.loc["heads_focused_selected", "verdict"] == "undecided"
    assert claims["measured"]["heads_focused_selected"].count("100\u202f%") == 7


def test_the_papers_layers_must_stand_out_beside_controls() -> None:
    def spread(factor: float) -> list[Trained]:
        rows = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            kl = tuple(
                value * (factor if layer in (2, 3, 5) else 1.0) * float(np.exp(0.03 * rng.normal())) for layer, value in enumerate(PAPER_KL)
            )
            rows.append(difference(kl))
        return rows

    ours = spread(1.5)
    for controls, verdict in ((spread(1.0), "supported"), (spread(1.5)[::-1], "undecided"), (spread(3.0), "contradicted")):
        claims = judged(*ours[0], controls=trainings(tuned=ours, shuffled=controls))
        assert claims.loc["most_changed_layers", "verdict"] == verdict
        assert claims.loc["change_concentrated", "verdict"] == verdict
    # nor are they the most changed ones where resamples choose others
    assert (
        judged(*ours[0], noise=0.02, controls=trainings(tuned=ours, shuffled=spread(1.0))).loc["most_changed_layers", "verdict"]
        == "undecided"
    )


def test_noise_of_the_same_size_is_told_apart_by_a_prediction_interval() -> None:
    draws = (0.48, 0.5, 0.52, 0.5, 0.47, 0.49, 0.51, 0.5)
    for own, verdict in ((0.52, "undecided"), (0.9, "supported"), (0.1, "supported")):
        ours = shares(own)
        row = judged(*ours[0], controls=trainings(tuned=ours, noise=shares(*draws))).loc["heads_focused_all.noise"]
        assert row["verdict"] == verdict
        assert row["unit"] == "noise draw"
        assert "says nothing about what it was trained on" in row["note"]
    few = judged(*ours[0], controls=trainings(tuned=ours, noise=shares(*draws[:4]))).loc["heads_focused_all.noise"]
    assert few["verdict"] == "undecided"
    assert few["overturn"] == "More draws (noise_draws): 4 were made, at least 8 are needed."


def test_draws_that_are_all_alike_do_not_make_one_head_evidence() -> None:
    ours = shares(6 / 16, kl=(0.1, 0.2, 0.3, 0.4), n_heads=4)
    draws = shares(*[5 / 16] * 8, kl=(0.1, 0.2, 0.3, 0.4), n_heads=4)
    assert judged(*ours[0], controls=trainings(tuned=ours, noise=draws)).loc["heads_focused_all.noise", "verdict"] == "undecided"


def test_another_models_layers_are_not_held_against_gpt2_small() -> None:
    claims = judged(*difference((0.1, 0.2, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1), n_heads=4))
    assert claims.loc["most_changed_layers", "verdict"] == "undecided"
    assert "layers 1, 2 of 8" in claims["measured"]["most_changed_layers"]
    assert "GPT-2 small (12 layers of 12 heads); this model has 8 of 4" in claims["note"]["most_changed_layers"]


def test_the_selected_layers_are_counted_apart() -> None:
    heads, layers = difference(focused=0.0)
    heads.loc[heads["layer"].isin([2, 3, 5]), "entropy_change"] = -0.05
    claims = judged(heads, layers)
    assert claims.loc["heads_focused_selected", "value"] == 1.0
    assert claims.loc["heads_focused_all", "value"] == 0.25


def test_a_majority_of_signs_without_a_sure_head_says_nothing() -> None:
    row = judged(*difference(focused=0.9, significant=False)).loc["heads_focused_all"]
    assert (row["low"], row["high"]) == (0.0, 1.0)


def test_the_share_of_the_top_quarter_has_the_interval_of_its_noise() -> None:
    assert judged(*difference((0.01,) * 12)).loc["change_concentrated", "value"] == pytest.approx(0.25)
    narrow, wide = (judged(*difference(error=error)).loc["change_concentrated"] for error in (1e-4, 0.03))
    assert narrow["high"] - narrow["low"] < 0.02 < 0.1 < wide["high"] - wide["low"]
    assert judged(*difference((0.5,), n_heads=4)).loc["change_concentrated", "verdict"] == "undecided"


def test_a_model_compared_with_itself_has_no_verdict_on_anything() -> None:
    heads, layers = difference((0.0,) * 12)
    heads[["entropy_change", "kl_base_tuned_se"]] = 0.0
    heads["entropy_change_q"] = 1.0
    claims = judged(heads, layers)
    assert set(claims["verdict"]) == {"no change", "undecided"}
    for name in OF_ATTENTION:
        assert claims.loc[name, "verdict"] == "no change"


def test_rounding_is_no_change() -> None:
    heads, layers = difference((3e-7,) * 12)
    heads["entropy_change"] *= 1e-5
    assert judged(heads, layers).loc["heads_focused_all", "verdict"] == "no change"


def test_a_small_but_real_change_is_one() -> None:
    heads, layers = difference((3e-6,) * 12)
    assert judged(heads, layers).loc["heads_focused_all", "verdict"] == "undecided"


def test_without_a_bakeoff_its_claims_are_not_measured() -> None:
    claims = judged(*difference())
    rest = claims.drop(OF_ATTENTION)
    assert len(rest) == 9, "seven about training, two about interventions"
    assert set(rest["verdict"]) == {"undecided"}
    assert set(rest["measured"]) == {"not measured"}


def test_every_claim_is_a_readable_row() -> None:
    heads, layers = difference()
    table = claims_table({"heads": heads, "layers": layers, "selection": selection_table(heads, layers, rules=["layers_by_kl"])})
    assert list(table.columns) == COLUMNS
    assert table["claim"].is_unique
    for column in ("statement", "paper", "measured"):
        assert not table[column].str.contains("nan|None", case=True).any()
    assert table["statement"].str.fullmatch(r"[A-Z].*[.]").all()


def test_tables_that_do_not_fit_are_refused() -> None:
    heads, layers = difference()
    tables = {"heads": heads, "layers": layers, "selection": selection_table(heads, layers, rules=["heads_by_kl"])}
    with pytest.raises(SettingsError, match=r"no layers chosen by 'layers_by_kl'.*heads_by_kl"):
        claims_table(tables)
    with pytest.raises(SettingsError, match="heads table has no rows='summary': use one of all"):
        claims_table(tables, rows="summary")


class Watched(dict[str, pd.DataFrame]):
    """Tables that note which of them are read."""

    def __init__(self, tables: dict[str, pd.DataFrame]) -> None:
        super().__init__(tables)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> pd.DataFrame:
        self.read.add(name)
        return super().__getitem__(name)


def test_claims_read_the_tables_that_they_declare_and_no_others() -> None:
    heads, layers = difference()
    controls = trainings(tuned=[(heads, layers)], noise=shares(*[0.5] * 5))
    tables = Watched(
        {
            "heads": heads,
            "layers": layers,
            "selection": selection_table(heads, layers, rules=["layers_by_kl"]),
            "weights": heads,
            **controls,
        }
    )
    claims_table(tables)
    assert tables.read == {"heads", "layers", "selection", "controls", "control_heads", "control_layers"}
    assert set(NEEDED) == {name for claim in CLAIMS for name in claim.needs}
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


def test_what_was_not_measured_is_not_alike() -> None:
    heads, layers = difference((0.1, 0.2, 0.3, 0.4), focused=0.5)
    selection = selection_table(heads, layers, rules=["layers_by_kl"])
    missing = heads.assign(kl_base_tuned=np.nan, entropy_change=np.nan)
    claims = claims_table({"heads": missing, "layers": layers, "selection": selection})
    assert "no change" not in set(claims["verdict"])
