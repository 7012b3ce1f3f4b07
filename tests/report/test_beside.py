"""Sections of a difference beside controls: what stands where, in which order, and that negligible parts are folded away."""

from __future__ import annotations

import pandas as pd
import pytest

from mechscope.report.beside import Beside
from mechscope.report.marks.tables import Shown
from mechscope.report.sections import sections
from mechscope.report.theme import number
from tests.report import synthetic
from tests.report.drawn import named, rows_of
from tests.report.synthetic_controls import MODELS


@pytest.fixture
def tables() -> dict[str, pd.DataFrame]:
    return synthetic.tables(4, 4)


def views(section: str, tables: dict[str, pd.DataFrame], kind: str | None = "all") -> list[Shown]:
    return [shown for shown in sections()[section].views(tables) if shown.view.kind == kind]


def with_verdicts(table: pd.DataFrame, quantities: tuple[str, ...], small: pd.Series) -> pd.DataFrame:
    """Return a table whose rows are negligible in all these quantities, or changed in the first and undecided in others."""
    verdicts = {
        f"{name}_verdict": ["negligible" if one else "undecided" if at else "changed" for one in small]
        for at, name in enumerate(quantities)
    }
    return table.assign(**verdicts)


def test_a_cell_has_a_line_for_each_kind_with_the_range_of_its_controls(tables: dict[str, pd.DataFrame]) -> None:
    heads = tables["control_heads"]
    cell = Beside.read(tables, "heads", ("rows", "layer", "head")).cell("write_change")({"rows": "summary", "layer": 2, "head": 1})
    own = heads[(heads["rows"] == "summary") & (heads["layer"] == 2) & (heads["head"] == 1)].set_index("control")["write_change"]
    low, high = (number(end, digits=2) for end in sorted([own["mixed 0"], own["mixed 1"]]))
    assert cell.text == ""
    lines = cell.note.split("\n")
    assert lines[0] == f"other seeds {number(own['seed 1'], digits=2)}"
    assert lines[1] == f"shuffled {low} to {high}"
    assert lines[2].startswith("noise ")
    assert cell.sort == pytest.approx(own.drop("tuned").mean())


def test_controls_that_equal_the_tuned_model_have_its_numbers_in_every_figure(tables: dict[str, pd.DataFrame]) -> None:
    for name in ("heads", "layers", "weights"):
        kind = "control_kind" if name == "weights" else "kind"
        copies = [tables[name].assign(control=control, seed=0, **{kind: what}) for control, what, _ in MODELS]
        tables[f"control_{name}"] = pd.concat(copies, ignore_index=True)
    for section, figure, columns, places in (
        ("heads", "write-change", ("write_change",), ("rows", "layer", "head")),
        ("heads", "distance-change", ("distance_change",), ("rows", "layer", "head")),
        ("weights", "effective-rank", ("effective_rank",), ("matrix", "name", "layer")),
        ("layers", "layer-entropy", ("value",), ("rows", "layer")),
        ("layers", "layer-kl", ("value",), ("panel", "rows", "layer")),
    ):
        drawn = rows_of(named(list(sections()[section].figures(tables)), figure), *columns, *places)
        models = pd.DataFrame(drawn).groupby(list(places))[columns[0]]
        assert (models.count() == 4).all()
        assert models.nunique().le(1).all(), figure


def test_maps_and_curves_name_the_mean_and_how_many_it_is_of(tables: dict[str, pd.DataFrame]) -> None:
    figure = named(list(sections()["heads"].figures(tables)), "entropy-change")
    drawn = pd.DataFrame(rows_of(figure, "entropy_change", "panel"))
    assert list(dict.fromkeys(drawn["panel"])) == ["tuned", "other seeds", "shuffled, mean of 2", "noise, mean of 2"]
    heads = tables["control_heads"]
    here = (heads["rows"] == "all") & (heads["component"] == "a1.h2")
    mean = heads[here & (heads["kind"] == "shuffled")]["entropy_change"].mean()
    of = drawn[(drawn["rows"] == "all") & (drawn["component"] == "a1.h2") & (drawn["panel"] == "shuffled, mean of 2")]
    assert of["entropy_change"].item() == pytest.approx(mean, rel=1e-5)
    assert (
        "n = 200 documents. Controls: 1 training with another seed, 2 trainings on shuffled summaries and 2 draws of noise"
        in figure.caption
    )
    assert "their mean, over the first 48 of the 200 documents." in figure.caption
    curve = pd.DataFrame(rows_of(named(list(sections()["layers"].figures(tables)), "layer-cosine"), "series", "low"))
    layers = tables["control_layers"]
    own = layers[(layers["rows"] == "all") & (layers["layer"] == 3) & (layers["kind"] == "noise")]["cosine_distance"]
    band = curve[(curve["rows"] == "all") & (curve["layer"] == 3) & (curve["series"] == "noise of the same size")].iloc[0]
    assert (band["low"], band["value"], band["high"]) == pytest.approx((own.min(), own.mean(), own.max()), rel=1e-5)


