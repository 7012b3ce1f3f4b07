"""A figure of the report: one Vega-Lite definition that becomes a chart of the page, an SVG file and a PNG file.

The definition is made with altair and holds its own numbers, rounded to six significant digits (more would be noise, and the page's weight).
It says "as wide as the place I am put in"; a file has no such place, so export sets the width and adds the title that the page writes as
HTML. vl-convert draws the files: no browser, no network.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from altair.utils import schemapi

from mechscope.report.theme import LIGHT, label

# characters of a title in one line, some six pixels each: beside a low chart, or under one, and above one, on a telephone
_LINES = {"x": 34, "y": 34, "legend": 40}


@dataclass(frozen=True)
class Figure:
    """A named chart with the words around it.

    Attributes:
        name: File name without extension and the element's id in the page; lower case, digits and hyphens.
        title: What is shown, with its unit.
        caption: How to read it.
        spec: The Vega-Lite definition, its width left to the place it is put in.
        width: Width of the drawing in the exported files, in pixels.
        max_width: Width beyond which the chart does not grow in the page, in pixels; None for all there is.
        wide: Whether the page gives it a whole row.
    """

    name: str
    title: str
    caption: str
    spec: dict[str, Any] = field(repr=False)
    width: int = 460
    max_width: int | None = None
    wide: bool = False

    @property
    def datasets(self) -> dict[str, list[dict[str, Any]]]:
        """The figure's numbers by the name its definition calls them, which is a hash: equal numbers have equal names in all figures."""
        return dict(self.spec.get("datasets", {}))

    def page_spec(self) -> dict[str, Any]:
        """Return the definition without its numbers, which the page holds once for all figures that share them."""
        return {key: value for key, value in self.spec.items() if key != "datasets"} | {"datasets": sorted(self.datasets)}

    def export(self) -> dict[str, Any]:
        """Return the definition that stands alone: title, width and colours included."""
        spec = copy.deepcopy(self.spec)
        spec["title"] = {"text": self.title, "subtitle": _wrap(self.caption, max(40, self.width // 6))}
        # maps of many small panels have the width of their panels
        if "facet" not in spec:
            spec["width"] = self.width
        spec["config"] = LIGHT | {"legend": LIGHT["legend"] | {"columns": 4 if self.width > 560 else 2}}
        return spec

    def svg(self) -> str:
        """Draw as SVG; equal figures give equal text."""
        drawn = str(vl_convert.vegalite_to_svg(self.export()))
        # Vega counts gradients and clips from one figure of the process to the next
        found = dict.fromkeys(re.findall(r' id="([A-Za-z_]+\d+)"', drawn))
        numbered = {name: f"{name.rstrip('0123456789')}{i}" for i, name in enumerate(found)}
        return re.sub(r'( id="|url\(#|href="#)([A-Za-z_]+\d+)', lambda match: match[1] + numbered.get(match[2], match[2]), drawn)


def png(svg: str) -> bytes:
    """Turn a drawn figure into a PNG at twice the pixel density, fit for print and for dense screens."""
    return bytes(vl_convert.svg_to_png(svg, scale=2))


def script_json(value: object) -> str:
    """Return `value` as JSON in which nothing can end or open an HTML element, comment or line of JavaScript."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class Numbers:
    """The numbers of one figure, by names that are their hashes, so that figures with equal numbers can share them.

    They are kept beside the altair chart rather than in it, because altair checks every number against the schema of Vega-Lite, which takes
    longer than all the rest of a report.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.datasets: dict[str, list[dict[str, Any]]] = {}

    def add(self, table: pd.DataFrame, columns: Sequence[str]) -> Any:
        """Take these columns of `table`, numbers rounded and what is not finite as null, and return them as an altair data source."""
        # in one order, or figures that list the same columns differently would not share them
        columns = sorted(columns)
        rows = [
            {name: _plain(value) for name, value in zip(columns, row, strict=True)}
            for row in table[columns].itertuples(index=False, name=None)
        ]
        name = f"data-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}"
        self.datasets[name] = rows
        return alt.NamedData(name=name)


def definition(chart: Any, numbers: Numbers, *, description: str) -> dict[str, Any]:
    """Return the Vega-Lite definition of an altair chart, its numbers included.

    Args:
        chart: The chart; every encoding states its type, since named data have none. Charts of panels keep their panels' width.
        numbers: What its data sources name.
        description: What a screen reader says.
    """
    fixed = isinstance(chart, alt.FacetChart)
    width = {} if fixed else {"width": "container"}
    spec: dict[str, Any] = chart.properties(description=description, **width).to_dict(format="vega-lite", validate=schemapi.DEBUG_MODE)
    # altair's own defaults are replaced by the page's
    spec.pop("config", None)
    _break_titles(spec)
    spec["datasets"] = dict(numbers.datasets)
    if not fixed:
        spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Draw charts without checking them against Vega-Lite's schema, which takes longer than all the rest; a test checks those of every section."""
    with schemapi.debug_mode(False):
        yield


def _break_titles(part: Any) -> None:
    """Break the titles of axes and legends, wherever they stand in a definition, into lines that fit on a telephone."""
    if isinstance(part, list):
        for each in part:
            _break_titles(each)
    elif isinstance(part, dict):
        for name, inner in part.items():
            if name in _LINES and isinstance(inner, dict) and isinstance(inner.get("title"), str):
                lines = _wrap(inner["title"], _LINES[name])
                inner["title"] = lines if len(lines) > 1 else lines[0]
            _break_titles(inner)


def _plain(value: Any) -> Any:
    """Return a JSON scalar: numbers with six significant digits, None for what is missing or infinite."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return None if value is None or value is pd.NA else label(value)


def _wrap(text: str, width: int) -> list[str]:
    """Break `text` into lines of at most `width` characters, at spaces."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
