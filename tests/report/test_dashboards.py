"""The page of a dictionary holds what the tables say, shows text as text, and can be searched, sorted and read by keys in both schemes."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.report.dashboards import DashboardPage
from mechscope.report.marks.dashboards import dashboard
from tests.report import synthetic, synthetic_dashboards
from tests.report.drawn import counts
from tests.report.test_page import CHROMIUM

NAME = "resid6-2000"


@pytest.fixture(scope="module")
def made() -> dict[str, pd.DataFrame]:
    return synthetic_dashboards.tables(120)


def test_a_page_holds_what_the_tables_say(made: dict[str, pd.DataFrame]) -> None:
    values = dashboard(NAME, made)
    latents, examples = made["dashboard_latents"], made["dashboard_examples"]
    assert values["columns"]["name"] == latents["component"].tolist()
    assert values["columns"]["density"] == pytest.approx(latents["density"].tolist(), rel=1e-3)
    assert values["columns"]["class"] == [each.replace("_", " ") for each in latents["class"]]
    packed, spelled = values["examples"], values["tokens"]
    assert counts(packed["counts"]).tolist() == examples.groupby("component", sort=False).size().tolist()
    ends = np.cumsum(counts(packed["lengths"]))
    tokens, levels = counts(packed["tokens"]), counts(packed["levels"])
    largest = latents.set_index("component")["largest"]
    words = made["dashboard_tokens"]["text"]
    for number, row in enumerate(examples.to_dict("records")):
        window = slice(ends[number] - 25, ends[number])
        assert [spelled[token] for token in tokens[window]] == [words[token] for token in row["ids"]]
        np.testing.assert_allclose(levels[window], np.array(row["values"]) / largest[row["component"]] * 255, atol=1)
        assert ((levels[window] > 0) == (np.array(row["values"]) > 0)).all()
        assert counts(packed["peak"])[number] == row["position"] - row["start"] == 16
        assert packed["texts"][counts(packed["text"])[number]] == row["text"]
    up = counts(values["promotes"]["tokens"]).reshape(-1, 8)
    assert [[spelled[token] for token in row] for row in up] == latents["promotes"].tolist()
    assert [each[1] for each in values["related"][3]] == made["dashboard_correlations"].query("component == 'resid6.f3'")["other"].tolist()


def test_a_weak_activation_is_seen_and_a_latent_without_examples_is_shown() -> None:
    made = synthetic_dashboards.tables(2)
    made["dashboard_examples"] = made["dashboard_examples"].head(1)
    values = [1e-4] + [0.0] * 23 + [float(made["dashboard_latents"]["largest"][0])]
    made["dashboard_examples"]["values"] = pd.Series([values])
    packed = dashboard(NAME, made)["examples"]
    assert counts(packed["levels"]).tolist() == [1, *[0] * 23, 255]
    assert counts(packed["counts"]).tolist() == [1, 0]
    alone = {"dashboard_latents": made["dashboard_latents"]}
    assert dashboard(NAME, alone)["examples"] is None


def hostile() -> dict[str, pd.DataFrame]:
    """Return a dashboard with markup in every text."""
    made = synthetic_dashboards.tables(3)
    nasty = list(synthetic.HOSTILE)
    made["dashboard_tokens"]["text"] = [nasty[token % len(nasty)] for token in made["dashboard_tokens"]["token"]]
    made["dashboard_examples"]["text"] = nasty[0]
    made["dashboard_correlations"]["other"] = nasty[1]
    latents = made["dashboard_latents"]
    latents["promotes"] = latents["suppresses"] = [nasty] * 3
    latents["class"] = latents["explanation"] = nasty[0]
    for table in made.values():
        if "dictionary" in table:
            table["dictionary"] = nasty[0]
    return made


def test_hostile_text_appears_nowhere_unescaped() -> None:
    page = DashboardPage(synthetic.HOSTILE[0], hostile())
    assert re.fullmatch(r"dashboard-[A-Za-z0-9._-]+", page.name)
    text = page.html()
    # three of data and the script itself
    assert text.count("<script") == 3
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, flags=re.S)
    held = json.loads(scripts[1])
    assert any("<" in token for token in held["tokens"])
    for nasty in synthetic.HOSTILE:
        if "<" in nasty:
            assert nasty not in text
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert html.escape(synthetic.HOSTILE[0]) in outside
    assert "://" not in (outside + scripts[2]).replace("http://www.w3.org/2000/svg", "")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")
def test_a_reader_can_search_sort_and_step_in_both_schemes(made: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    from tests.report.browser import STUCK, WIDE, browser, opened, turned, violations

    file = tmp_path / "page.html"
    file.write_text(DashboardPage(NAME, made).html(), encoding="utf-8")
    complaints: list[str] = []
    with browser() as context:
        page = opened(context, file, complaints)
        page.set_default_timeout(20_000)
        links = "[...document.querySelectorAll('.index a span:first-child')].map((each) => each.textContent)"
        assert page.evaluate(links) == made["dashboard_latents"]["component"].tolist()[:100]
        page.get_by_role("button", name="Show more").click()
        assert len(page.evaluate(links)) == 120
        page.get_by_label("Sort by").select_option("effect")
        order = made["dashboard_latents"]["effect"].abs().sort_values(ascending=False, kind="stable").index
        assert page.evaluate(links)[:5] == [f"resid6.f{latent}" for latent in order[:5]]
        page.get_by_label("Class").select_option("tuned only")
        own = made["dashboard_latents"].query("`class` == 'tuned_only'")
        assert set(page.evaluate(links)) == set(own["component"])
        page.get_by_label("Class").select_option("")
        page.get_by_label("Search").fill("WORD17")
        peaks = made["dashboard_examples"].query("decile == 0").assign(peak=lambda table: [ids[16] for ids in table["ids"]])
        wanted = {f" word{token}" for token in made["dashboard_tokens"]["token"] if f"word{token}".startswith("word17")}
        found = {row["component"] for row in peaks.to_dict("records") if f" word{row['peak']}" in wanted}
        found |= {row["component"] for row in made["dashboard_latents"].to_dict("records") if wanted & set(row["promotes"])}
        assert set(page.evaluate(links)) == found
        page.get_by_label("Search").fill("number 41 stands")
        assert page.evaluate(links) == ["resid6.f41"]
        page.get_by_label("Search").fill("resid6.f37")
        page.keyboard.press("Tab")
        page.get_by_role("link", name="resid6.f37", exact=False).first.press("Enter")
        assert page.locator("main h2").text_content() == "resid6.f37"
        assert page.locator(".stands-for").text_content() == "Stands for what number 37 stands for"
        examples = made["dashboard_examples"].query("component == 'resid6.f37'")
        assert page.locator(".examples li").count() == len(examples)
        shown = page.locator(".examples .window").first.text_content()
        first = examples.query("decile == 0").iloc[0]
        assert shown == "".join(made["dashboard_tokens"]["text"][token] for token in first["ids"])
        assert page.locator(".examples .window .peak").count() == len(examples)
        page.get_by_label("Search").fill("")
        page.get_by_label("Sort by").select_option("share")
        page.get_by_role("button", name="Next").click()
        page.wait_for_function("document.querySelector('main h2').textContent === 'resid6.f38'")
        for scheme, width in (("light", 1400), ("dark", 1400), ("dark", 420)):
            turned(page, width=width, scheme=scheme)
            assert violations(page) == []
            assert page.evaluate(WIDE) == []
            assert page.evaluate(STUCK) == []
        assert complaints == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")
def test_markup_in_tokens_runs_nothing_in_a_browser(tmp_path: Path) -> None:
    from tests.report.browser import browser, opened

    file = tmp_path / "page.html"
    file.write_text(DashboardPage(synthetic.HOSTILE[0], hostile()).html(), encoding="utf-8")
    complaints: list[Any] = []
    with browser() as context:
        page = opened(context, file, complaints)
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        for name in ("resid6.f1", "resid6.f2"):
            page.evaluate(f"window.location.hash = '{name}'")
            page.wait_for_function(f"document.querySelector('main h2').textContent === '{name}'")
        # the two libraries that the test injects are not counted
        assert page.evaluate("document.querySelectorAll('main script, nav script, img, iframe').length") == 0
        assert "<" in str(page.locator(".examples .window").first.text_content())
    assert complaints == []
