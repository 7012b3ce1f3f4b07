"""What the figures show: the tables' own numbers, marked where the tables say so."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mechscope.report.marks.figure import Figure, script_json
from mechscope.report.shared import chosen, main_rule
from mechscope.report.theme import STRATEGY_COLOURS
from tests.report import synthetic
from tests.report.drawn import figures_of, named
from tests.report.drawn import rows_of as numbers


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return synthetic.tables()


@pytest.fixture(scope="module")
def drawn(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures_of(tables)}


PANELS = {"tuned": "tuned", "seed": "other seeds", "shuffled": "shuffled, mean of 2", "noise": "noise, mean of 2"}


def layers_of(spec: dict) -> list[dict]:
    """Return the layers of a picture, or those that each of its small multiples has."""
    spec = spec.get("spec", spec)
    return spec.get("layer", [spec])


def kl_by_panel(tables: dict[str, pd.DataFrame]) -> dict[object, float]:
    """Return of every head the tuned model's attention KL, and the mean of each kind of control's."""
    models = pd.concat([tables["heads"].assign(kind="tuned"), tables["control_heads"].query("kind != 'tuned'")])
    means = models.groupby(["kind", "rows", "layer", "head"], as_index=False)["kl_base_tuned"].mean()
    return {(PANELS[row.kind], row.rows, row.layer, row.head): row.kl_base_tuned for row in means.itertuples()}


def test_attention_heatmap_holds_each_heads_kl_to_six_digits(tables: dict[str, pd.DataFrame], drawn: dict[str, Figure]) -> None:
    rows = numbers(drawn["attention-kl"], "kl_base_tuned")
    found: dict[object, float] = {(row["panel"], row["rows"], row["layer"], row["head"]): row["kl_base_tuned"] for row in rows}
    wanted = kl_by_panel(tables)
    assert len(rows) == len(found) == len(tables["heads"]) * len(PANELS)
    assert found.keys() == wanted.keys()
    assert all(math.isclose(found[key], wanted[key], rel_tol=1e-5) for key in wanted)


def test_entropy_colours_are_symmetric_about_zero(tables: dict[str, pd.DataFrame], drawn: dict[str, Figure]) -> None:
    alone = named(figures_of({"heads": tables["heads"]}), "entropy-change")
    for figure in (alone, drawn["entropy-change"]):
        scale = layers_of(figure.spec)[0]["encoding"]["color"]["scale"]
        assert scale["domain"][0] == -scale["domain"][1] < 0
        assert scale["domainMid"] == 0


def test_a_clipped_colour_scale_says_so(tables: dict[str, pd.DataFrame]) -> None:
    heads = tables["heads"].copy()
    heads.loc[0, "entropy_change"] = 50.0
    figure = named(figures_of({"heads": heads}), "entropy-change")
    assert "the largest change is 50" in figure.caption


def test_heads_whose_entropy_changed_by_more_than_the_smallest_effect_are_dotted(tables: dict[str, pd.DataFrame]) -> None:
    heads = tables["heads"].assign(entropy_change_q=0.001)  # surely different from zero is not enough
    figure = named(figures_of({"heads": heads}), "entropy-change")
    filters = [transform["filter"] for layer in layers_of(figure.spec) for transform in layer.get("transform", [])]
    assert "datum.changed" in filters
    dotted = [row["changed"] for row in numbers(figure, "changed")]
    assert dotted == (heads["entropy_change_verdict"] == "changed").tolist()
    assert 0 < sum(dotted) < len(dotted)
    assert "A dot marks a change beyond the smallest effect of interest." in figure.caption


def test_selected_heads_are_those_of_the_rule_by_kl(tables: dict[str, pd.DataFrame], drawn: dict[str, Figure]) -> None:
    outlined = {(row["layer"], row["head"]) for row in numbers(drawn["attention-kl"], "selected") if row["selected"]}
    selection = tables["selection"]
    wanted = selection[(selection["rule"] == "heads_by_kl") & selection["chosen"]]
    assert outlined == set(zip(wanted["layer"], wanted["head"], strict=True))


def test_a_control_is_never_the_outlined_selection() -> None:
    rows = {"kind": "layer", "component": "layers:0", "layer": 0, "head": -1, "rank": 1, "score": 1.0, "chosen": True, "frequency": 1.0}
    selection = pd.DataFrame(
        [rows | {"rule": "random_layers"}, rows | {"rule": "last_layers"}, rows | {"rule": "layers_by_score", "layer": 7}]
    )
    assert main_rule(selection, "layer") == "layers_by_score"
    assert chosen(selection, "layer") == [(7, -1)]
    assert main_rule(selection.head(2), "layer") is None


def test_layer_curve_band_is_the_tables_interval(tables: dict[str, pd.DataFrame], drawn: dict[str, Figure]) -> None:
    alone = named(figures_of({"layers": tables["layers"]}), "layer-entropy")
    rows = tables["layers"][tables["layers"]["rows"] == "summary"]
    for figure, series in ((alone, "entropy change"), (drawn["layer-entropy"], "tuned")):
        own = [row for row in numbers(figure, "low") if row["rows"] == "summary" and row["series"] == series]
        found = {row["layer"]: (row["low"], row["high"]) for row in own}
        assert len(own) == len(found) == len(rows)
        for row in rows.itertuples():
            assert found[row.layer] == pytest.approx((row.entropy_change_low, row.entropy_change_high), rel=1e-5)
    # beside controls, the band that is drawn is from `bottom` to `top`
    (area,) = (layer for layer in layers_of(drawn["layer-entropy"].spec) if layer["mark"]["type"] == "area")
    assert (area["encoding"]["y"]["field"], area["encoding"]["y2"]["field"]) == ("bottom", "top")
    assert all((row["bottom"], row["top"]) == (row["low"], row["high"]) for row in numbers(drawn["layer-entropy"], "low"))


def test_layer_curve_uses_the_standard_error_where_there_is_no_interval(tables: dict[str, pd.DataFrame]) -> None:
    layers = tables["layers"].drop(columns=["kl_base_tuned_low", "kl_base_tuned_high"]).assign(kl_base_tuned_se=0.5)
    figure = named(figures_of({"layers": layers}), "layer-kl")
    for row in numbers(figure, "low"):
        if row["series"].startswith("KL(base"):
            assert row["high"] - row["low"] == pytest.approx(2 * 1.959964 * 0.5, rel=1e-4)


def test_layer_curve_without_error_draws_no_band(tables: dict[str, pd.DataFrame], drawn: dict[str, Figure]) -> None:
    alone = named(figures_of({"layers": tables["layers"]}), "layer-similarity")
    marks = {layer["mark"]["type"] for layer in layers_of(alone.spec)}
    assert "area" not in marks
    assert "line" in marks
    # beside controls, whose range is a band, the tuned model's has no height
    own = [row for row in numbers(drawn["layer-similarity"], "value") if row["series"] == "tuned"]
    assert len(own) == 2 * len(tables["layers"])  # CKA and RSA
    assert all(row["bottom"] == row["value"] == row["top"] and row["low"] is None and row["high"] is None for row in own)


def test_every_pair_of_models_has_its_own_curve_of_attention_kl(tables: dict[str, pd.DataFrame], drawn: dict[str, Figure]) -> None:
    found = {(row["series"], row["rows"], row["layer"]): row["value"] for row in numbers(drawn["layer-pairs"], "value")}
    for row in tables["layers"].itertuples():
        for series, factor in (("base–tuned", 1), ("base–LoRA", 1 / 2), ("tuned–LoRA", 1 / 3)):
            assert found[series, row.rows, row.layer] == pytest.approx(float(str(row.kl_base_tuned)) * factor, rel=1e-4)


def test_mean_learning_curve_ends_where_the_first_seed_stops() -> None:
    curves = pd.DataFrame(
        [
            {"protocol": "equal_rank", "strategy": "standard", "seed": seed, "step": step, "tokens": 10 * step, "validation_loss": loss}
            for seed, losses in enumerate(([3.0, 2.0, 1.0], [4.0, 3.0]))
            for step, loss in enumerate(losses)
        ]
    )
    (figure,) = figures_of({"learning_curves": curves})
    mean = {row["step"]: row["validation_loss"] for row in numbers(figure, "n")}
    assert mean == {0: 3.5, 1: 2.5}


def test_full_fine_tuning_is_drawn_beside_every_protocol(drawn: dict[str, Figure]) -> None:
    for protocol in ("equal-rank", "equal-parameters"):
        assert "full fine-tuning" in {row["strategy"] for row in numbers(drawn[f"learning-{protocol}"], "strategy")}


def test_a_strategy_has_one_colour_in_all_figures(drawn: dict[str, Figure]) -> None:
    for name in ("learning-equal-rank", "parameter-price"):
        encodings = [layer["encoding"]["color"]["scale"] for layer in layers_of(drawn[name].spec)]
        for scale in encodings:
            assert scale["range"][scale["domain"].index("targeted layers")] == STRATEGY_COLOURS["targeted_layers"]


def test_paired_differences_are_the_summary_tables(tables: dict[str, pd.DataFrame], drawn: dict[str, Figure]) -> None:
    summary = tables["bakeoff_summary"]
    wanted = summary[
        (summary["protocol"] == "equal_parameters") & (summary["strategy"] == "targeted_heads") & (summary["metric"] == "rouge2")
    ].iloc[0]
    rows = numbers(drawn["difference-random-equal-parameters"], "strategy", "metric", "mean")
    (found,) = [row for row in rows if row["strategy"] == "targeted heads" and row["metric"] == "ROUGE-2"]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(
        (wanted["vs_random"], wanted["vs_random_low"], wanted["vs_random_high"]), rel=1e-5
    )


def test_a_baseline_is_not_compared_with_itself(drawn: dict[str, Figure]) -> None:
    assert "standard LoRA" not in {row["strategy"] for row in numbers(drawn["difference-standard-equal-rank"], "strategy")}


def test_scree_mean_is_geometric() -> None:
    weights = pd.DataFrame(
        {
            "name": ["h.0.q", "h.1.q"], "layer": [0, 1], "kind": "query", "rows": 8, "columns": 8, "relative_change": 0.1,
            "effective_rank": 2.0, "sv1": [1.0, 4.0], "sv2": [0.5, 0.5],
        }
    )  # fmt: skip
    noise = weights.assign(sv1=[9.0, 4.0], sv2=[1.0, 1.0], control="noise 0", seed=0, control_kind="noise")
    alone, beside = {"weights": weights}, {"weights": weights, "control_weights": noise}
    for tables, wanted in ((alone, {"tuned": (2.0, 0.5)}), (beside, {"tuned": (2.0, 0.5), "noise": (6.0, 1.0)})):
        figure = named(figures_of(tables), "singular-values")
        means = [row for row in numbers(figure, "rank") if row["layers"] == "all"]
        found = {(row["model"], row["rank"]): row["value"] for row in means}
        assert len(means) == len(found)
        assert found == pytest.approx({(model, rank): value for model, pair in wanted.items() for rank, value in enumerate(pair, 1)})
        thick = {"filter": "datum.layers === 'all'"}
        assert [layer["mark"]["type"] for layer in layers_of(figure.spec) if thick in layer.get("transform", [])] == ["line", "point"]


def test_matrices_outside_the_layers_are_in_no_heatmap(drawn: dict[str, Figure]) -> None:
    assert min(row["layer"] for row in numbers(drawn["weight-change"], "matrix")) == 0


def test_identical_models_give_drawable_figures(tables: dict[str, pd.DataFrame]) -> None:
    heads, layers, weights = (tables[name].copy() for name in ("heads", "layers", "weights"))
    for column in ("kl_base_tuned", "kl_tuned_base", "entropy_change", "z_cosine_distance", "weight_change"):
        heads[column] = 0.0
    heads["entropy_change_q"] = np.nan
    for column in [*(f"sv{i}" for i in range(1, 9)), "relative_change", "change"]:
        weights[column] = 0.0
    for figure in figures_of({"heads": heads, "layers": layers, "weights": weights}):
        assert figure.svg().startswith("<svg")


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 4), (48, 64)])
def test_every_head_has_a_cell_whatever_the_models_shape(layers: int, heads: int) -> None:
    table = synthetic.heads_table(layers, heads, np.random.default_rng(0))
    figure = named(figures_of({"heads": table}), "attention-kl")
    assert len(re.findall(r'aria-roledescription="rect mark"', figure.svg())) == layers * heads


def test_exported_figure_carries_title_unit_and_caption(run: Path) -> None:
    svg = (run / "figures" / "attention-kl.svg").read_text()
    assert "How far attention moved" in svg
    assert "nats" in svg


def test_every_figure_is_an_svg_and_a_png(run: Path, drawn: dict[str, Figure]) -> None:
    for name in drawn:
        assert (run / "figures" / f"{name}.svg").read_text().startswith("<svg")
        assert (run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((run / "figures").iterdir())) == 2 * len(drawn)


def test_exported_svg_shows_the_numbers_of_its_heads(tables: dict[str, pd.DataFrame], run: Path) -> None:
    top = tables["heads"].query("rows == 'all'").nlargest(1, "kl_base_tuned").iloc[0]
    svg = (run / "figures" / "attention-kl.svg").read_text()
    labels = re.findall(rf'aria-label="([^"]*; component: {re.escape(top["component"])};[^"]*)"', svg)
    models = kl_by_panel(tables)
    assert {*(re.findall(r"model: ([^;]*);", label)[0] for label in labels)} == {*PANELS.values()}
    for label in labels:
        (model,) = re.findall(r"model: ([^;]*);", label)
        assert f"KL(base || tuned), nats: {models[model, 'all', top['layer'], top['head']]:.4g};" in label


@pytest.mark.parametrize("text", ["</script>", "<!--", "&amp;", "\u2028", "\u2029", "<script>"])
def test_embedded_json_cannot_end_or_open_markup(text: str) -> None:
    written = script_json({"name": text})
    assert text not in written
    assert json.loads(written) == {"name": text}
