"""Lens grids and token attention in a browser: they draw a window, say what the tables say, follow the keys, and break no policy."""

from __future__ import annotations

import base64
import hashlib
import html as markup
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.report.marks.packed import shown
from mechscope.report.theme import number
from tests.report import synthetic_reading as invented
from tests.report.drawn import hostile, page_of
from tests.report.test_page import CHROMIUM

POSITIONS = 400

DRIVER = """
(async () => {
  const seen = {}, tip = document.querySelector(".reading-tip"), at = (selector) => document.querySelector(selector);
  const text = (element) => element.hidden ? null : [...element.querySelectorAll("td, th")].map((cell) => cell.textContent);
  const press = (element, ...keys) => { for (const key of keys) element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true })); };
  const pick = (words, value) => {
    const box = [...document.querySelectorAll(".pick")].find((label) => label.textContent.startsWith(words)).querySelector("select");
    box.value = value;
    box.dispatchEvent(new Event("change"));
  };
  const card = at("[data-lens-grid]"), cells = card.querySelector(".cells"), slider = card.querySelector("input[type=range]");
  const painted = (canvas) => new Set(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).size;
  seen.first = card.dataset.window;
  press(cells, "Home");
  seen.home = { window: card.dataset.window, heading: tip.querySelector("p").textContent, cells: text(tip) };
  press(cells, "ArrowRight", "ArrowRight", "ArrowDown");
  seen.moved = { heading: tip.querySelector("p").textContent, cells: text(tip), live: at("[aria-live]").textContent };
  press(cells, "End");
  seen.end = { window: card.dataset.window, heading: tip.querySelector("p").textContent };
  press(cells, "Escape");
  seen.escaped = text(tip);
  pick("Positions", 2);
  slider.value = 100;
  slider.dispatchEvent(new Event("input"));
  seen.slid = card.dataset.window;
  seen.painted = painted(cells);
  for (const [i, name] of [[0, "base"], [1, "tuned"], [2, "difference"]]) {
    card.querySelectorAll("[name=lens-model-0]")[i].click();
    for (let measure = 0; measure < 4; measure += 1) {
      pick("Colour", measure);
      seen[`legend ${name} ${measure}`] = card.querySelector(".legend").textContent;
    }
  }
  const area = cells.getBoundingClientRect();
  cells.dispatchEvent(new PointerEvent("pointermove", { clientX: area.left + 120, clientY: area.top + 90, bubbles: true }));
  seen.hover = tip.hidden ? null : tip.querySelector("p").textContent;
  cells.dispatchEvent(new PointerEvent("pointermove", { clientX: area.left + 2, clientY: area.top + 2, bubbles: true }));
  seen.beside = tip.hidden;

  const flows = [...document.querySelectorAll(".flow")], words = at("[data-token-attention]");
  const keys = () => [...words.querySelectorAll(".keys tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
  const lit = (flow) => [...flow.querySelectorAll("span")].filter((span) => span.style.background).map((span) => Number(span.dataset.at)).sort((a, b) => a - b);
  seen.spans = flows.map((flow) => flow.querySelectorAll("[data-at]").length);
  flows[0].querySelector('[data-at="60"]').click();
  seen.clicked = { query: words.dataset.query, keys: keys(), lit: flows.map(lit), marked: flows.map((flow) => flow.querySelector(".query").dataset.at) };
  flows[1].querySelector('[data-at="30"]').dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  seen.over = words.dataset.query;
  flows[1].dispatchEvent(new PointerEvent("pointerleave"));
  seen.left = words.dataset.query;
  press(flows[0], "ArrowRight");
  seen.next = words.dataset.query;
  press(flows[0], "End");
  seen.last = words.dataset.query;
  const flow = flows[0].getBoundingClientRect(), query = flows[0].querySelector(".query").getBoundingClientRect();
  seen.visible = query.top >= flow.top && query.bottom <= flow.bottom + 1;
  pick("Head", 1);
  flows[0].querySelector('[data-at="60"]').click();
  seen.other = keys();
  const out = document.createElement("output");
  out.id = "driven";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
})();
"""


def opened(text: str, tmp_path: Path, script: str = "") -> tuple[str, list[str]]:
    """Return the page's elements after its scripts, and this one, ran, and what the browser complained of."""
    if script:
        allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        page, _, end = text.replace("script-src ", f"script-src 'sha256-{allowed}' ", 1).rpartition("</body>")
        text = f"{page}<script>{script}</script></body>{end}"
    file = tmp_path / "opened.html"
    file.write_text(text, encoding="utf-8")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'user'}"),
        *("--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1300,2000", "--dump-dom", file.as_uri()),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return ran.stdout, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    lens = invented.lens_tables(4, 2, positions=POSITIONS, texts=("samsum-0001",), lenses=("logit",))
    return {**lens, **invented.heads_tables(4, 4, positions=POSITIONS)}


