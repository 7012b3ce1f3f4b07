"""The sections of the page: every module here defines one `SECTION`; adding a file adds a section."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from mechscope.report.section import Section, TableSpec


@cache
def sections() -> dict[str, Section]:
    """Return all sections by id, sorted by id."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = {module.SECTION.id: module.SECTION for module in modules}
    return dict(sorted(found.items()))


@cache
def table_specs() -> dict[str, TableSpec]:
    """Return the description of every table by its name.

    Raises:
        ValueError: Two sections own the same table.
    """
    specs: dict[str, TableSpec] = {}
    for section in sections().values():
        for name, spec in section.tables.items():
            if name in specs:
                raise ValueError(f"table {name!r} is owned by two sections, one of them {section.id!r}: describe it once")
            specs[name] = spec
    return specs
