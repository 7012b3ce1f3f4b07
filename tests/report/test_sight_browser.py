"""The page as it meets the eye, the keyboard and a screen reader: every section, at three widths, by day and by night."""

from __future__ import annotations

from typing import Any

import pytest

from tests.report.browser import CHARTS, RAGGED, SIGNS, STUCK, UNNAMED, WIDE, browser, opened, turned, violations
from tests.report.drawn import page_of
from tests.report.test_page import CHROMIUM
from tests.report.test_sections import everything

WIDTHS = (1400, 1000, 390)
# in an order in which each differs from the one before in one thing
STATES = [*(("light", width) for width in WIDTHS), *(("dark", width) for width in reversed(WIDTHS))]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Return what was found in every state of one page, and what the browser complained of."""
    folder = tmp_path_factory.mktemp("sight")
    file = folder / "page.html"
    file.write_text(page_of(everything(), folder), encoding="utf-8")
    complaints: list[str] = []
    found: dict[Any, Any] = {"complaints": complaints}
    with browser() as context:
        page = opened(context, file, complaints)
        found["signs"], found["ragged"] = page.evaluate(SIGNS), page.evaluate(RAGGED)
        for scheme, width in STATES:
            turned(page, width=width, scheme=scheme)
            # colours are those of the scheme, whatever the width
            axe = violations(page, contrast=width == WIDTHS[0])
            found[scheme, width] = {"wide": page.evaluate(WIDE), "stuck": page.evaluate(STUCK), **page.evaluate(CHARTS), "axe": axe}
        found["unnamed"] = page.evaluate(UNNAMED)
        page.emulate_media(media="print", color_scheme="dark")
        found["print"] = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('nav')).display]"
        )
    return found


@pytest.mark.parametrize(("scheme", "width"), STATES)
def test_axe_core_objects_to_nothing(seen: dict[Any, Any], scheme: str, width: int) -> None:
    assert seen[scheme, width]["axe"] == []


@pytest.mark.parametrize(("scheme", "width"), STATES)
def test_nothing_is_wider_than_the_screen_but_boxes_that_keys_can_scroll(seen: dict[Any, Any], scheme: str, width: int) -> None:
    assert seen[scheme, width]["wide"] == []
    assert seen[scheme, width]["stuck"] == []


@pytest.mark.parametrize(("scheme", "width"), STATES)
def test_texts_of_charts_neither_meet_nor_are_cut_off(seen: dict[Any, Any], scheme: str, width: int) -> None:
    assert seen[scheme, width]["met"] == []


@pytest.mark.parametrize(("scheme", "width"), STATES)
def test_texts_of_charts_stand_out_from_what_is_behind_them(seen: dict[Any, Any], scheme: str, width: int) -> None:
    assert seen[scheme, width]["faint"] == []


def test_every_chart_is_a_picture_with_a_name_and_a_description(seen: dict[Any, Any]) -> None:
    assert seen["unnamed"] == []


def test_browser_complains_of_nothing(seen: dict[Any, Any]) -> None:
    assert seen["complaints"] == []


def test_numbers_have_a_true_minus_and_a_narrow_space_before_per_cent(seen: dict[Any, Any]) -> None:
    assert seen["signs"] == []


def test_columns_of_numbers_are_set_to_the_right_in_figures_of_equal_width(seen: dict[Any, Any]) -> None:
    assert seen["ragged"] == []


def test_paper_is_white_and_has_no_contents_list(seen: dict[Any, Any]) -> None:
    assert seen["print"] == ["rgb(255, 255, 255)", "none"]
