"""Jobs on a tiny random model in memory: run, look at the page, and see that wrong settings are refused before the model runs."""

from __future__ import annotations

import html
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mechscope.data.pairs import Pairs
from mechscope.errors import MechscopeError
from mechscope.report.sections import sections
from mechscope.studies.job import Job, Result
from mechscope.studies.runner import run_job
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs

PAIRS = random_pairs(6)


@cache
def subject() -> Subject:
    """Return a model of three layers of four heads that reads single words, `w3 w4 …`."""
    return load(families.build("gpt2"), tokenizer=families.tokenizer())


def run(job: Job[Any], out: Path | None, *, pairs: Pairs | str = PAIRS, **settings: Any) -> Result:
    """Run a job on the tiny model."""
    given = {"model": subject(), **({"pairs": pairs} if isinstance(pairs, Pairs) else {})}
    named = {"model": "given in memory"}
    if any(leaf.name == "pairs" for leaf in job.options):
        named["pairs"] = pairs if isinstance(pairs, str) else "given in memory"
    return run_job(job, job.resolve(**named, **settings), out, given=given)


def refuses(job: Job[Any], out: Path, error: type[MechscopeError], message: str, *, pairs: Pairs | str = PAIRS, **settings: Any) -> None:
    """Check that settings are refused before the model reads a token."""
    passes: list[Any] = []
    handle = subject().anatomy.embedding.register_forward_pre_hook(lambda module, args: passes.append(args))
    try:
        with pytest.raises(error, match=message):
            run(job, out, pairs=pairs, **settings)
    finally:
        handle.remove()
    assert not passes


def shown(result: Result, section: str) -> str:
    """Return a run's page, which has the section with its figures and findings."""
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    own = sections()[section]
    assert f'<section id="{section}">' in page
    assert own.heading in page
    figures = own.figures(result.tables)
    assert figures
    for figure in figures:
        assert f'id="{figure.name}"' in page
        assert (result.path / "figures" / f"{figure.name}.svg").stat().st_size > 500
    assert own.views(result.tables)
    # the caveats of a run are listed in a section of their own
    weakened = sections()["caveats"]
    listed = html.unescape(page.partition('<section id="caveats">')[2].partition("</section>")[0])
    assert [caveat for caveat in result.tables["caveats"]["caveat"] if str(caveat) not in listed] == []
    for name, table in result.tables.items():
        described = weakened if name in weakened.tables else own
        spec = described.tables[name]
        assert [column for column in table if not spec.knows(str(column))] == []
        assert [column for column in spec.required if column not in table] == []
        # a table may be there alone, and without what it may lack
        optional = [key for key, column in spec.listed().items() if column.optional]
        for part in (table, table.drop(columns=[column for column in optional if column in table])):
            assert all(made is not None for made in (*described.figures({name: part}), *described.views({name: part})))
            assert all(finding.sentence.endswith(".") for finding in described.findings({name: part}))
            assert all(caveat.text.endswith(".") for caveat in described.caveats({name: part}))
    return page


def findings(section: str, **tables: Any) -> list[str]:
    """Return the sentences that a section makes of tables."""
    return [finding.sentence for finding in sections()[section].findings(tables)]


def write(path: Path, text: str) -> str:
    """Write a file and return its name as a setting."""
    path.write_text(text, encoding="utf-8")
    return str(path)
