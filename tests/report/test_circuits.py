"""The picture of a circuit, its slider and the sections of circuit runs: they draw the tables' own edges and numbers, escaped, under the policy."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mechscope.circuits.graph import Graph
from mechscope.errors import RunError
from mechscope.report.circuit_picture import HARMS, HOLDS, Grid, circuit_svg, owner
from mechscope.report.circuit_slider import EDGES_DRAWN, EDGES_IN_PAGE, pictures
from mechscope.report.circuit_summary import circuit_sentences
from mechscope.report.circuit_views import summary_view
from mechscope.report.circuits import circuit_figures
from mechscope.report.page import render
from tests.report import synthetic
from tests.report import synthetic_circuits as invented
from tests.report.test_page import CHROMIUM, Page

SVG = "{http://www.w3.org/2000/svg}"


def some_edges(*names: str, scores: list[float] | None = None) -> pd.DataFrame:
    sender, receiver = zip(*(name.split("->") for name in names), strict=True)
    return pd.DataFrame({"edge": names, "sender": sender, "receiver": receiver, "score": scores or [-0.5] * len(names)})


def drawn_edges(svg: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter(f"{SVG}path") if "edge" in element.get("class", "").split()]


def drawn_nodes(svg: str) -> list[str]:
    found = [element for element in ElementTree.fromstring(svg).iter(f"{SVG}g") if element.get("class") == "node"]
    return [element.get("data-node", "") for element in found if element.get("display") != "none"]


def by_title(svg: str) -> dict[str, ElementTree.Element]:
    titled = {element: element.find(f"{SVG}title") for element in drawn_edges(svg)}
    return {str(title.text).splitlines()[0]: element for element, title in titled.items() if title is not None}


def run_of(tmp_path: Path, kind: str, tables: dict[str, pd.DataFrame]) -> Path:
    settings: dict[str, object] = {"model": "models/gpt2"} if kind == "circuit" else {"base": "models/gpt2", "tuned": "runs/tuned"}
    folder = synthetic.write_run(tmp_path / "run", tables, study=settings, record=synthetic.manifest() | {"kind": kind})
    render(folder)
    return folder


@pytest.fixture(scope="module")
def diff_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("circuits"), "circuit-diff", invented.diff_tables(4, 4))


def held(page: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="circuits">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(text)


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


def test_each_figure_is_there_only_with_its_table() -> None:
    tables = invented.diff_tables(4, 4) | {"circuit_time": invented.time_tables()["circuit_time"]}
    wanted = {
        "circuit_curve": {"circuit-faithfulness"},
        "circuit_overlap": {"circuit-overlap-nodes", "circuit-overlap-edges"},
        "circuit_shift": {"circuit-shift"},
        "circuit_gain": {"circuit-gain"},
        "circuit_time": {"circuit-time", "circuit-size-time"},
        "circuit_components": set[str](),
    }
    for name, figures in wanted.items():
        assert {figure.name for section in circuit_figures({name: tables[name]}).values() for figure in section} == figures


def rows_of(figure: object, *columns: str) -> list[dict]:
    return [row for rows in getattr(figure, "datasets").values() for row in rows if set(columns) <= set(row)]  # noqa: B009


def test_faithfulness_is_drawn_beside_random_circuits_and_without_the_empty_one() -> None:
    tables = invented.diff_tables(4, 4)
    (figure,) = circuit_figures({"circuit_curve": tables["circuit_curve"]})["circuit"]
    found = {(row["series"], row["kind"], row["edges"]): (row["value"], row["low"], row["high"]) for row in rows_of(figure, "value")}
    for row in tables["circuit_curve"].to_dict("records"):
        for kind, columns in (("circuit", ("faithfulness", "low", "high")), ("random circuits", ("random", "random_low", "random_high"))):
            key = (row["model"], kind, row["edges"])
            if row["edges"] == 0:
                assert key not in found
            else:
                assert found[key] == pytest.approx(tuple(row[column] for column in columns), rel=1e-5)


def test_overlap_is_drawn_with_chance_and_with_each_models_own_noise() -> None:
    overlap = invented.diff_tables(4, 4)["circuit_overlap"]
    figures = {figure.name: figure for figure in circuit_figures({"circuit_overlap": overlap})["circuit-change"]}
    row = overlap[(overlap["what"] == "edges") & (overlap["fraction"] == 0.01)].iloc[0]
    found = {each["series"]: each["value"] for each in rows_of(figures["circuit-overlap-edges"], "value") if each["fraction"] == 0.01}
    assert found == pytest.approx(
        {
            "base and tuned": row["jaccard"],
            "base and tuned, halves": row["across"],
            "base, halves": row["self_base"],
            "tuned, halves": row["self_tuned"],
            "random circuits": row["null"],
        },
        rel=1e-5,
    )


def test_shift_cell_is_the_mean_size_of_the_shifts_between_two_layers() -> None:
    shift = invented.diff_tables(4, 4)["circuit_shift"]
    (figure,) = circuit_figures({"circuit_shift": shift})["circuit-change"]
    found = {(row["sender"], row["receiver"]): row["mean"] for row in rows_of(figure, "mean")}
    for ends, (sender, receiver) in {("1", "3"): (1, 3), ("input", "0"): (-1, 0), ("2", "logits"): (2, 4)}.items():
        own = shift[(shift["sender_layer"] == sender) & (shift["receiver_layer"] == receiver)]
        assert found[ends] == pytest.approx(own["shift"].abs().mean(), rel=1e-5)
    assert ("3", "1") not in found


def test_a_ratio_far_outside_is_drawn_at_the_edge_and_said() -> None:
    curve = invented.circuit_tables(2, 2)["circuit_curve"]
    curve.loc[7, "random"] = -40.0
    (figure,) = circuit_figures({"circuit_curve": curve})["circuit"]
    assert "run from -40 to 1" in figure.caption


def test_change_is_claimed_only_beyond_noise() -> None:
    overlap = invented.diff_tables(4, 4)["circuit_overlap"]
    assert "changed the circuit more than noise" in circuit_sentences({"circuit_overlap": overlap}, [])[0]
    noisy = overlap.assign(change_low=-0.01)
    assert "no change beyond noise was shown" in circuit_sentences({"circuit_overlap": noisy}, [])[0]
    unknown = overlap.drop(columns=["across", "change", "change_low", "change_high"])
    assert "noise" not in circuit_sentences({"circuit_overlap": unknown}, [])[0]


def test_what_was_not_measured_is_left_out_rather_than_drawn() -> None:
    tables = invented.circuit_tables(2, 2)
    numbers = ["faithfulness", "low", "high", "random", "random_low", "random_high"]
    tables["circuit_curve"][numbers] = np.nan
    tables["circuit_summary"].loc[0, ["value", "low", "high"]] = np.nan
    (picture,) = pictures(tables)
    assert circuit_figures({"circuit_curve": tables["circuit_curve"]}) == {}
    assert picture.curve_svg() == ""
    assert picture.faithfulness_words() == ("not measured", "not measured")


def test_random_circuits_of_the_chosen_size_come_from_the_curve_where_the_summary_has_none() -> None:
    tables = invented.circuit_tables(12, 12, chosen=325)
    tables["circuit_summary"].loc[0, ["random", "random_low", "random_high"]] = np.nan
    (picture,) = pictures(tables)
    assert picture.chosen is not None
    assert picture.chosen["random"] == pytest.approx(0.01**1.5, rel=1e-9)


def test_measures_of_all_models_stand_side_by_side_with_random_circuits() -> None:
    summary = invented.diff_tables(4, 4)["circuit_summary"]
    summary.loc[(summary["model"] == "tuned") & (summary["measure"] == "CPR"), "value"] = 0.5
    view = summary_view(summary)
    assert view.columns == ("measure", "base", "tuned")
    lines = {row[0].text: row[1:] for row in view.rows}
    assert [cell.text for cell in lines["edges"]] == ["200", "260"]
    (cpr,) = (cells for name, cells in lines.items() if name.startswith("CPR"))
    assert [cell.sort for cell in cpr] == [0.742, 0.5]
    assert cpr[0].note == "[0.700, 0.780] · random 0.310 [0.280, 0.350]"


def test_sentence_tells_size_and_faithfulness_of_the_circuit() -> None:
    tables = invented.circuit_tables(12, 12)
    (sentence,) = circuit_sentences({name: tables[name] for name in ("circuit_edges", "circuit_summary")}, pictures(tables))
    assert "200 of 32,491 edges (0.62\u202f%)" in sentence
    assert "0.861 [0.812, 0.903]" in sentence


def test_page_of_one_circuit_shows_its_sections_and_misses_no_other(tmp_path: Path) -> None:
    tables = invented.circuit_tables(4, 4)
    folder = run_of(tmp_path, "circuit", tables)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert {"circuit", "circuit-components", "circuit-model"} <= page.ids()
    assert not {"circuit-change", "circuit-time", "heads", "claims", "bakeoff"} & page.ids()
    assert "Not part of this run" not in page.text
    assert "The circuit of gpt2" in page.text
    svg = (folder / "figures" / "circuit-model.svg").read_text(encoding="utf-8")
    assert len(drawn_edges(svg)) == tables["circuit_edges"]["in_circuit"].sum() > 100
    assert (folder / "figures" / "circuit-model.png").read_bytes().startswith(b"\x89PNG")


def test_page_of_checkpoints_shows_every_circuit_and_its_way_over_training(tmp_path: Path) -> None:
    page = Page((run_of(tmp_path, "circuit", invented.time_tables(2, 2)) / "report.html").read_text(encoding="utf-8"))
    assert {"circuit-step-0", "circuit-step-100", "circuit-step-1000", "circuit-final", "circuit-time"} <= page.ids()


def test_a_study_with_circuits_shows_them_beside_its_other_sections(tmp_path: Path) -> None:
    tables = {name: table for name, table in synthetic.tables(4, 4).items() if name in ("heads", "layers")}
    page = Page(
        (run_of(tmp_path, "summarization", {**tables, **invented.circuit_tables(4, 4)}) / "report.html").read_text(encoding="utf-8")
    )
    assert {"heads", "layers", "claims", "circuit"} <= page.ids()
    assert "circuit-change" not in page.ids()


def test_equal_tables_give_an_equal_page(diff_run: Path, tmp_path: Path) -> None:
    again = run_of(tmp_path, "circuit-diff", invented.diff_tables(4, 4))
    assert (again / "report.html").read_bytes() == (diff_run / "report.html").read_bytes()
    assert (again / "figures" / "circuit-base.svg").read_bytes() == (diff_run / "figures" / "circuit-base.svg").read_bytes()


def test_markup_in_a_token_is_text(diff_run: Path) -> None:
    written = (diff_run / "report.html").read_text(encoding="utf-8")
    page = Page(written)
    assert "<script>alert(" not in written
    assert invented.TOKENS in page.text
    assert "b" not in {tag for tag, _ in page.elements}


def test_markup_in_a_models_name_is_text(tmp_path: Path) -> None:
    nasty = synthetic.HOSTILE[1]
    folder = run_of(tmp_path, "circuit", {name: table.assign(model=nasty) for name, table in invented.circuit_tables(2, 2).items()})
    written = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(" not in written
    assert len(Page(written).scripts) == 4
    (picture,) = (file for file in (folder / "figures").glob("circuit-*.svg") if "faithfulness" not in file.name)
    assert "<script" not in picture.read_text(encoding="utf-8")


def test_policy_allows_the_pages_scripts_and_no_other(diff_run: Path) -> None:
    page = Page((diff_run / "report.html").read_text(encoding="utf-8"))
    (policy,) = [a["content"] or "" for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    # the first two hold numbers, not code
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in page.scripts[2:]]
    assert re.findall(r"'sha256-[^']*'", policy) == hashes
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]


DRIVER = """
const card = document.querySelector("[data-circuit]"), slider = card.querySelector("input"), button = card.querySelector("button");
const seen = (stage) => {
  const groups = [...card.querySelectorAll("svg.circuit .edges")].filter((group) => !group.hasAttribute("display"));
  const edges = groups.flatMap((group) => [...group.querySelectorAll(".edge")]);
  const nodes = [...card.querySelectorAll(".node")].filter((node) => !node.hasAttribute("display"));
  return { stage, value: slider.valueAsNumber, size: card.querySelector("[data-size]").textContent,
    faithful: card.querySelector("[data-faithful]").textContent, random: card.querySelector("[data-random]").textContent,
    note: card.querySelector("[data-note]").textContent, mark: card.querySelector(".mark").getAttribute("d"),
    nodes: nodes.map((node) => node.dataset.node), edges: edges.map((edge) => [edge.dataset.ends.replace(" ", "->"), edge.getAttribute("d"),
      edge.getAttribute("stroke-width"), edge.getAttribute("stroke")]) };
};
{
  const found = [seen("first")];
  for (const stop of STOPS) {
    slider.value = stop;
    slider.dispatchEvent(new Event("input"));
    found.push(seen("moved"));
  }
  button.click();
  found.push(seen("back"));
  const met = card.querySelector(".edges .edge:last-child"), middle = met.getPointAtLength(met.getTotalLength() / 2);
  card.scrollIntoView();
  const at = new DOMPoint(middle.x, middle.y).matrixTransform(met.getScreenCTM());
  card.querySelector("svg.circuit").dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y, bubbles: true }));
  found.push({ stage: "hover", tip: document.querySelector(".circuit-tip").textContent });
  const out = document.createElement("output");
  out.id = "driven";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to move the slider with")
