"""The page: self-contained, escaped, deterministic, and saying what the tables say."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mechscope.errors import RunError
from mechscope.report.contents import Contents
from mechscope.report.page import render
from mechscope.report.theme import interval, model_name, name_of, number, percent
from tests.report import synthetic
from tests.report.drawn import caveats_of, figures_of, findings_of, page_text

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The page as a browser's parser sees it: elements, visible text, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.visible: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "style":
            self.styles.append(data)
        else:
            self.visible.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.visible))

    def ids(self) -> set[str]:
        return {attributes["id"] or "" for _, attributes in self.elements if "id" in attributes}


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile_page(hostile_run: Path) -> Page:
    return Page((hostile_run / "report.html").read_text(encoding="utf-8"))


def test_nothing_on_the_page_points_outside_it(page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "data", "poster", "formaction"):
            assert (attributes.get(name) or "#").startswith("#"), f"<{tag} {name}={attributes[name]}>"


def test_no_style_fetches_anything(page: Page) -> None:
    assert not re.search(r"@import|url\(", "".join(page.styles))


def test_policy_forbids_every_request_and_every_foreign_script(page: Page) -> None:
    (policy,) = [a["content"] or "" for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in page.scripts[1:]]
    assert rules["script-src"] == hashes


def test_page_of_a_twelve_by_twelve_model_stays_below_three_megabytes(run: Path) -> None:
    assert (run / "report.html").stat().st_size < 3e6


def test_claims_show_statement_measurement_paper_and_verdict(page: Page) -> None:
    for claim in synthetic.claims_table().to_dict("records"):
        for column in ("statement", "measured", "paper", "verdict"):
            assert re.sub(r"\s+", " ", claim[column]) in page.text
    assert "−0.00600[−0.0100, −0.00200]" in page.text.replace(" [", "[")


def test_badge_of_a_verdict_is_coloured_by_it(page: Page) -> None:
    badges = [(a["class"] or "").split()[1] for tag, a in page.elements if tag == "span" and (a.get("class") or "").startswith("badge ")]
    assert badges == list(synthetic.claims_table()["verdict"])


def test_every_contents_entry_leads_somewhere(page: Page) -> None:
    links = {(a["href"] or "")[1:] for tag, a in page.elements if tag == "a" and a.get("href")}
    assert links <= page.ids()


def test_settings_versions_command_and_data_problems_are_told(page: Page) -> None:
    for text in ("2.13.0", "models/gpt2-news-7m", "--out 'runs/my run'", "duplicate", "2026-01-02 03:04", "limit: 200"):
        assert text in page.text


def test_tables_about_one_kind_of_query_rows_follow_the_switch(page: Page) -> None:
    switched = [attributes for tag, attributes in page.elements if tag == "div" and "data-rows" in attributes]
    assert [attributes["data-rows"] for attributes in switched] == ["all", "document", "summary"] * 2  # heads and layers
    assert [attributes["data-rows"] for attributes in switched if "hidden" not in attributes] == ["all"] * 2
    choices = [attributes["value"] for tag, attributes in page.elements if tag == "input" and attributes.get("name") == "query-rows"]
    assert choices == ["all", "document", "summary"]


def test_first_screen_has_at_most_eight_large_numbers(page: Page) -> None:
    cards = [attributes for tag, attributes in page.elements if tag == "div" and attributes.get("class") == "card"]
    assert 3 < len(cards) <= 8


def test_sample_shows_every_models_summary_beside_the_reference(page: Page) -> None:
    row = synthetic.summaries_table(1).iloc[0]
    for column in ("document", "reference", "base", "tuned", "standard_lora"):
        assert row[column].strip() in page.text


def test_rouge_of_each_model_is_told_with_its_interval(page: Page) -> None:
    score = synthetic.rouge_table().iloc[-1]
    assert f"{number(score['mean'])}{interval(score['low'], score['high'])}" in page.text.replace(" [", "[")


@pytest.mark.parametrize("text", [text for text in synthetic.HOSTILE if "<" in text or "'" in text])
def test_hostile_text_is_shown_as_text(hostile_page: Page, text: str) -> None:
    assert re.sub(r"\s+", " ", text) in hostile_page.text


def test_hostile_text_makes_no_element_and_no_handler(hostile_page: Page, page: Page) -> None:
    assert {tag for tag, _ in hostile_page.elements} <= {tag for tag, _ in page.elements}
    assert not [a for _, attributes in hostile_page.elements for a in attributes if a.startswith("on")]
    assert len(hostile_page.scripts) == 3


def test_hostile_text_appears_nowhere_unescaped(hostile_run: Path) -> None:
    written = (hostile_run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in written
    assert "<img src=x" not in written
    assert "7*7" in written  # a template expression in a document stays what it is
    assert "{{ 49" not in written


def test_hostile_text_is_escaped_in_exported_figures(hostile_run: Path) -> None:
    for svg in (hostile_run / "figures").glob("*.svg"):
        assert "<script" not in svg.read_text(encoding="utf-8")


def test_equal_tables_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    again = Contents.read(synthetic.write_run(tmp_path / "again", synthetic.tables()))
    assert page_text(again) == (run / "report.html").read_text(encoding="utf-8")
    for figure in figures_of(again.tables):
        assert figure.svg() == (run / "figures" / f"{figure.name}.svg").read_text(encoding="utf-8"), figure.name


def test_a_difference_without_bakeoff_says_how_to_get_one(tmp_path: Path) -> None:
    made = {name: table for name, table in synthetic.tables(4, 4).items() if name in ("heads", "layers", "weights", "outputs")}
    found = Page(render(synthetic.write_run(tmp_path / "run", made)).read_text(encoding="utf-8"))
    assert "mechscope bakeoff" in found.text
    assert {"bakeoff", "claims", "heads"} <= found.ids()
    assert not [i for i in found.ids() if i.startswith(("rouge", "learning"))]


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    folder = synthetic.write_run(tmp_path / "run", {})
    with pytest.raises(RunError, match="holds no table to report on"):
        render(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        render(tmp_path)


def test_a_table_without_a_needed_column_is_named(tmp_path: Path) -> None:
    made = {"heads": synthetic.tables(2, 2)["heads"].drop(columns="entropy_change_q")}
    with pytest.raises(RunError, match=r"heads\.parquet lacks entropy_change_q"):
        render(synthetic.write_run(tmp_path / "run", made))


def _loss(low: float, high: float) -> str:
    outputs = synthetic.outputs_table().assign(loss_change_low=low, loss_change_high=high)
    return " ".join(findings_of({"outputs": outputs}))


def test_the_loss_fell_only_where_its_interval_lies_below_zero() -> None:
    assert "tokens fell" in _loss(-0.2, -0.1)
    assert "is not shown to have changed" in _loss(-0.2, 0.1)
    assert "tokens rose" in _loss(0.1, 0.2)


def test_what_fine_tuning_did_to_the_loss_on_documents_is_said_beside_that_on_summaries() -> None:
    outputs = synthetic.outputs_table()
    dear = outputs["rows"] == "document"
    outputs.loc[dear, ["loss_base", "loss_tuned", "loss_change", "loss_change_low", "loss_change_high"]] = [1.35, 3.02, 1.67, 1.6, 1.7]
    first, second, _ = findings_of({"outputs": outputs})
    assert "the summaries' tokens fell: 3.58 nats per token before fine-tuning, 3.02 after" in first
    assert "the documents' tokens rose: 1.35 nats per token before fine-tuning, 3.02 after (+1.67 [+1.60, +1.70]" in second
    assert len(findings_of({"outputs": outputs[~dear]})) == 2


def test_sentences_name_the_layer_and_count_the_significant_heads() -> None:
    tables = synthetic.tables()
    heads = tables["heads"].query("rows == 'all'")
    top = tables["layers"].query("rows == 'all'").nlargest(1, "kl_base_tuned")["layer"].iloc[0]
    text = " ".join(findings_of(tables))
    assert "moved their attention by more than 0.0080 nats of mean KL, the smallest effect of interest" in text
    assert f"the largest change is that of layer {top}, " in text
    assert f"{(heads['entropy_change_verdict'] == 'changed').sum()} of 144 heads changed their attention entropy" in text


def test_few_documents_and_few_seeds_are_told() -> None:
    tables = synthetic.tables(2, 2)
    few = {
        "heads": tables["heads"].assign(n=7),
        "bakeoff_summary": tables["bakeoff_summary"].assign(withheld="too few seeds: 1 of at least 3"),
    }
    text = " ".join(caveats_of(few))
    assert "Only 7 documents" in text
    assert "Nothing is said of other trainings, too few seeds: 1 of at least 3" in text


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.01234, "0.0123"),
        (-0.5, "−0.500"),
        (294912, "294,912"),
        (1e-30, "1.00e−30"),
        (np.nan, "–"),
        (None, "–"),
        (np.inf, "∞"),
        (0.0, "0.00"),
        (3, "3"),
    ],
)
def test_numbers_are_written_to_three_digits(value: object, written: str) -> None:
    assert number(value) == written


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("gpt2", "gpt2"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B-Base", "Qwen3-0.6B-Base"),
        ("../data/newsroom/model/", "newsroom/model"),
        ("/scratch/me/runs/samsum/models/tuned", "samsum/models/tuned"),
        ("runs/pegasus-x/checkpoint-500", "pegasus-x/checkpoint-500"),
        ("/models/Final", "/models/Final"),
        ("model", "model"),
        (".", "."),
    ],
)
def test_a_model_is_called_by_the_part_of_its_source_that_says_which(source: str, name: str) -> None:
    assert model_name(source) == name


def test_an_interval_with_a_missing_end_is_not_written() -> None:
    assert interval(0.1, np.nan) == ""
    assert interval(-0.1, 0.25, sign=True) == "[−0.100, +0.250]"
    assert percent(0.62) == "62\u202f%"
    assert percent(-0.62) == "−62\u202f%"
    assert percent(-1e-3) == "0\u202f%"


def test_a_label_is_one_line_without_direction_marks() -> None:
    assert name_of("a\u2028b\u202ec_d") == "a b c d"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")
@pytest.mark.parametrize("which", ["run", "hostile_run"])
def test_a_browser_draws_every_chart_under_the_policy(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(which)
    command = [
        *(
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
        ),
        *(
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path}",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
        ),
        *("--window-size=1300,2000", "--dump-dom", (folder / "report.html").as_uri()),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    errors = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    assert errors == []
    assert 'data-charts="drawn"' in ran.stdout
    charts = len(pd.Series([a for tag, a in Page((folder / "report.html").read_text()).elements if "data-figure" in a]))
    assert ran.stdout.count('class="marks"') == charts > 20
