"""How pages are made of templates: everything escaped, and a content policy that allows no request and only the page's own scripts."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

import jinja2

from mechscope.report.theme import interval, name_of, number


def environment() -> jinja2.Environment:
    """Return jinja, which escapes every value and knows how numbers and names are written."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, words=name_of, unbroken=unbroken)
    environment.globals.update(interval=interval)
    return environment


def policy(*scripts: str) -> str:
    """Return the content policy of a page that runs these scripts and no others, and asks the network for nothing."""
    allowed = " ".join(map(_hash, scripts))
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def template_text(name: str) -> str:
    """Return a template, style or script."""
    return (resources.files("mechscope.report") / "templates" / name).read_text(encoding="utf-8")


def exists(name: str) -> bool:
    """Tell whether there is a template, style or script of that name."""
    return (resources.files("mechscope.report") / "templates" / name).is_file()


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def unbroken(sentence: str) -> str:
    """Return a sentence whose intervals and numbers of observations are not broken at the end of a line."""
    return re.sub(r"\[[^\[\]]{3,24}\]|\b[np] = \S+", lambda found: found[0].replace(" ", "\u00a0"), sentence)