def test_heads_stand_by_the_size_of_their_effect_and_negligible_ones_are_folded(tables: dict[str, pd.DataFrame]) -> None:
    heads = tables["heads"]
    small = heads["layer"].isin([0, 1])
    tables["heads"] = with_verdicts(heads, ("write_change", "kl_base_tuned", "entropy_change"), small)
    large, folded = views("heads", tables)
    assert (large.heading, large.folded) == ("Heads that changed most", False)
    assert (folded.heading, folded.folded) == ("8 negligible heads", True)
    for shown, layers in ((large, {"2", "3"}), (folded, {"0", "1"})):
        assert {row[0].text[1] for row in shown.view.rows} == layers
        writes = [row[1].sort or 0.0 for row in shown.view.rows]
        assert writes == sorted(writes, reverse=True)
    tables["heads"] = with_verdicts(heads, ("write_change", "kl_base_tuned", "entropy_change"), small | True)
    assert [shown.folded for shown in views("heads", tables)] == [True]


def test_a_head_with_one_quantity_that_is_not_negligible_is_not_folded(tables: dict[str, pd.DataFrame]) -> None:
    heads = with_verdicts(tables["heads"], ("write_change", "kl_base_tuned", "entropy_change"), tables["heads"]["head"] >= 0)
    tables["heads"] = heads.assign(entropy_change_verdict=["undecided" if each == "a2.h3" else "negligible" for each in heads["component"]])
    large, folded = views("heads", tables)
    assert [row[0].text for row in large.view.rows] == ["a2.h3"]
    assert folded.heading == "15 negligible heads"


def test_layers_stand_by_attention_kl_and_negligible_ones_are_folded(tables: dict[str, pd.DataFrame]) -> None:
    judged = ("kl_base_tuned", "write_change", "mlp_write_change", "cosine_distance")
    tables["layers"] = with_verdicts(tables["layers"], judged, tables["layers"]["layer"] == 1)
    large, folded = views("layers", tables)
    assert folded.heading == "1 negligible layer"
    assert [row[0].text for row in folded.view.rows] == ["1"]
    kl = [row[1].sort or 0.0 for row in large.view.rows]
    assert kl == sorted(kl, reverse=True)
    assert len(kl) == 3


def test_weights_and_outputs_stand_by_the_size_of_their_change(tables: dict[str, pd.DataFrame]) -> None:
    (weights,) = views("weights", tables, None)
    moved = [row[2].sort or 0.0 for row in weights.view.rows]
    assert moved == sorted(moved, reverse=True)
    (outputs,) = views("outputs", tables, None)
    change = [abs(row[2].sort or 0.0) for row in outputs.view.rows]
    assert change == sorted(change, reverse=True)


def test_without_controls_there_is_nothing_beside(tables: dict[str, pd.DataFrame]) -> None:
    alone = {name: table for name, table in tables.items() if not name.startswith("control")}
    for name in ("heads", "layers", "weights", "outputs", "selection"):
        section = sections()[name]
        assert all("Controls:" not in figure.caption for figure in section.figures(alone))
        assert all("controls:" not in heading for shown in section.views(alone) for heading in shown.view.columns)


@pytest.mark.parametrize("name", ["heads", "layers", "weights", "selection"])
def test_every_caption_says_how_many_documents(tables: dict[str, pd.DataFrame], name: str) -> None:
    for figure in sections()[name].figures(tables):
        assert any(
            words in figure.caption for words in ("n = 200 documents.", "n = 32 documents.", "there is no n.", "of 200 documents.")
        ), figure.name
