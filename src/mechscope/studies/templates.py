"""A configuration file with every setting of a job, its default and what it means."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from itertools import chain
from typing import Any

import yaml

from mechscope.errors import SettingsError
from mechscope.settings import Leaf
from mechscope.studies.job import Job
from mechscope.studies.jobs import jobs


def config_template(name: str) -> str:
    """Return a YAML file for a job: settings that must be given stand open, all others are commented out with their default.

    Raises:
        SettingsError: There is no such job, or it takes no settings.
    """
    known = {job.name: job for job in jobs().values() if job.options}
    if name not in known:
        raise SettingsError(f"no command {name!r} takes settings: use one of {', '.join(sorted(known))}")
    return "\n".join(_lines(known[name])) + "\n"


def _lines(job: Job[Any]) -> Iterator[str]:
    yield f"# {job.help}"
    yield f"# Given by: mechscope {job.command} --config THIS_FILE"
    panel = ""
    for leaf in chain(*job.in_order):
        if (own := "Models" if leaf.name in job.arguments else job.panel_of(leaf)) != panel:
            panel = own
            yield f"\n# {panel}"
        yield from (f"# {line}" for line in textwrap.wrap(leaf.help, 120))
        yield _setting(leaf)


def _setting(leaf: Leaf) -> str:
    if leaf.default is dataclasses.MISSING:
        return f"{leaf.name}:"
    value = leaf.default if isinstance(leaf.default, str | int | float | bool | None) else str(leaf.default)
    # JSON keeps a text with line ends on one line, YAML a number such as 1e-05 a number
    plain = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else yaml.safe_dump(value).removesuffix("\n...\n").rstrip()
    return f"# {leaf.name}: {plain}"
