"""The claims about attention, on tables made to say one thing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mechscope.difference.selection import selection_table
from mechscope.errors import SettingsError
from mechscope.studies.paper_2505_17073.attention import PAPER_KL
from mechscope.studies.paper_2505_17073.claims import CLAIMS, NEEDED, claims_table

COLUMNS = ["claim", "statement", "paper", "measured", "value", "low", "high", "verdict", "note"]


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
    heads["entropy_change_q"] = 0.001 if significant else 0.6
    heads["z_cosine_distance"] = heads["weight_change"] = 0.1
    layers = heads.groupby(["rows", "layer"], as_index=False)[["kl_base_tuned", "entropy_change", "weight_change"]].mean()
    layers["cosine_distance"] = 0.1
    return heads, layers


def judged(heads: pd.DataFrame, layers: pd.DataFrame, *, noise: float = 0.0) -> pd.DataFrame:
    """Return the claims, by name, with a selection resampled with the given noise per layer."""
    shape = (len(layers), len(heads) // len(layers))
    mean = heads["kl_base_tuned"].to_numpy().reshape(1, *shape)
    resampled = {"kl_base_tuned": mean + noise * np.random.default_rng(0).normal(size=(400, shape[0], 1))}
    selection = selection_table(heads, layers, resampled, rules=["layers_by_kl", "heads_by_kl"])
    return claims_table({"heads": heads, "layers": layers, "selection": selection}).set_index("claim")


def test_the_papers_own_numbers_support_its_claims() -> None:
    claims = judged(*difference(focused=0.62, error=1e-4))
    assert claims.loc["most_changed_layers", "verdict"] == "supported"
    assert claims.loc["most_changed_layers", "value"] == 1.0
    assert "Layers 2, 3, 5 of 12" in claims["measured"]["most_changed_layers"]
    assert claims.loc["heads_focused_all", "verdict"] == "supported"
    assert claims.loc["change_concentrated", "verdict"] == "supported"
    # (.0236 + .0179 + .0136) / .1174
    assert claims.loc["change_concentrated", "value"] == pytest.approx(0.4693, abs=1e-4)


def test_the_replications_layers_contradict_the_papers() -> None:
    replication = (0.061, 0.101, 0.246, 0.274, 0.272, 0.372, 0.320, 0.341, 0.290, 0.299, 0.282, 0.284)
    claims = judged(*difference(replication, focused=0.0))
    assert claims.loc["most_changed_layers", "verdict"] == "contradicted"
    assert "Layers 5, 6, 7" in claims["measured"]["most_changed_layers"]
    assert claims.loc["most_changed_layers", "value"] == pytest.approx(1 / 3)
    assert claims.loc["heads_focused_all", "verdict"] == "contradicted"
    assert claims.loc["change_concentrated", "verdict"] == "contradicted"


def test_layers_that_change_places_between_resamples_are_undecided() -> None:
    claims = judged(*difference(), noise=0.002)
    assert claims.loc["most_changed_layers", "verdict"] == "undecided"


def test_another_models_layers_are_not_held_against_gpt2_small() -> None:
    claims = judged(*difference((0.1, 0.2, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1), n_heads=4))
    assert claims.loc["most_changed_layers", "verdict"] == "undecided"
    assert claims["measured"]["most_changed_layers"].startswith("Layers 1, 2 of 8")
    assert "GPT-2 small (12 layers of 12 heads); this model has 8 of 4" in claims["note"]["most_changed_layers"]


@pytest.mark.parametrize(("focused", "verdict"), [(0.75, "supported"), (0.5, "undecided"), (0.25, "contradicted")])
def test_a_majority_of_heads_decides_whether_heads_became_focused(focused: float, verdict: str) -> None:
    claims = judged(*difference(focused=focused))
    for name in ("heads_focused_all", "heads_focused_selected"):
        assert claims.loc[name, "verdict"] == verdict
        assert claims.loc[name, "value"] == pytest.approx(focused, abs=0.03)
        assert claims["low"][name] < focused < claims["high"][name]


def test_the_selected_layers_are_counted_apart() -> None:
    heads, layers = difference(focused=0.0)
    heads.loc[heads["layer"].isin([2, 3, 5]), "entropy_change"] = -0.05
    claims = judged(heads, layers)
    assert claims.loc["heads_focused_selected", "value"] == 1.0
    assert claims.loc["heads_focused_selected", "verdict"] == "supported"
    assert claims.loc["heads_focused_all", "value"] == 0.25
    assert claims.loc["heads_focused_all", "verdict"] == "contradicted"


def test_a_majority_of_signs_without_a_significant_head_decides_nothing() -> None:
    claims = judged(*difference(focused=0.9, significant=False))
    assert claims.loc["heads_focused_all", "verdict"] == "undecided"
    assert "0 did so significantly and 0 became broader" in claims["measured"]["heads_focused_all"]


def test_a_change_spread_evenly_is_not_concentrated() -> None:
    claims = judged(*difference((0.01,) * 12))
    assert claims.loc["change_concentrated", "value"] == pytest.approx(0.25)
    assert claims.loc["change_concentrated", "verdict"] == "contradicted"


def test_a_noisy_concentration_is_undecided() -> None:
    claims = judged(*difference(error=0.03))
    row = claims.loc["change_concentrated"]
    assert row["low"] < 0.375 < row["high"]
    assert row["verdict"] == "undecided"


def test_one_layer_cannot_be_concentrated() -> None:
    assert judged(*difference((0.5,), n_heads=4)).loc["change_concentrated", "verdict"] == "undecided"


def test_a_model_compared_with_itself_has_no_verdict_on_anything() -> None:
    heads, layers = difference((0.0,) * 12)
    heads[["entropy_change", "kl_base_tuned_se"]] = 0.0
    heads["entropy_change_q"] = 1.0
    claims = judged(heads, layers)
    assert set(claims["verdict"]) == {"no change", "undecided"}
    for name in ("most_changed_layers", "heads_focused_all", "heads_focused_selected", "change_concentrated"):
        assert claims.loc[name, "verdict"] == "no change"


def test_rounding_is_no_change() -> None:
    heads, layers = difference((3e-7,) * 12)
    heads["entropy_change"] *= 1e-5
    assert judged(heads, layers).loc["heads_focused_all", "verdict"] == "no change"


def test_a_small_but_real_change_is_one() -> None:
    heads, layers = difference((3e-6,) * 12)
    assert judged(heads, layers).loc["heads_focused_all", "verdict"] == "supported"


def test_without_a_bakeoff_its_claims_are_not_measured() -> None:
    claims = judged(*difference())
    rest = claims.drop(["most_changed_layers", "heads_focused_all", "heads_focused_selected", "change_concentrated"])
    assert len(rest) == 9, "seven about training, two about interventions"
    assert set(rest["verdict"]) == {"undecided"}
    assert set(rest["measured"]) == {"not measured"}


def test_every_claim_is_a_readable_row() -> None:
    heads, layers = difference()
    table = claims_table({"heads": heads, "layers": layers, "selection": selection_table(heads, layers)})
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
    tables = Watched({"heads": heads, "layers": layers, "selection": selection_table(heads, layers), "weights": heads})
    claims_table(tables)
    assert tables.read == {"heads", "layers", "selection"}
    assert set(NEEDED) == {name for claim in CLAIMS for name in claim.needs}
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
