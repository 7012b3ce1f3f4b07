"""The picture of a circuit and its slider: they draw the tables' own edges and numbers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from mechscope.circuits.graph import Graph
from mechscope.errors import RunError
from mechscope.report.circuit_picture import HARMS, HOLDS, Grid, circuit_svg
from mechscope.report.circuit_slider import EDGES_DRAWN, EDGES_IN_PAGE, pictures
from tests.report import synthetic_circuits as invented
from tests.report.circuit_pages import SVG, by_title, drawn_edges, drawn_nodes, some_edges


def test_every_edge_of_the_circuit_is_drawn_and_no_other() -> None:
    tables = invented.circuit_tables(12, 12, chosen=400)
    (picture,) = pictures(tables)
    edges = tables["circuit_edges"]
    assert by_title(picture.svg()).keys() == set(edges.loc[edges["in_circuit"], "edge"])
    assert len(drawn_edges(picture.svg())) == 400


def test_only_nodes_with_edges_are_shown() -> None:
    svg = circuit_svg(some_edges("input->a0.h3<q>", "a0.h3->m2", "m2->logits"), hidden=["a1.h1"])
    assert sorted(drawn_nodes(svg)) == ["a0.h3", "input", "logits", "m2"]
    assert 'data-node="a1.h1"' in svg


def test_width_grows_with_the_size_of_the_score_whatever_its_sign() -> None:
    scores = [-0.9, 0.5, -0.1, 0.0, 0.7]
    names = ["input->m0", "m0->m1", "m1->logits", "input->logits", "m0->logits"]
    found = by_title(circuit_svg(some_edges(*names, scores=scores)))
    widths = {name: float(found[name].get("stroke-width", "nan")) for name in names}
    assert sorted(names, key=lambda name: widths[name]) == sorted(names, key=lambda name: abs(scores[names.index(name)]))
    # linear: what lies above the thinnest line is proportional to |score|
    thinnest = widths["input->logits"]
    assert (widths["m0->m1"] - thinnest) / (widths["input->m0"] - thinnest) == pytest.approx(5 / 9, abs=1e-3)


def test_colour_is_the_sign_of_the_score() -> None:
    found = by_title(circuit_svg(some_edges("input->m0", "m0->logits", scores=[-0.2, 0.2])))
    assert found["input->m0"].get("stroke") == HOLDS
    assert found["m0->logits"].get("stroke") == HARMS
    assert HOLDS != HARMS


def test_query_key_and_value_enter_a_head_from_left_to_right() -> None:
    ends = [float(Grid(4, 4).path("m0", f"a2.h1<{part}>").split()[-2]) for part in "qkv"]
    assert ends[0] < ends[1] < ends[2]
    assert ends[1] == pytest.approx(Grid(4, 4).place("a2.h1")[0], abs=0.1)


def test_the_input_is_at_the_bottom_and_layers_rise_to_the_logits() -> None:
    grid = Grid(3, 2)
    heights = [grid.place(name)[1] for name in ("input", "a0.h0", "m0", "a1.h1", "m1", "a2.h0", "m2", "logits")]
    assert heights == sorted(heights, reverse=True)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (12, 12), (24, 16), (48, 64)])
def test_no_two_nodes_overlap_and_all_are_inside(layers: int, heads: int) -> None:
    grid, graph = Grid(layers, heads), Graph(layers, heads)
    places = np.array([grid.place(name) for name in (*graph.senders[1:],)])
    width, height = grid.box
    assert (np.abs(places - [grid.size[0] / 2, grid.size[1] / 2]) < [grid.size[0] / 2 - width / 2, grid.size[1] / 2 - height / 2]).all()
    apart = np.abs(places[:, None] - places[None])
    overlap = (apart[..., 0] < width) & (apart[..., 1] < height)
    assert overlap.sum() == len(places)  # every node with itself


def test_every_edge_of_a_model_leads_upwards() -> None:
    grid, graph = Grid(3, 3), Graph(3, 3)
    for name in graph.names:
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d", grid.path(*name.split("->")))]
        assert numbers[1] > numbers[-1], name


def test_hovering_tells_name_score_interval_and_q() -> None:
    edges = some_edges("a0.h1->a1.h0<v>", scores=[-0.125]).assign(low=-0.2, high=-0.05, q=0.013)
    nodes = pd.DataFrame({"node": ["a0.h1"], "score": [0.25], "low": [0.1], "high": [0.4]})
    titles = [element.text for element in ElementTree.fromstring(circuit_svg(edges, nodes)).iter(f"{SVG}title")]
    assert "a0.h1->a1.h0<v>\nscore −0.125 [−0.200, −0.0500], q = 0.013" in titles
    assert "a0.h1\nscore +0.250 [+0.100, +0.400]" in titles


def test_a_table_without_intervals_is_drawn_without() -> None:
    tables = invented.circuit_tables(2, 2, chosen=5)
    tables = {"circuit_edges": tables["circuit_edges"].drop(columns=["n", "se", "low", "high", "p", "q"])}
    (picture,) = pictures(tables)
    assert len(drawn_edges(picture.svg())) == 5
    assert "[" not in "".join(by_title(picture.svg()))
    assert picture.faithfulness_words() == ("not measured", "not measured")


def test_an_edge_without_score_is_drawn_thinnest() -> None:
    tables = invented.circuit_tables(2, 2, chosen=5)
    edges = tables["circuit_edges"]
    first = int(np.flatnonzero(edges["in_circuit"])[0])
    edges.loc[edges.index[first], "score"] = np.nan
    (picture,) = pictures({"circuit_edges": edges})
    name = str(edges["edge"].iloc[first])
    widths = {edge: float(element.get("stroke-width", "nan")) for edge, element in by_title(picture.svg()).items()}
    assert widths[name] == min(widths.values())


def test_an_edge_of_no_model_is_refused_by_name() -> None:
    edges = some_edges("x0->logits").assign(model="model", in_circuit=True)
    with pytest.raises(RunError, match="'x0', which is not input"):
        pictures({"circuit_edges": edges})


def test_a_huge_circuit_says_that_only_its_strongest_edges_are_drawn() -> None:
    (picture,) = pictures(invented.circuit_tables(12, 12, chosen=EDGES_DRAWN + 100))
    assert len(drawn_edges(picture.svg())) == EDGES_DRAWN
    assert "the strongest 1,500 are drawn" in picture.size_words()


def test_an_empty_circuit_is_drawn_without_edges() -> None:
    tables = invented.circuit_tables(2, 2)
    (picture,) = pictures({"circuit_edges": tables["circuit_edges"].assign(in_circuit=False)})
    assert drawn_edges(picture.page_svg()) == []
    assert picture.size_words().startswith("The chosen circuit: 0 of ")


def test_slider_holds_the_strongest_edges_and_the_curve_of_the_tables() -> None:
    tables = invented.circuit_tables(12, 12)
    (picture,) = pictures(tables)
    data, edges = picture.data(), tables["circuit_edges"]
    wanted = edges.reindex(edges["score"].abs().sort_values(ascending=False).index).head(EDGES_IN_PAGE)
    names = [f"{data['names'][s]}->{data['names'][r]}" for s, r in zip(data["sender"], data["receiver"], strict=True)]
    assert names == list(wanted["edge"])
    for column in ("score", "low", "high", "q"):
        assert data[column] == pytest.approx(list(wanted[column]), rel=1e-5)
    curve = tables["circuit_curve"].query("edges > 0")
    for column in ("edges", "faithfulness", "low", "high", "random", "random_low", "random_high"):
        assert data["curve"][column] == pytest.approx(list(curve[column]), rel=1e-5)
    assert data["total"] == len(edges) == 32491


def test_slider_stops_at_every_measured_size_and_starts_at_the_chosen_circuit() -> None:
    tables = invented.circuit_tables(12, 12, chosen=217)
    (picture,) = pictures(tables)
    assert picture.stops == sorted(set(picture.stops))
    assert picture.stops[picture.start] == 217
    assert {32, 65, 162, 325, 650, 1625, 3249} <= set(picture.stops)
    assert picture.stops[-1] == EDGES_IN_PAGE


def test_two_models_with_one_file_name_get_two_files() -> None:
    assert [picture.name for picture in pictures(invented.of_models(("step 1", "step-1"), 2, 2))] == ["circuit-step-1", "circuit-step-1-2"]
