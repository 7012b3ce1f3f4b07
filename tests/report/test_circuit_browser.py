"""The slider of a circuit in a browser: it shows the strongest edges with the faithfulness of that many."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from mechscope.report.marks.circuit_picture import owner
from mechscope.report.marks.circuit_slider import pictures
from tests.report import synthetic_circuits as invented
from tests.report.circuit_pages import by_title
from tests.report.test_page import CHROMIUM

DRIVER = """
const card = document.querySelector("[data-circuit]"), slider = card.querySelector("input"), button = card.querySelector("button");
const every = [...card.querySelectorAll("svg.circuit .edge")];
// checkVisibility says true of what was taken out of an SVG in the same task
const visible = (element) => {
  for (let one = element; one !== card; one = one.parentElement) if (getComputedStyle(one).display === "none") return false;
  return true;
};
const seen = (stage) => {
  const nodes = [...card.querySelectorAll(".node")].filter(visible);
  return { stage, value: slider.valueAsNumber, size: card.querySelector("[data-size]").textContent,
    faithful: card.querySelector("[data-faithful]").textContent, random: card.querySelector("[data-random]").textContent,
    note: card.querySelector("[data-note]").textContent, mark: card.querySelector(".mark").getAttribute("transform"),
    nodes: nodes.map((node) => node.dataset.node), edges: every.flatMap((edge, i) => (visible(edge) ? [i] : [])) };
};
{
  const driven = [seen("first")];
  for (const stop of STOPS) {
    slider.value = stop;
    slider.dispatchEvent(new Event("input"));
    driven.push(seen("moved"));
  }
  button.click();
  driven.push(seen("back"));
  const met = every.findLast(visible), middle = met.getPointAtLength(met.getTotalLength() / 2);
  card.scrollIntoView({ behavior: "instant" }); // the page scrolls smoothly: the pointer would come before the card
  const at = new DOMPoint(middle.x, middle.y).matrixTransform(met.getScreenCTM());
  card.querySelector("svg.circuit").dispatchEvent(new PointerEvent("pointermove", { clientX: at.x, clientY: at.y, bubbles: true }));
  driven.push({ stage: "hover", tip: document.querySelector(".circuit-tip").textContent });
  const out = document.createElement("output");
  out.id = "driven";
  out.textContent = JSON.stringify(driven);
  document.body.append(out);
}
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to move the slider with")
def test_slider_shows_the_strongest_edges_with_the_faithfulness_of_that_many(diff_run: Path, tmp_path: Path) -> None:
    (base, _) = pictures(invented.diff_tables(4, 4))
    stops, names = base.data()["stops"], list(by_title(base.page_svg()))
    measured = next(i for i, stop in enumerate(stops) if i > len(stops) // 2 and stop["note"] == "Measured at this size.")
    between = next(i for i, stop in enumerate(stops) if i > measured and stop["note"].startswith("Between the measured sizes"))
    script = DRIVER.replace("STOPS", json.dumps([measured, between]))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = (diff_run / "report.html").read_text(encoding="utf-8")
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

    assert {names[i] for i in first["edges"]} == set(base.circuit["edge"])
    assert set(first["nodes"]) == {*base.circuit["sender"], *map(owner, base.circuit["receiver"])}
    assert {key: back[key] for key in back if key != "stage"} == {key: first[key] for key in first if key != "stage"}

    # what a stop says is written in Python and tested there: here, that the page says it beside the edges it is about
    for shown, stop in ((at, stops[measured]), (after, stops[between])):
        wanted = base.edges.head(stop["edges"])
        assert [names[i] for i in shown["edges"]][::-1] == list(wanted["edge"])
        assert set(shown["nodes"]) == {*wanted["sender"], *map(owner, wanted["receiver"])}
        assert {key: shown[key] for key in ("size", "faithful", "random", "note")} == {
            key: stop[key] for key in ("size", "faithful", "random", "note")
        }
        assert shown["mark"] == f"translate({stop['mark']:g} 0)"
    assert at["size"].startswith(f"The {stops[measured]['edges']:,} strongest of {len(base.edges):,} edges")

    assert "score" in hover["tip"]
    assert "[" in hover["tip"]
