"""What a notebook shows of a run: the page's sentences, tables and figures, nothing drawn or worded anew."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import altair as alt
import pandas as pd
import pytest

import mechscope
from mechscope.errors import RunError
from mechscope.report import notebook
from mechscope.report.contents import Contents, read_tables
from mechscope.report.summary import Summary
from mechscope.store.run import RunFolder
from mechscope.studies.job import Result
from tests.report import synthetic


def result_of(folder: Path) -> Result:
    """Return a rendered run as its job returned it."""
    held = RunFolder.read(folder)
    return Result(folder, folder / "report.html", read_tables(folder), held.settings, held.manifest)


class Text(HTMLParser):
    """Collects the text and the elements of a fragment."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.feed(fragment)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_result_shows_the_verdict_and_the_findings_of_its_page(run: Path) -> None:
    result = result_of(run)
    contents = Contents.read(run)
    summary = Summary.of(contents)
    sentences = [finding.sentence for finding in (*summary.verdict, *(finding for group in summary.groups for finding in group.findings))]
    assert len(sentences) > 5
    shown = Text(result._repr_html_()).words
    lines = repr(result).splitlines()
    for sentence in dict.fromkeys(sentences):
        # once: a finding that is the verdict is not said again
        assert shown.count(sentence) == 1
        assert sum(line.removeprefix("• ") == sentence for line in lines) == 1
    assert lines[0] == contents.title
    assert f"heads ({len(result.heads)} × {result.heads.shape[1]})" in lines[-2]
    assert lines[-1] == f"run: {run}"


def test_a_result_that_left_nothing_on_disk_names_no_folder(run: Path) -> None:
    held = result_of(run)
    assert "run:" not in repr(Result(held.path, None, held.tables, held.settings, held.manifest))


def test_hostile_text_stays_text(hostile_run: Path) -> None:
    shown = Text(result_of(hostile_run)._repr_html_())
    plain = {"div", "p", "strong", "small", "ul", "li", "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert {tag for tag, _ in shown.elements} <= plain
    assert not any(attributes for _, attributes in shown.elements)
    assert synthetic.HOSTILE[0] in "".join(shown.words)


def test_a_plot_is_the_figure_of_the_page(run: Path) -> None:
    result = result_of(run)
    figures, plots = notebook.figures(result.tables), result.plots
    assert set(plots) == {file.stem for file in (run / "figures").glob("*.svg")} - {"circuit-base", "circuit-tuned"}
    for name in ("attention-kl", "layer-kl"):
        chart = result.plot(name)
        drawn, page = chart.to_dict(), figures[name].export()
        assert isinstance(chart, alt.TopLevelMixin)
        assert drawn["title"]["text"] == plots[name]
        assert drawn["datasets"] == page["datasets"]
        assert {key: drawn.get(key) for key in ("width", "config", "title")} == {key: page.get(key) for key in ("width", "config", "title")}


def test_a_plot_that_there_is_not_is_refused_with_those_there_are(run: Path) -> None:
    result = result_of(run)
    with pytest.raises(RunError, match=r"no figure 'atention-kl', did you mean 'attention-kl'\?.*layer-kl \("):
        result.plot("atention-kl")
    with pytest.raises(RunError, match=r"there are \d+ figures: name one of"):
        result.plot()
    with pytest.raises(RunError, match="no figure is drawn of these tables"):
        mechscope.plot({"unknown": pd.DataFrame({"a": [1]})})


def test_tables_without_a_run_are_drawn_too(run: Path) -> None:
    layers = result_of(run).layers
    chart = mechscope.plot({"layers": layers}, "layer-kl")
    (rows,) = chart.to_dict()["datasets"].values()
    assert {row["layer"] for row in rows} == set(layers["layer"])
    with pytest.raises(RunError, match=re.escape("table 'layers' lacks layer")):
        mechscope.plot({"layers": layers.drop(columns="layer")}, "layer-kl")
