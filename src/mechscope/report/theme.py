"""How the report looks: colours, chart defaults, and how numbers and names are written.

One Vega-Lite configuration per colour scheme (light, dark) carries every colour that does not mean a thing by itself, so a figure's
definition says what is drawn and the page decides on which ground. Colours that do mean a thing (a fine-tuning strategy, a direction of
change) are fixed here, once, and are told apart by readers with any colour vision: Okabe and Ito's set for categories (doi
10.5281/zenodo.3381072), viridis for magnitudes, blue–orange around zero for changes. Wherever a colour carries meaning a shape, a position or
a word carries it too.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

# Okabe–Ito without its yellow, which vanishes on white; ordered so that neighbours differ in lightness as well.
CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#B8A100")

STRATEGY_COLOURS = {
    "standard": "#0072B2",
    "targeted_layers": "#D55E00",
    "targeted_heads": "#E69F00",
    "more_rank": "#CC79A7",
    "circuit": "#7E57C2",
    "circuit_rank": "#9C6B4E",
    "random_layers": "#8C8C8C",
    "random_circuit": "#5E7285",
    "last_layers": "#56B4E9",
    "full": "#009E73",
    "none": "#B8A100",
}
STRATEGY_NAMES = {
    "standard": "standard LoRA",
    "targeted_layers": "targeted layers",
    "targeted_heads": "targeted heads",
    "more_rank": "more rank, targeted",
    "circuit": "circuit",
    "circuit_rank": "more rank, circuit",
    "random_layers": "random layers",
    "random_circuit": "random circuits",
    "last_layers": "last layers",
    "full": "full fine-tuning",
    "none": "no fine-tuning",
}
PROTOCOL_NAMES = {"equal_rank": "equal rank", "equal_parameters": "equal parameters", "reference": "reference"}
METRIC_NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
RULE_NAMES = {
    "layers_by_kl": "layers by attention KL",
    "layers_by_write": "layers by what they write",
    "layers_by_score": "layers by combined score",
    "heads_by_kl": "heads by attention KL",
    "heads_by_entropy": "heads by |entropy change|",
    "heads_by_write": "heads by what they write",
    "heads_by_score": "heads by combined score",
}
TOKENS = {"all": "all tokens", "document": "the documents' tokens", "summary": "the summaries' tokens"}
ROWS_NAMES = {"all": "all tokens", "document": "article", "summary": "summary"}

PAPER = "arXiv 2505.17073"
PAPER_IN_FULL = f"“Mechanistic Interpretability of GPT-like Models on Summarization Tasks”, {PAPER}, https://arxiv.org/abs/2505.17073"

# No name of a part of a model comes near this, in characters; only broken or hostile ones exceed it. The Parquet tables have them whole.
_LONGEST_LABEL = 160

# What a folder of weights is called whatever the model: mechscope's own runs, and the habits of others.
_SAYS_NOTHING = re.compile(r"models?|tuned|base|lora|adapter|output|final|last|best|checkpoint-?\d*", re.IGNORECASE)

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', 'DejaVu Sans', Arial, sans-serif"

_LIGHT = {"ink": "#1c2530", "soft": "#5b6672", "line": "#c9d0d8", "grid": "#eceff3", "accent": "#111111"}
_DARK = {"ink": "#e7ecf2", "soft": "#a3afbc", "line": "#48525e", "grid": "#2b333d", "accent": "#ffffff"}

# Diverging: blue is more focused (below zero), orange more diffuse. The midpoint is the ground, so that "no change" recedes.
_DIVERGING_LIGHT = ["#08519c", "#3f8fc5", "#9cc9e1", "#f4f4f2", "#fdc48a", "#ee7f26", "#a63e04"]
_DIVERGING_DARK = ["#8cc8f2", "#4292c6", "#1d5b8f", "#242b33", "#8f4a14", "#e0761f", "#ffc27d"]
# Sequential: nothing recedes into the ground and much stands out from it, hence the reversed direction on a dark page.
_SEQUENTIAL_LIGHT = ["#f7f6ee", "#d3e8b5", "#8fd0a8", "#43ab9b", "#2a7b8e", "#38598c", "#440154"]
_SEQUENTIAL_DARK = ["#1d2129", "#3b2a66", "#38598c", "#2a7b8e", "#2fae8a", "#8fd55c", "#fde725"]

# as `number` and `percent` write them; the minus is a true one by itself
_NUMBERS = {"decimal": ".", "thousands": ",", "grouping": [3], "currency": ["", ""], "percent": "\u202f%"}


def _config(colours: dict[str, str], diverging: list[str], sequential: list[str], background: str | None) -> dict[str, Any]:
    text = {"labelColor": colours["soft"], "titleColor": colours["ink"], "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": 600}
    return {
        "background": background,
        "font": FONT,
        "locale": {"number": _NUMBERS},
        "padding": 4,
        "view": {"stroke": None, "continuousWidth": 420, "continuousHeight": 230},
        "axis": {
            **text,
            "domainColor": colours["line"],
            "tickColor": colours["line"],
            "gridColor": colours["grid"],
            "labelOverlap": "greedy",
            "labelLimit": 190,
            "titlePadding": 8,
        },
        "axisBand": {"grid": False, "domain": False, "ticks": False, "labelPadding": 5},
        "legend": {
            **text,
            "orient": "top",
            "titleAnchor": "start",
            "labelLimit": 190,
            "symbolStrokeWidth": 0,
            "symbolOpacity": 1,
            "columnPadding": 14,
            "offset": 8,
        },
        "title": {
            "color": colours["ink"],
            "subtitleColor": colours["soft"],
            "anchor": "start",
            "fontSize": 15,
            "subtitleFontSize": 11.5,
            "offset": 12,
        },
        "text": {"color": colours["ink"]},
        "range": {"category": list(CATEGORIES), "diverging": diverging, "heatmap": sequential, "ramp": sequential},
        "style": {
            "outline": {"stroke": colours["accent"], "strokeWidth": 2, "fillOpacity": 0},
            "mark": {"fill": colours["ink"], "stroke": colours["ink"]},
            "zero": {"stroke": colours["soft"], "strokeWidth": 1, "strokeDash": [4, 3]},
            "note": {"fill": colours["soft"], "fontSize": 11},
        },
    }


LIGHT: dict[str, Any] = _config(_LIGHT, _DIVERGING_LIGHT, _SEQUENTIAL_LIGHT, "#ffffff")
"""Configuration of the exported figures and of the page by day."""

DARK: dict[str, Any] = _config(_DARK, _DIVERGING_DARK, _SEQUENTIAL_DARK, None)
"""Configuration of the page by night; the page is the background."""


def name_of(value: object) -> str:
    """Return the words for a strategy, protocol, metric or kind of row; what has no words of its own loses only its underscores."""
    text = str(value)
    for names in (STRATEGY_NAMES, PROTOCOL_NAMES, METRIC_NAMES, RULE_NAMES, ROWS_NAMES):
        if text in names:
            return names[text]
    return label(text.replace("_", " "))


def model_name(source: str) -> str:
    """Return what to call a model in a sentence: the last part of its hub id or path, with the parts before it where that says nothing."""
    parts = Path(source).parts
    telling = next((at for at in reversed(range(len(parts))) if not _SAYS_NOTHING.fullmatch(parts[at])), 0)
    return label(Path(*parts[telling:]).as_posix())


def label(text: object) -> str:
    """Return `text` as a label: one line, no control or direction characters, shortened where it is endless.

    Vega-Lite writes the names on an axis into an expression, whose language knows no line separators.
    """
    line = "".join(character if character.isprintable() else " " for character in str(text)).strip()
    return line if len(line) <= _LONGEST_LABEL else f"{line[:_LONGEST_LABEL]}…"


def number(value: Any, *, digits: int = 3, sign: bool = False) -> str:
    """Write a number for reading: `digits` significant digits, thousands separated, a true minus, an en dash for none.

    Examples: ``0.01234 -> 0.0123``, ``-0.5 -> −0.500``, ``294912 -> 294,912``, ``1e-30 -> 1.00e−30``, ``nan -> –``.
    """
    if value is None or isinstance(value, (str, bool)):
        return "–" if value is None else str(value)
    x = float(value) + 0.0  # no negative zero
    if math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    magnitude = abs(x)
    if magnitude and (magnitude < 10.0**-4 or magnitude >= 1e12):
        text = f"{x:+.{digits - 1}e}" if sign else f"{x:.{digits - 1}e}"
    elif x == int(x) and (isinstance(value, int) or magnitude >= 1000):
        text = f"{x:+,.0f}" if sign else f"{x:,.0f}"
    else:
        places = max(0, digits - 1 - (math.floor(math.log10(magnitude)) if magnitude else 0))
        text = f"{x:+,.{places}f}" if sign else f"{x:,.{places}f}"
    return text.replace("-", "−")


def percent(share: Any, *, digits: int = 0) -> str:
    """Write a fraction of 0 to 1 as a percentage with a narrow space; an en dash for none."""
    x = float("nan") if share is None else float(share)
    return "–" if math.isnan(x) else f"{100 * x:z.{digits}f}\u202f%".replace("-", "−")


def interval(low: Any, high: Any, *, sign: bool = False) -> str:
    """Write an interval as ``[low, high]``; nothing where either end is missing."""
    ends = [float("nan") if end is None else float(end) for end in (low, high)]
    return "" if any(math.isnan(end) for end in ends) else f"[{number(ends[0], sign=sign)}, {number(ends[1], sign=sign)}]"
