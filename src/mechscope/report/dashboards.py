"""The page of a dictionary: an index of its latents and, one at a time, what is known of each. One file that asks the network for nothing.

It is a page of its own and no part of the report, because its data weigh some 2.5 kB a latent, which a reader of the report would wait for, and because other
pages link to single latents (`pages/NAME.html#resid6.f1024`). It has no charting library: histograms are drawn by its script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from mechscope.report.marks.dashboards import dashboard
from mechscope.report.marks.figure import script_json
from mechscope.report.rendering import environment, policy, template_text
from mechscope.report.theme import DARK, LIGHT, label

_STYLES = ("report.css", "reading.css", "dashboard.css")
_SCRIPTS = ("reading.js", "dashboard.js")


@dataclass(frozen=True, eq=False)
class DashboardPage:
    """The page of one dictionary.

    Attributes:
        dictionary: Its name in the run's tables.
        tables: The run's tables.
    """

    dictionary: str
    tables: Mapping[str, pd.DataFrame]

    @property
    def name(self) -> str:
        """Name of its file, without extension."""
        return file_name(self.dictionary)

    def html(self) -> str:
        """Write it."""
        return page(dashboard(self.dictionary, self.tables))


def file_name(dictionary: str) -> str:
    """Return the name of a dictionary's page, without extension."""
    return "dashboard-" + re.sub(r"[^A-Za-z0-9._-]+", "-", dictionary)


def page(values: dict[str, Any]) -> str:
    """Return the page that shows a dashboard's values (`mechscope.report.marks.dashboards.dashboard`)."""
    script = "".join(template_text(name) for name in _SCRIPTS)
    # of the schemes only the colours of magnitudes are asked for
    colours = {"light": {"range": LIGHT["range"]}, "dark": {"range": DARK["range"]}}
    return (
        environment()
        .get_template("dashboard.html.j2")
        .render(
            policy=policy(script),
            style=Markup("".join(template_text(name) for name in _STYLES)),
            script=Markup(script),
            colours=Markup(script_json(colours)),
            data=Markup(script_json(values)),
            name=label(values["dictionary"]),
            latents=len(values["columns"]["name"]),
            texts=values["texts_read"],
            tokens=values["tokens_read"],
        )
    )