def test_slider_shows_the_strongest_edges_with_the_faithfulness_of_that_many(diff_run: Path, tmp_path: Path) -> None:
    text = (diff_run / "report.html").read_text(encoding="utf-8")
    model = held(diff_run / "report.html")["models"][0]
    measured = model["stops"].index(model["curve"]["edges"][-3])
    middle = math.sqrt(model["curve"]["edges"][-3] * model["curve"]["edges"][-2])
    between = min(range(len(model["stops"])), key=lambda i: abs(model["stops"][i] - middle))
    script = DRIVER.replace("STOPS", json.dumps([measured, between]))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page, _, end = text.replace("script-src ", f"script-src 'sha256-{allowed}' ", 1).rpartition("</body>")
    driven = f"{page}<script>{script}</script></body>{end}"
    (tmp_path / "driven.html").write_text(driven, encoding="utf-8")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'user'}"),
        *("--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1300,2000", "--dump-dom"),
        (tmp_path / "driven.html").as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    (output,) = re.findall(r'<output id="driven">(.*?)</output>', ran.stdout, flags=re.S)
    first, at, after, back, hover = json.loads(output.replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))

    (base, _) = pictures(invented.diff_tables(4, 4))
    assert {name for name, *_ in first["edges"]} == set(base.circuit["edge"])
    assert {key: back[key] for key in back if key != "stage"} == {key: first[key] for key in first if key != "stage"}

    count = model["stops"][measured]
    wanted = base.edges.head(count)
    assert [name for name, *_ in at["edges"]][::-1] == list(wanted["edge"])
    assert set(at["nodes"]) == {*wanted["sender"], *map(owner, wanted["receiver"])}
    assert at["size"].startswith(f"The {count:,} strongest of {len(base.edges):,} edges")
    place = model["curve"]["edges"].index(count)
    assert at["faithful"].startswith(f"{model['curve']['faithfulness'][place]:.3f}"[:4])
    assert at["note"] == "Measured at this size."

    # between two measured sizes: linear in the logarithm of the number of edges
    more = model["stops"][between]
    lower = max(i for i, edges in enumerate(model["curve"]["edges"]) if edges <= more)
    a, b = model["curve"]["edges"][lower : lower + 2]
    share = math.log(more / a) / math.log(b / a)
    expected = (1 - share) * model["curve"]["faithfulness"][lower] + share * model["curve"]["faithfulness"][lower + 1]
    assert float(after["faithful"].split()[0]) == pytest.approx(expected, abs=6e-4)
    assert after["note"].startswith("Between the measured sizes")
    assert float(after["mark"][1:].split()[0]) > float(at["mark"][1:].split()[0])

    # the page's script and the file draw one and the same curve, to a rounded tenth of a pixel
    static = {name: (path, width, colour) for name, path, width, colour in first["edges"]}
    numbers = {name: [float(x) for x in re.findall(r"-?[\d.]+", path)] for name, (path, *_) in static.items()}
    shared = [edge for edge in after["edges"] if edge[0] in static]
    assert len(shared) > 20
    for name, path, width, colour in shared:
        assert [float(x) for x in re.findall(r"-?[\d.]+", path)] == pytest.approx(numbers[name], abs=0.11)
        assert float(width) == pytest.approx(float(static[name][1]), abs=2e-3)
        assert colour == static[name][2]

    assert "score" in hover["tip"]
    assert "[" in hover["tip"]
