"""The attribution graph in a browser: by keyboard a node is selected with its edges, pinned, grouped, and the groups are saved as `--groups` reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mechscope.features import Dictionary, Rule, transcoder
from mechscope.studies.attribution_graphs import read_groups
from mechscope.studies.jobs.features_graph import JOB
from tests import families
from tests.features.oracle import dictionary
from tests.report.browser import browser, opened, violations
from tests.report.test_page import CHROMIUM
from tests.studies.jobs.running import run

PROMPT = "w5 w9 w30 w7 w9 w12"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to move in the graph with")
def test_nodes_are_selected_pinned_grouped_and_saved_by_keyboard(tmp_path: Path) -> None:
    for layer in range(families.LAYERS):
        given: Dictionary = dictionary(transcoder(layer, families.WIDTH, 30, Rule("topk", 5)), seed=layer)
        given.save(tmp_path / "transcoders" / f"t{layer}.safetensors")
    result = run(JOB, tmp_path / "run", dictionary=str(tmp_path / "transcoders"), prompt=PROMPT, node_share=0.97, interventions=2)
    nodes, edges = result.graph_nodes.set_index("node"), result.graph_edges
    complaints: list[str] = []
    with browser() as context:
        page = opened(context, tmp_path / "run" / "report.html", complaints)
        card, stage = page.locator("[data-attribution-graph]"), page.locator(".graph-scroll")
        assert card.locator("svg .edges path").count() == min(80, len(edges))
        stage.focus()
        page.keyboard.press("ArrowRight")
        first = card.get_attribute("data-chosen")
        assert first is not None
        assert nodes.loc[first, "kind"] == "logit"
        # the edges drawn are those of the node that is selected
        for key in ("ArrowDown", "ArrowDown", "ArrowDown"):
            page.keyboard.press(key)
            chosen = card.get_attribute("data-chosen")
            own = edges[(edges["source"] == chosen) | (edges["target"] == chosen)]
            assert card.locator("svg .edges path").count() == len(own)
            assert card.locator("svg .node.near").count() == len({*own["source"], *own["target"]})
            page.keyboard.press("p")
        pinned = card.locator("svg .node.pinned").count()
        assert pinned == 3
        page.get_by_label("Name of a new group").fill("mine")
        page.get_by_role("button", name="Group the pinned nodes").click()
        assert card.locator("svg .ring").count() == 3
        with page.expect_download() as download:
            page.get_by_role("button", name="Save groups").click()
        download.value.save_as(tmp_path / "groups.json")
        page.keyboard.press("Escape")
        assert complaints == []
        assert violations(page, contrast=False) == []
    ((name, members),) = read_groups(str(tmp_path / "groups.json"), PROMPT)
    assert name == "mine"
    assert set(members) <= set(nodes.index[nodes["kept"]])
    assert len(members) == 3
    assert json.loads((tmp_path / "groups.json").read_text(encoding="utf-8"))["prompt"] == PROMPT
