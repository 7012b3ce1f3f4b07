"""The slider of a circuit in a browser: it shows the strongest edges with the faithfulness of that many."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from mechscope.report.circuit_picture import owner
from mechscope.report.circuit_slider import pictures
from tests.report import synthetic_circuits as invented
from tests.report.test_page import CHROMIUM


def held(page: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="circuits">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(text)


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
