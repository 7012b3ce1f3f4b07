"""The report's page: one HTML file that holds its figures, their numbers and the code that draws them, and asks the network for nothing.

Text from data, models and settings is escaped by jinja, and inside the figures' JSON by `script_json`. Behind that stands a content policy that
allows no request at all and only the page's own scripts, by their hash: even markup that slipped through could neither load nor run
anything. The charts' expressions are interpreted rather than compiled (Vega's `ast` mode), so the policy needs no `unsafe-eval`. Styles may be
inline, because Vega's tooltips set them.

Equal run folders give equal bytes: the only date is the manifest's.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import shlex
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import vl_convert
import yaml
from markupsafe import Markup

from mechscope.report import views
from mechscope.report.causal import ablation_view, effects_view, importance_view, sets_sentence
from mechscope.report.circuit_slider import Picture, pictures, pictures_json
from mechscope.report.circuit_summary import circuit_cards, circuit_caveats, circuit_sentences, circuit_title, only_circuits
from mechscope.report.circuit_views import circuit_views
from mechscope.report.circuits import circuit_figures
from mechscope.report.contents import Contents, leaves, problems
from mechscope.report.figure import Figure, png, script_json
from mechscope.report.figures import chosen, figures, main_rule
from mechscope.report.reading import SCRIPTS, STYLE, reading, reading_figures
from mechscope.report.reading_cards import reading_cards, reading_caveats
from mechscope.report.reading_summary import reading_sentences, reading_title
from mechscope.report.sections import alone, only_readings, sections
from mechscope.report.summary import cards, caveats, sentences
from mechscope.report.theme import DARK, LIGHT, ROWS_NAMES, interval, model_name, name_of, number
from mechscope.store.files import write_bytes, write_text

logger = logging.getLogger(__name__)

PAGE = "report.html"
SAMPLES = 12
"""Documents shown with their summaries; the table has all."""

# Text of a document that is shown before the reader unfolds it, in characters.
_EXCERPT = 280
# What the manifest keeps for `mechscope verify` and for resuming, not for readers; and what has a place of its own on the page.
_UNSHOWN = {"settings", "stages", "continued", "command", "kind", "created"}


def render(run_path: str | Path) -> Path:
    """Write a run's report (`report.html`) and its figures (`figures/*.svg`, `figures/*.png`), each file atomically.

    Args:
        run_path: A run folder with at least one table.

    Returns:
        The path of the page.

    Raises:
        RunError: it is no run folder, has no tables, or cannot be written.
    """
    contents = Contents.read(run_path)
    drawn = figures(contents.tables) | circuit_figures(contents.tables) | reading_figures(contents.tables)
    every: list[Figure | Picture] = [*(figure for section in drawn.values() for figure in section), *pictures(contents.tables)]
    for figure in every:
        svg = figure.svg()
        write_text(svg, contents.path / "figures" / f"{figure.name}.svg")
        write_bytes(png(svg), contents.path / "figures" / f"{figure.name}.png")
    page = contents.path / PAGE
    write_text(html(contents, drawn), page)
    logger.info("report of %d tables and %d figures written to %s", len(contents.tables), sum(map(len, drawn.values())), page)
    return page


def html(contents: Contents, drawn: Mapping[str, list[Figure]]) -> str:
    """Return the page as text; nothing is written."""
    charts = script_json(_charts([figure for section in drawn.values() for figure in section]))
    pictured, read = pictures(contents.tables), reading(contents.tables)
    scripts = ["report.js", *(["circuits.js"] if pictured else []), *(SCRIPTS if read.json else [])]
    library, own = _library(), "".join(map(_template_text, scripts))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, words=name_of)
    environment.globals.update(interval=interval)
    policy = f"default-src 'none'; script-src {_hash(library)} {_hash(own)}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return environment.get_template("report.html.j2").render(
        policy=policy,
        style=Markup(_template_text("report.css") + (_template_text(STYLE) if read.present else "")),
        library=Markup(library),
        script=Markup(own),
        charts_json=Markup(charts),
        figures=drawn,
        sections=sections(contents.tables),
        asked=_asked(contents),
        title=_title(contents),
        sentences=[*sentences(contents.tables), *circuit_sentences(contents.tables, pictured), *reading_sentences(contents.tables)],
        cards=[
            *cards(contents.tables),
            *circuit_cards(pictured),
            *(reading_cards(contents.tables) if only_readings(contents.tables) else ()),
        ],
        caveats=[
            *circuit_caveats(contents.tables),
            *reading_caveats(contents.tables),
            *(() if alone(contents.tables) else caveats(contents.tables)),
        ],
        circuits={"pictures": pictured, "views": circuit_views(contents.tables), "json": Markup(pictures_json(pictured))},
        reading=read,
        switch=_switch(contents),
        row_names=ROWS_NAMES,
        views=_views(contents),
        claims=_records(contents.table("claims")),
        sets=sets_sentence(contents.table("layer_sets")),
        selection=_selected(contents.table("selection")),
        samples=_samples(contents.table("summaries")),
        problems=problems(contents.manifest),
        settings=yaml.safe_dump(dict(contents.settings), sort_keys=False, allow_unicode=True, width=100),
        record=[
            (" · ".join(path), _text(value)) for path, value in leaves({k: v for k, v in contents.manifest.items() if k not in _UNSHOWN})
        ],
        command=_command(contents),
    )


def _charts(drawn: Iterable[Figure]) -> dict[str, Any]:
    """Return what the page's script draws: definitions, the numbers they share (column by column names once), and both colour schemes."""
    found: dict[str, Any] = {"figures": {}, "datasets": {}, "light": LIGHT | {"background": None}, "dark": DARK}
    for figure in drawn:
        found["figures"][figure.name] = figure.page_spec()
        for name, rows in figure.datasets.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            found["datasets"][name] = {"columns": columns, "rows": [[row.get(column) for column in columns] for row in rows]}
    return found


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script."""
    # a script element ends at this text wherever it stands, in a string too; today's libraries do not have it
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def _template_text(name: str) -> str:
    return (resources.files("mechscope.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _setting(contents: Contents, *names: str) -> str | None:
    """Return the first setting of one of these names, wherever it is nested; None where it is absent or empty."""
    found = [(path[-1], _text(value)) for path, value in leaves(contents.settings) if path and value not in (None, "", {}, [])]
    return next((text for wanted in names for name, text in found if name == wanted), None)


def _title(contents: Contents) -> str:
    if "effects" in contents.tables and (model := _setting(contents, "model")):
        verb = "Patching" if contents.manifest.get("kind") == "patch" else "Ablating"
        return f"{verb} {model_name(model)}"
    base = _setting(contents, "base")
    if only_circuits(contents.tables):
        return circuit_title(_setting(contents, "model"), base)
    if only_readings(contents.tables):
        return reading_title(contents.tables, _setting(contents, "model") or base)
    return f"What fine-tuning changed in {model_name(base)}" if base else "What fine-tuning changed"


def _asked(contents: Contents) -> list[tuple[str, str]]:
    tuned = _setting(contents, "tuned") or ("fine-tuned by this run" if "bakeoff" in contents.tables else None)
    asked = [
        ("study", contents.manifest.get("kind")),
        ("model", _setting(contents, "model")),
        ("base model", _setting(contents, "base")),
        ("fine-tuned model", tuned),
        ("data", _setting(contents, "pairs", "data", "source")),
        ("begun", str(contents.manifest.get("created", ""))[:16].replace("T", " ")),
    ]
    return [(name, str(value)) for name, value in asked if value]


def _command(contents: Contents) -> str:
    command = contents.manifest.get("command")
    if isinstance(command, list):
        return shlex.join(str(part) for part in command)
    return str(command) if command else ""


def _switch(contents: Contents) -> list[str]:
    """Return the kinds of query rows the reader can switch between; empty where there is no choice."""
    found = next((views.kinds(contents.tables[name]) for name in ("heads", "layers") if name in contents.tables), [])
    return found if len(found) > 1 else []


def _views(contents: Contents) -> dict[str, list[views.View]]:
    tables, selection = contents.tables, contents.table("selection")
    found: dict[str, list[views.View]] = {}
    if "heads" in tables:
        found["heads"] = views.heads_views(tables["heads"], chosen(selection, "head"))
    if "layers" in tables:
        found["layers"] = views.layers_views(tables["layers"], [layer for layer, _ in chosen(selection, "layer")])
    if "outputs" in tables:
        found["outputs"] = [views.outputs_view(tables["outputs"])]
    if "rouge" in tables:
        found["rouge"] = [views.rouge_view(tables["rouge"])]
    if "weights" in tables:
        found["weights"] = [views.weights_view(tables["weights"])]
    if "effects" in tables:
        found["effects"] = [effects_view(tables["effects"])]
    if "ablation" in tables:
        found["ablation"] = [ablation_view(tables["ablation"])]
    if "importance" in tables:
        found["importance"] = [importance_view(tables["importance"])]
    if "bakeoff" in tables:
        found["bakeoff"] = [views.arms_view(tables["bakeoff"])]
    return found


def _records(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    return [] if table is None else [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _selected(selection: pd.DataFrame | None) -> list[tuple[str, str, bool]]:
    """Return each rule, what it chose and whether the figures outline it."""
    if selection is None:
        return []
    main = {main_rule(selection, "layer"), main_rule(selection, "head")}
    groups = selection[selection["chosen"]].groupby("rule", sort=False)
    return [
        (name_of(rule), ", ".join(str(component) for component in group.sort_values("rank")["component"]), rule in main)
        for rule, group in groups
    ]


def _samples(summaries: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Return the first documents with the reference and every model's summary."""
    if summaries is None:
        return []
    writers = ["reference", *(column for column in summaries if column not in ("id", "document", "reference"))]
    found = []
    for row in summaries.head(SAMPLES).to_dict("records"):
        document = _text(row["document"])
        found.append(
            {
                "id": _text(row["id"]),
                "document": document,
                "excerpt": None if len(document) <= _EXCERPT else document[:_EXCERPT].rsplit(" ", 1)[0],
                "words": len(document.split()),
                "summaries": [(name_of(writer), _text(row[writer])) for writer in writers],
            }
        )
    return found


def _text(value: object) -> str:
    """Return a value of data or settings as text; nothing for what is missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and pd.isna(value)):
        return ""
    return ", ".join(_text(each) for each in value) if isinstance(value, list) else str(value)