@pytest.fixture(scope="module")
def driven(tables: dict[str, pd.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium to look at the page with")
    folder = tmp_path_factory.mktemp("driven")
    elements, complaints = opened(page_of(tables, folder), folder, DRIVER)
    assert complaints == []
    assert 'data-charts="drawn"' in elements
    (output,) = re.findall(r'<output id="driven">(.*?)</output>', elements, flags=re.S)
    seen: dict[str, Any] = json.loads(markup.unescape(output))
    return seen


def cell_of(tables: dict[str, pd.DataFrame], model: str, component: str, position: int) -> dict[Any, Any]:
    grid = tables["lens_grid"]
    (row,) = grid[(grid["model"] == model) & (grid["component"] == component) & (grid["position"] == position)].to_dict("records")
    return row


def test_grid_opens_one_position_before_the_summary(driven: dict[str, Any], tables: dict[str, pd.DataFrame]) -> None:
    first = int(tables["lens_tokens"].query("segment == 'summary'")["position"].min())
    assert driven["first"] == f"{first - 1} {first + 11}"


def test_keys_move_over_the_grid_and_the_window_follows(driven: dict[str, Any], tables: dict[str, pd.DataFrame]) -> None:
    tokens = tables["lens_tokens"].query("text == 'samsum-0001'").set_index("position")["token"]
    assert driven["home"]["window"] == "0 12"
    assert driven["home"]["heading"].startswith(f"{tokens[0]} → {shown(tokens[1]).replace(' ', '␣')}position 0, resid3")
    assert "position 2, resid2" in driven["moved"]["heading"]
    assert driven["end"]["window"] == f"{POSITIONS - 12} {POSITIONS}"
    assert f"position {POSITIONS - 1}, resid2" in driven["end"]["heading"]
    assert driven["escaped"] is None
    assert driven["slid"] == "100 164"


def test_hint_tells_both_models_numbers_and_likeliest_tokens(driven: dict[str, Any], tables: dict[str, pd.DataFrame]) -> None:
    cells = driven["moved"]["cells"]
    assert cells[:3] == ["", "base", "tuned"]
    told = {cells[i]: cells[i + 1 : i + 3] for i in range(3, 15, 3)}
    rows = [cell_of(tables, model, "resid2", 2) for model in ("base", "tuned")]
    assert told["rank of the next token"] == [f"{row['rank']:,}" for row in rows]
    for name, column in (("probability of the next token", "probability"), ("entropy", "entropy"), ("KL to the final prediction", "kl")):
        for text, row in zip(told[name], rows, strict=True):
            assert float(text.removesuffix(" nats").replace("e−", "e-")) == pytest.approx(row[column], rel=0.01)
    for rank in range(5):
        tops = cells[15 + 3 * rank + 1 : 15 + 3 * rank + 3]
        for text, row in zip(tops, rows, strict=True):
            token, _, share = text.rpartition(" ")
            assert token == shown(row[f"top_{rank + 1}"]).replace(" ", "␣")
            assert float(share.replace("e−", "e-")) == pytest.approx(row[f"p_{rank + 1}"], rel=0.01)
    assert driven["moved"]["live"].startswith("resid2, position 2, ")


def test_colours_are_of_the_measure_and_the_models_asked_for(driven: dict[str, Any]) -> None:
    assert driven["painted"] > 50
    assert driven["legend base 0"].startswith("probability of the next token0")
    assert driven["legend tuned 2"].startswith("entropy0")
    assert driven["legend base 1"].endswith("101")
    assert driven["legend difference 3"].startswith("KL to the final prediction, tuned − base−")
    assert "tenfolds nearer to rank 1" in driven["legend difference 1"]


def test_hovering_tells_a_cell_and_nothing_beside_the_grid(driven: dict[str, Any]) -> None:
    assert "position 10" in driven["hover"]
    assert driven["beside"] is True


def test_query_lights_its_keys_in_both_models(driven: dict[str, Any], tables: dict[str, pd.DataFrame]) -> None:
    edges = tables["attention_edges"].query("text == 'samsum-0001' and component == 'a1.h0' and query == 60")
    assert driven["spans"] == [POSITIONS, POSITIONS]
    clicked = driven["clicked"]
    assert clicked["query"] == "60"
    assert clicked["marked"] == ["60", "60"]
    for model, lit in zip(("base", "tuned"), clicked["lit"], strict=True):
        assert lit == sorted(edges.loc[edges["model"] == model, "key"])
    weights = edges.pivot(index="key", columns="model", values="weight")
    order = weights.max(axis=1).sort_values(ascending=False, kind="stable").head(8)
    assert [int(row[1]) for row in clicked["keys"]] == order.index.tolist()
    for _, key, base, tuned in clicked["keys"]:
        for text, model in ((base, "base"), (tuned, "tuned")):
            weight = float(str(weights.loc[int(key), model]))
            assert (text == "–") is math.isnan(weight)
            if not math.isnan(weight):
                assert float(text) == pytest.approx(weight, rel=0.01), number(weight)


def test_hovering_shows_another_query_until_the_pointer_leaves(driven: dict[str, Any]) -> None:
    assert (driven["over"], driven["left"]) == ("30", "60")


def test_keys_choose_the_query_and_its_box_scrolls_to_it(driven: dict[str, Any]) -> None:
    assert (driven["next"], driven["last"]) == ("61", str(POSITIONS - 1))
    assert driven["visible"] is True


def test_another_head_shows_its_own_keys(driven: dict[str, Any], tables: dict[str, pd.DataFrame]) -> None:
    edges = tables["attention_edges"].query("text == 'samsum-0001' and component == 'a2.h1' and query == 60")
    assert {int(row[1]) for row in driven["other"]} <= set(edges["key"])
    assert driven["other"] != driven["clicked"]["keys"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")
def test_markup_in_tokens_runs_nothing_in_a_browser(tmp_path: Path) -> None:
    made = hostile(invented.all_tables(2, 2, positions=12))
    kept = {name: made[name] for name in ("lens_grid", "lens_tokens", "attention_tokens", "attention_edges")}
    script = 'document.querySelector(".cells").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));'
    elements, complaints = opened(page_of(kept, tmp_path), tmp_path, script)
    assert complaints == []
    assert 'data-lens="drawn"' in elements
    assert 'data-attention="drawn"' in elements
    assert "&lt;script&gt;alert(2)" in elements
    assert elements.count("<script") == 6  # three of data, the libraries, the page's own, the test's
