"""How cost grows: every factor is measured alone, exponents are those of known growth, and the page gets both tables; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.cli import main
from benchmarks.scaling import FACTORS, Point, arithmetic, blocks, constants, points, slope
from benchmarks.settings import BenchmarkError

from benchmarks import scaling

HEAD = {"date": "today", "command": "scale", "machine": {"cpu": "a CPU", "cores": 2, "load": 0.1}, "versions": {"torch": "2"}}


def record(point: Point) -> dict[str, object]:
    """Return a record of a cost that grows with the square of the tokens and of memory that does not grow."""
    seconds = 2.0 * point.tokens**2 * point.documents / point.ranks
    memory = 0.5 + 3 * point.per_batch * point.tokens * 64 * point.heads / scaling.GIB
    return {
        **vars(point),
        "seconds": seconds,
        "weights_seconds": 5.0,
        "plain_seconds": seconds / (1 + point.tokens / 512),
        "memory_gib": memory,
    }


def test_every_factor_is_varied_alone():
    for name in FACTORS:
        chosen = [point for point in points() if point.factor == name]
        assert len(chosen) >= 2
        others = {tuple(value for field, value in vars(point).items() if field != name) for point in chosen}
        assert len(others) == 1, name


def test_an_exponent_is_that_of_a_known_growth():
    chosen = [record(point) for point in points() if point.factor == "tokens"]
    assert slope(chosen, "tokens", "seconds") == pytest.approx(2)
    ranks = [record(point) for point in points() if point.factor == "ranks"]
    assert slope(ranks, "ranks", "seconds") == pytest.approx(-1)
    assert slope(ranks, "ranks", "memory_gib") == pytest.approx(0)


def test_the_constants_are_read_off_the_points():
    ratio, per_width, per_weight = constants([record(point) for point in points()])
    assert ratio == pytest.approx(3)  # at 1,024 tokens, which the arithmetic is about
    assert per_width == pytest.approx(3)
    assert per_weight == pytest.approx(5 / ((8 * 12 * 512**2 + 5000 * 512) * 512))


def test_the_arithmetic_follows_from_the_constants():
    row = next(line for line in arithmetic(2.0, 100.0, 1e-9).splitlines() if line.startswith("| 7B"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "25 GiB"  # 2 models × 2 bytes × 6.7e9
    assert cells[2] == "6.2 GiB"  # 100 bytes × 16,384 tokens × 4,096
    hours = 2 * 2 * 6.7e9 * 1024 * 1e5 * 2.0 / 3.3e14 / 3600
    assert cells[5] == f"{hours:.0f}"
    assert cells[6].startswith("8 ranks")
    assert cells[7] == f"{1e-9 * 6.7e9 * 4096 / 3600:.1f}"


@pytest.mark.slow
def test_a_point_measures_a_real_difference_alone_and_by_two_ranks():
    tiny = Point(layers=1, heads=1, vocabulary=50, documents=4, tokens=16, per_batch=2)
    found = scaling.measured(tiny)
    assert found["seconds"] > 0
    assert found["weights_seconds"] > 0
    assert found["plain_seconds"] > 0
    two = scaling.measure_apart(Point(**{**vars(tiny), "ranks": 2}))
    assert two["ranks"] == 2
    assert two["seconds"] > 0
    assert two["plain_seconds"] == 0  # passes of one process only have a ratio


def test_the_page_gets_both_tables_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / "scaling.md"
    page.write_text(
        "before\n<!-- generated: scaling -->\nold\n<!-- end -->\nbetween\n<!-- generated: large -->\nold\n<!-- end -->\nafter\n"
    )
    monkeypatch.setattr(scaling, "measure_apart", record)
    assert main(["scale", "--out", str(tmp_path / "scaling.json"), "--page", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text
    assert all(word in text for word in ("before", "between", "after", "exponent of documents' time", "| 70B |", "Assumed, not measured"))
    assert "by 2 ranks is" in text
    page.write_text(text.replace("exponent", "old"))
    assert main(["scale", "--read", str(tmp_path / "scaling.json"), "--page", str(page)]) == 0
    assert page.read_text() == text, "the page can be written again from the file"
    assert blocks(HEAD, [record(point) for point in points()]).keys() == {"scaling", "large"}


def test_what_was_measured_before_a_point_failed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails_at_layers(point: Point) -> dict[str, object]:
        if point.factor == "layers":
            raise BenchmarkError("scaling, layers: killed")
        return record(point)

    monkeypatch.setattr(scaling, "measure_apart", fails_at_layers)
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- generated: {name} -->\n<!-- end -->\n" for name in scaling.BLOCKS), encoding="utf-8")
    assert main(["scale", "--out", str(tmp_path / "scaling.json"), "--page", str(page)]) == 2
    kept = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))["records"]
    assert [one["tokens"] for one in kept] == list(FACTORS["tokens"][1])
