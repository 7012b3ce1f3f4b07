"""The same jobs from Python, in a few lines that fit a notebook: `mechscope.diff`, `mechscope.patch`, … are read off the jobs.

Models may be given as sources (hub id, directory, adapter), as loaded `Subject`s or as modules in memory; documents as a source, a `Corpus`, or a list
of `Document`s; prompt pairs as a source or as `Pairs`. Results are tables; nothing is left on disk unless `out` names a folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from mechscope.studies.job import Job, Result
from mechscope.studies.jobs import jobs

_IN_MEMORY = "given in memory"


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """Return a function per job, by its name in Python (`circuit_diff` for `circuit-diff`)."""
    return {python_name(job): _function(job) for job in jobs().values()}


def python_name(job: Job[Any]) -> str:
    """Return what a job is called in Python."""
    return job.function or job.name.replace("-", "_")


def _function(job: Job[Any]) -> Callable[..., Any]:
    def run(*about: Any, out: str | Path | None = None, progress: Any = None, tokenizer: Any = None, **settings: Any) -> Any:
        named = {**dict(zip(job.about, about, strict=False)), **settings}
        if job.preset is not None and named:
            raise TypeError(f"{python_name(job)}() takes no settings: {', '.join(named)} cannot be given")
        if len(about) > len(job.about):
            raise TypeError(
                f"{python_name(job)}() takes {len(job.about)} arguments by position ({', '.join(job.about)}), {len(about)} were given"
            )
        given = {name: named[name] for name in job.about if not isinstance(named.get(name), str | Path | None)}
        texts = {name: _IN_MEMORY if name in given else _plain(value) for name, value in named.items()}
        if isinstance(tokenizer, str | Path):
            texts["tokenizer"] = str(tokenizer)
        elif tokenizer is not None:
            given["tokenizer"] = tokenizer
        resolved = job.resolve(**texts)
        from mechscope.studies.runner import run_job

        return (job.execute or run_job)(job, resolved, out, progress=progress, given=given)

    run.__name__ = run.__qualname__ = python_name(job)
    run.__doc__ = _documented(job)
    vars(run).update(__signature__=_signature(job))
    return run


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _documented(job: Job[Any]) -> str:
    lines = [f"    {leaf.name}: {leaf.help}" for leaf in job.options if leaf.name != "tokenizer"]
    return "\n".join(
        [
            job.help,
            "",
            "Args:",
            *lines,
            "    out: Folder of the run; without, nothing is left on disk.",
            "    progress: Called with a label, what is done and how much there is.",
            "    tokenizer: A tokenizer or its source, for models that come without one.",
            "",
            "Returns:",
            "    The tables, by name and as attributes, and where the run and its page are.",
            "",
            "Raises:",
            "    MechscopeError: Models, data or settings cannot be used.",
        ]
    )


def _signature(job: Job[Any]) -> inspect.Signature:
    kinds = {leaf.name: leaf for leaf in job.options}
    about = [name for name in job.about if name in kinds]
    positional = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=_default(kinds[name])) for name in about]
    rest = [
        inspect.Parameter(leaf.name, inspect.Parameter.KEYWORD_ONLY, default=_default(leaf))
        for leaf in kinds.values()
        if leaf.name not in (*job.about, "tokenizer")
    ]
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("out", "progress", "tokenizer")]
    return inspect.Signature([*positional, *rest, *own], return_annotation=Result)


def _default(leaf: Any) -> Any:
    import dataclasses

    return inspect.Parameter.empty if leaf.default is dataclasses.MISSING else leaf.default
