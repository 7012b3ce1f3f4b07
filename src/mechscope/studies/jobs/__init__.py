"""The jobs: every module here defines one `JOB`; adding a file adds a command, a Python function and a kind of run."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from mechscope.studies.job import Job


@cache
def jobs() -> dict[str, Job[Any]]:
    """Return all jobs by name, sorted by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return dict(sorted((module.JOB.name, module.JOB) for module in modules))
