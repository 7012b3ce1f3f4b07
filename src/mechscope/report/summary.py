"""What a run says, in the order in which a reader asks: the verdict, findings by question and effect, and what weakens them.

The page, the terminal, notebooks and the table `caveats` of the run folder are made of this one value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from mechscope.report import verdict
from mechscope.report.contents import Contents
from mechscope.report.section import Section
from mechscope.report.sections import sections
from mechscope.report.statements import QUESTIONS, Caveat, Finding

# sentences of the verdict at most, and large numbers on the first screen
_SENTENCES, _CARDS = 5, 8


@dataclass(frozen=True, eq=False)
class Group:
    """The findings on one question.

    Attributes:
        heading: The question.
        findings: What was found, the largest effect first, what is withheld after it.
        folded: What is negligible, undecided or a detail.
    """

    heading: str
    findings: tuple[Finding, ...]
    folded: tuple[Finding, ...]


@dataclass(frozen=True, eq=False)
class Summary:
    """What a run says.

    Attributes:
        verdict: Three to five sentences.
        groups: Findings by question, in a reader's order.
        caveats: What weakens statements, each with the id of its section; empty where it is not known.
    """

    verdict: tuple[Finding, ...]
    groups: tuple[Group, ...]
    caveats: tuple[tuple[str, Caveat], ...]

    @classmethod
    def of(cls, contents: Contents) -> Summary:
        """Read a run's summary off its tables and manifest."""
        present = [section for section in contents.sections if section.present(contents.tables)]
        caveats = tuple(
            dict.fromkeys([*_recorded(contents), *((section.id, each) for section in present for each in section.caveats(contents.tables))])
        )
        same = verdict.identical(contents)
        if same is not None:
            return cls((same,), (), caveats)
        groups = _groups(present, contents)
        said = _verdict(contents, groups)
        weighed = tuple(Group(each.heading, *_weighed(caveats, each.findings, each.folded)) for each in groups)
        (first,) = _weighed(caveats, said)
        return cls(first, weighed, caveats)

    @property
    def further(self) -> tuple[Group, ...]:
        """The findings that the verdict has not said already, by question; none of what is folded."""
        said = {finding.text for finding in self.verdict}
        groups = (Group(each.heading, tuple(one for one in each.findings if one.text not in said), ()) for each in self.groups)
        return tuple(group for group in groups if group.findings)

    @property
    def cards(self) -> tuple[Finding, ...]:
        """The findings whose number is shown in large, in the order of the questions; none of what is folded."""
        return tuple(each for group in self.groups for each in group.findings if each.card is not None)[:_CARDS]

    def of_section(self, section: str) -> list[Caveat]:
        """Return the caveats of a section; what weakens several of its tables in the same words once."""
        return list({caveat.text: caveat for name, caveat in self.caveats if name == section}.values())

    @property
    def texts(self) -> tuple[str, ...]:
        """Every caveat once, in words."""
        return tuple(dict.fromkeys(caveat.text for _, caveat in self.caveats))

    def table(self) -> pd.DataFrame:
        """Return the table `caveats`."""
        rows = [(name, caveat.weakens, caveat.text, caveat.withheld) for name, caveat in self.caveats]
        return pd.DataFrame(rows, columns=["section", "weakens", "caveat", "withheld"]).astype({"withheld": bool})


def noted(contents: Contents) -> list[Mapping[str, Any]]:
    """Return what was noted while the run was made, such as texts that were too few: `weakens` (a table), `text`, `withheld` (what is left out for it)."""
    stages = contents.manifest.get("stages", {}).values()
    return [*contents.manifest.get("caveats", []), *(each for stage in stages for each in stage.get("caveats", []))]


def _recorded(contents: Contents) -> list[tuple[str, Caveat]]:
    """Return what was noted as caveats, each with the section that owns what it weakens."""
    owners = {name: section.id for section in sections().values() for name in section.tables}
    return [
        (owners.get(each["weakens"], ""), Caveat(_sentence(each["text"]), each["weakens"], withheld=bool(each["withheld"])))
        for each in noted(contents)
    ]


def _weighed(caveats: Sequence[tuple[str, Caveat]], *parts: Sequence[Finding]) -> list[tuple[Finding, ...]]:
    """Put beside each finding what weakens it; what weakens several stands beside the first of them."""
    said, weighed = set[str](), list[tuple[Finding, ...]]()
    for findings in parts:
        own = []
        for finding in findings:
            beside = {each.text: each for _, each in caveats if each.weakens and each.weakens == finding.table and each.text not in said}
            # a finding that is withheld gives its reason itself
            beside = {} if finding.withheld else beside
            said |= set(beside)
            own.append(replace(finding, caveats=tuple(beside.values())))
        weighed.append(tuple(own))
    return weighed


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _groups(present: Sequence[Section], contents: Contents) -> tuple[Group, ...]:
    """Put findings under their questions, those without one under their section's heading, and order them by effect."""
    by_heading: dict[str, list[Finding]] = {question: [] for question in QUESTIONS.values()}
    for section in present:
        for finding in section.findings(contents.tables):
            heading = QUESTIONS.get(finding.question or section.question, section.heading)
            by_heading.setdefault(heading, []).append(finding)
    for section in sections().values():
        for each in noted(contents):
            if each["withheld"] and each["weakens"] in section.tables:
                withheld = Finding(each["withheld"], withheld=each["text"], table=each["weakens"])
                by_heading.setdefault(QUESTIONS.get(section.question, section.heading), []).append(withheld)
    groups = []
    for heading, findings in by_heading.items():
        ordered = sorted(findings, key=lambda finding: (bool(finding.withheld), -finding.effect))
        if ordered:
            shown = tuple(each for each in ordered if not each.folded)
            groups.append(Group(heading, shown, tuple(each for each in ordered if each.folded)))
    return tuple(groups)


def _verdict(contents: Contents, groups: Sequence[Group]) -> tuple[Finding, ...]:
    """Compose the verdict: of a difference from its tables, of anything else from the largest finding on each question."""
    tables, said = contents.tables, verdict.compared(contents)
    composed = [each for compose in verdict.ANSWERS for each in compose(tables)]
    difference = any(finding.question in ("aim", "where") for finding in composed)
    answered = {QUESTIONS[finding.question] for finding in composed}
    if difference or not groups:
        return (*said, *composed)[:_SENTENCES]
    by_heading = {QUESTIONS[finding.question]: finding for finding in composed}
    largest = [by_heading.get(group.heading) or group.findings[0] for group in groups if group.findings or group.heading in answered]
    return (*said, *largest)[:_SENTENCES]
