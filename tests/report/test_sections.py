"""What every section of the page promises: it is told, owns its tables alone, describes their columns, and copes with what a run lacks."""

from __future__ import annotations

import itertools
import re
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from mechscope.report.documentation import tables_page
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.tables import Shown
from mechscope.report.section import Panel, Section
from mechscope.report.sections import sections, table_specs
from mechscope.report.statements import Card, Finding
from tests.report import synthetic, synthetic_circuits, synthetic_reading
from tests.report.drawn import caveats_of, figures_of, findings_of, shown_of, view_of, views_of
from tests.report.measured import measured_tables
from tests.report.synthetic_causal import effects_table

DOCS = Path(__file__).parents[2] / "docs" / "tables.md"
# beyond so many optional columns only single ones and all of them are left out
_ALL_SUBSETS = 4


@cache
def everything() -> dict[str, pd.DataFrame]:
    """Return every table of a run: measured on a tiny model, and where that would take long, invented."""
    return {
        **measured_tables(),
        **synthetic.tables(4, 4),
        **synthetic_reading.all_tables(),
        **synthetic_circuits.diff_tables(4, 4),
        **synthetic_circuits.time_tables(),
        "effects": effects_table(),
    }


def every(section: Section, tables: dict[str, pd.DataFrame]) -> None:
    """Make all that a section shows, and check that it is what it should be."""
    for figure in section.figures(tables):
        assert isinstance(figure, Figure)
        assert re.fullmatch(r"[a-z0-9-]+", figure.name)
    for panel in section.panels(tables):
        assert isinstance(panel, Panel)
    for shown in section.views(tables):
        assert isinstance(shown, Shown)
        assert all(len(row) == len(shown.view.columns) for row in shown.view.rows)
    for finding in section.findings(tables):
        assert isinstance(finding, Finding)
        if finding.card is not None:
            assert isinstance(finding.card, Card)
            assert finding.card.value
            assert finding.card.label
    for sentence in (*(finding.sentence for finding in section.findings(tables)), *(caveat.text for caveat in section.caveats(tables))):
        assert re.fullmatch(r".+\.", sentence)
        assert "nan" not in sentence.split()


@pytest.mark.parametrize("section", sections().values(), ids=lambda section: section.id)
def test_a_section_has_an_anchor_a_heading_and_an_introduction(section: Section) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9-]*", section.id)
    assert section.heading
    assert re.fullmatch(r".+[.:]", section.intro)


@pytest.mark.parametrize("section", sections().values(), ids=lambda section: section.id)
def test_a_section_copes_with_each_of_its_tables_alone(section: Section) -> None:
    needed = {name: everything()[name] for name in section.reads}
    for name in section.tables:
        if name in everything():
            every(section, {**needed, name: everything()[name]})


@pytest.mark.parametrize("section", sections().values(), ids=lambda section: section.id)
def test_a_section_copes_without_any_of_its_optional_columns(section: Section) -> None:
    every(section, everything())
    for name, spec in section.tables.items():
        if name not in everything():
            continue
        table = everything()[name]
        described = spec.listed()
        # the numbered columns are one: those of rank 2 come with those of rank 1
        numbered = tuple(column for column in table if column not in described)
        may_lack = [(column,) for column in table if column in described and described[column].optional] + [numbered] * bool(numbered)
        counts = range(1, len(may_lack) + 1) if len(may_lack) <= _ALL_SUBSETS else (1, len(may_lack))
        for lacking in itertools.chain.from_iterable(itertools.combinations(may_lack, count) for count in counts):
            every(section, {**everything(), name: table.drop(columns=list(itertools.chain(*lacking)))})


def test_no_table_is_owned_twice() -> None:
    owners = [name for section in sections().values() for name in section.tables]
    assert len(owners) == len(set(owners)) == len(table_specs())


@pytest.mark.parametrize("name", table_specs())
def test_every_column_of_a_table_is_described(name: str) -> None:
    spec, table = table_specs()[name], everything()[name]
    assert [column for column in table if not spec.knows(str(column))] == []
    assert [column for column in spec.required if column not in table] == []


@pytest.mark.parametrize("name", table_specs())
def test_a_description_says_what_a_row_is_and_what_a_column_holds(name: str) -> None:
    spec = table_specs()[name]
    assert spec.row
    assert all(column.meaning for column in (*spec.columns.values(), *spec.numbered.values()))


def test_every_invented_table_is_described() -> None:
    assert set(everything()) <= set(table_specs())


def test_the_page_of_tables_is_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == tables_page(), "write it again: python -m mechscope.report.documentation > docs/tables.md"


def test_every_chart_keeps_to_the_schema_of_vega_lite() -> None:
    made = everything()
    # unlike `drawn`, which does not check
    for section in shown_of(made):
        for figure in section.figures(made):
            assert figure.spec["description"]


def test_the_gain_is_said_with_the_other_sets_beside_it() -> None:
    (sentence,) = findings_of({"layer_sets": everything()["layer_sets"]})
    assert "carry 62\u202f% of the gain; 4 other sets of as many layers carry 20\u202f% to 50\u202f%" in sentence
    assert "+27.0 points [+20.0, +34.0]; n = 24 documents)." in sentence


def test_who_carries_the_gain_is_drawn_by_layer_and_by_head() -> None:
    drawn = {figure.name: figure for figure in figures_of({"cross_model": everything()["cross_model"]})}
    assert set(drawn) == {"gain-by-layer-activations", "gain-by-layer-weights", "gain-by-head-into-base", "gain-by-head-into-tuned"}


def test_the_cost_of_the_selected_heads_stands_beside_that_of_random_sets() -> None:
    ablation = everything()["ablation"]
    view = view_of(views_of({"ablation": ablation}), "Ablating the selected heads").view
    assert [row[0].text for row in view.rows] == ["selected heads", "40 random sets, same layers"]
    assert view.rows[0][1].sort == pytest.approx(0.9)
    assert view.rows[1][1].sort == pytest.approx(ablation.loc[ablation["kind"] == "random", "effect"].mean())


def test_pairs_of_models_alone_are_not_drawn_without_their_layers() -> None:
    assert figures_of({"pairs": everything()["pairs"]}) == []


def test_caveats_of_several_sections_are_the_same_words_where_they_say_the_same() -> None:
    few = {name: everything()[name].assign(n=7) for name in ("heads", "layers", "outputs")}
    assert len({caveat for caveat in caveats_of(few) if caveat.startswith("Only")}) == 1
