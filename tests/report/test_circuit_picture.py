"""The picture of a circuit and its slider: they draw the tables' own edges and numbers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from mechscope.circuits.graph import Graph
from mechscope.errors import RunError
from mechscope.report.marks.circuit_picture import HARMS, HOLDS, Grid, circuit_svg, owner
from mechscope.report.marks.circuit_slider import EDGES_DRAWN, EDGES_IN_PAGE, pictures
from mechscope.report.theme import interval, number
from tests.report import synthetic_circuits as invented
from tests.report.circuit_pages import SVG, by_title, drawn_edges, drawn_nodes, said, shown_edges, shown_nodes, some_edges


def test_every_edge_of_the_circuit_is_drawn_and_no_other() -> None:
    tables = invented.circuit_tables(12, 12, chosen=400)
    (picture,) = pictures(tables)
    edges = tables["circuit_edges"]
    assert by_title(picture.svg()).keys() == set(edges.loc[edges["in_circuit"], "edge"])
    assert len(drawn_edges(picture.svg())) == 400


def test_only_nodes_with_edges_are_shown() -> None:
    edges = some_edges("embed->a0.h3<q>", "a0.h3->m2", "m2->logits", "a1.h1->m2")
    assert sorted(drawn_nodes(circuit_svg(edges.head(3)))) == ["a0.h3", "embed", "logits", "m2"]
    with_slider = circuit_svg(edges.assign(rank=[1, 2, 3, 4], chosen=[True, True, True, False]), steps=[1, 2, 3, 4])
    assert sorted(shown_nodes(with_slider)) == ["a0.h3", "embed", "logits", "m2"]
    assert "a1.h1" in drawn_nodes(with_slider)


def test_width_grows_with_the_size_of_the_score_whatever_its_sign() -> None:
    scores = [-0.9, 0.5, -0.1, 0.0, 0.7]
    names = ["embed->m0", "m0->m1", "m1->logits", "embed->logits", "m0->logits"]
    drawn = by_title(circuit_svg(some_edges(*names, scores=scores)))
    widths = {name: float(drawn[name].get("stroke-width", "nan")) for name in names}
    assert sorted(names, key=lambda name: widths[name]) == sorted(names, key=lambda name: abs(scores[names.index(name)]))
    # linear: what lies above the thinnest line is proportional to |score|
    thinnest = widths["embed->logits"]
    assert (widths["m0->m1"] - thinnest) / (widths["embed->m0"] - thinnest) == pytest.approx(5 / 9, abs=1e-3)


def test_colour_is_the_sign_of_the_score() -> None:
    drawn = by_title(circuit_svg(some_edges("embed->m0", "m0->logits", scores=[-0.2, 0.2])))
    assert drawn["embed->m0"].get("stroke") == HOLDS
    assert drawn["m0->logits"].get("stroke") == HARMS
    assert HOLDS != HARMS


def test_query_key_and_value_enter_a_head_from_left_to_right() -> None:
    ends = [float(Grid(4, 4).path("m0", f"a2.h1<{part}>").split()[-2]) for part in "qkv"]
    assert ends[0] < ends[1] < ends[2]
    assert ends[1] == pytest.approx(Grid(4, 4).place("a2.h1")[0], abs=0.1)


def test_the_embedding_is_at_the_bottom_and_layers_rise_to_the_logits() -> None:
    grid = Grid(3, 2)
    heights = [grid.place(name)[1] for name in ("embed", "a0.h0", "m0", "a1.h1", "m1", "a2.h0", "m2", "logits")]
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
    with pytest.raises(RunError, match="'x0', which is not embed"):
        pictures({"circuit_edges": edges})


def test_a_huge_circuit_says_that_only_its_strongest_edges_are_drawn() -> None:
    (picture,) = pictures(invented.circuit_tables(12, 12, chosen=EDGES_DRAWN + 100))
    assert len(drawn_edges(picture.svg())) == EDGES_DRAWN
    assert "the strongest 1,500 are drawn" in picture.size_words()


def test_an_empty_circuit_is_drawn_without_edges() -> None:
    tables = invented.circuit_tables(2, 2)
    (picture,) = pictures({"circuit_edges": tables["circuit_edges"].assign(in_circuit=False)})
    assert not drawn_edges(picture.svg())
    assert not shown_edges(picture.page_svg())
    assert picture.size_words().startswith("The chosen circuit: 0 of ")


def test_slider_shows_the_strongest_edges_and_the_nodes_that_they_touch() -> None:
    tables = invented.circuit_tables(12, 12)
    (picture,) = pictures(tables)
    svg, edges = picture.page_svg(), tables["circuit_edges"]
    strongest = edges.reindex(edges["score"].abs().sort_values(ascending=False).index)
    for count in (1, 32, picture.stops[picture.start], picture.stops[-2], EDGES_IN_PAGE):
        own = strongest.head(count)
        assert shown_edges(svg, count)[::-1] == list(own["edge"])
        assert set(shown_nodes(svg, count)) == {*own["sender"], *own["receiver"].map(owner)}
    assert set(shown_edges(svg)) == set(edges.loc[edges["in_circuit"], "edge"])


def test_every_edge_that_the_slider_can_show_tells_its_score_interval_and_q() -> None:
    tables = invented.circuit_tables(12, 12)
    (picture,) = pictures(tables)
    drawn = by_title(picture.page_svg())
    assert len(drawn) == EDGES_IN_PAGE
    for row in tables["circuit_edges"].set_index("edge").loc[list(drawn)[::7]].reset_index().to_dict("records"):
        score = f"score {number(row['score'], sign=True)} {interval(row['low'], row['high'], sign=True)}, q = {number(row['q'], digits=2)}"
        assert said(drawn[row["edge"]]) == f"{row['edge']}\n{score}"


def test_a_page_draws_an_edge_as_the_file_does() -> None:
    (picture,) = pictures(invented.circuit_tables(4, 4, chosen=60))
    in_page, in_file = by_title(picture.page_svg()), by_title(picture.svg())
    assert len(in_file) == 60
    for name, edge in in_file.items():
        assert in_page[name].attrib | {"class": ""} == edge.attrib | {"class": ""}


def test_edges_of_a_circuit_beyond_the_sliders_reach_are_drawn_with_it_and_with_no_stop() -> None:
    edges = invented.circuit_tables(12, 12)["circuit_edges"]
    weakest = int(edges["score"].abs().to_numpy().argmin())
    edges["in_circuit"] = np.arange(len(edges)) == weakest
    (picture,) = pictures({"circuit_edges": edges})
    assert shown_edges(picture.page_svg()) == [edges["edge"].iloc[weakest]]
    assert len(shown_edges(picture.page_svg(), EDGES_IN_PAGE)) == EDGES_IN_PAGE


def test_every_stop_says_its_size_and_the_faithfulness_of_that_many_edges() -> None:
    tables = invented.circuit_tables(12, 12)
    (picture,) = pictures(tables)
    data, curve = picture.data(), tables["circuit_curve"].set_index("edges")
    at = {stop["edges"]: stop for stop in data["stops"]}
    assert list(at) == picture.stops
    measured = [count for count in curve.index if count in at]
    assert len(measured) == 7
    for count in measured:
        row = curve.loc[count]
        assert at[count]["faithful"] == f"{number(row['faithfulness'])} {interval(row['low'], row['high'])}"
        assert at[count]["random"] == f"{number(row['random'])} {interval(row['random_low'], row['random_high'])}"
        assert at[count]["note"] == "Measured at this size."
        assert at[count]["size"].startswith(f"The {count:,} strongest of 32,491 edges (")
    assert at[1]["faithful"] == at[1]["random"] == "not measured"
    marks = [stop["mark"] for stop in data["stops"]]
    assert marks == sorted(marks)
    assert marks[-1] > marks[0]


def test_between_two_measured_sizes_faithfulness_is_linear_in_the_logarithm_of_the_number() -> None:
    tables = invented.circuit_tables(12, 12)
    (picture,) = pictures(tables)
    curve = tables["circuit_curve"].set_index("edges")
    (stop,) = (stop for stop in picture.data()["stops"] if stop["edges"] == next(count for count in picture.stops if 325 < count < 650))
    share = np.log(stop["edges"] / 325) / np.log(650 / 325)
    wanted = (1 - share) * curve.loc[325, "faithfulness"] + share * curve.loc[650, "faithfulness"]
    assert float(stop["faithful"].split()[0]) == pytest.approx(wanted, abs=6e-4)
    assert stop["note"] == "Between the measured sizes of 325 and 650 edges."


def test_the_page_counts_the_nodes_of_a_stop_that_write() -> None:
    (picture,) = pictures(invented.circuit_tables(4, 4))
    svg = picture.page_svg()
    for stop in picture.data()["stops"][:: len(picture.stops) // 5]:
        nodes = set(shown_nodes(svg, stop["edges"])) - {"logits"}
        assert stop["size"].endswith(f", {len(nodes)} nodes")


def test_slider_stops_at_every_measured_size_and_starts_at_the_chosen_circuit() -> None:
    tables = invented.circuit_tables(12, 12, chosen=217)
    (picture,) = pictures(tables)
    assert picture.stops == sorted(set(picture.stops))
    assert picture.stops[picture.start] == 217
    assert {32, 65, 162, 325, 650, 1625, 3249} <= set(picture.stops)
    assert picture.stops[-1] == EDGES_IN_PAGE


def test_two_models_with_one_file_name_get_two_files() -> None:
    assert [picture.name for picture in pictures(invented.of_models(("step 1", "step-1"), 2, 2))] == ["circuit-step-1", "circuit-step-1-2"]
