"""Warnings that weaken a result are part of it: they are noted while it is made, kept in the run folder, and shown beside what they weaken.

A warning is noted where it is logged with the table whose statements it weakens and, where something is left out for it, what that is:

    log.warning("texts are too few: %d of %d", n, least, extra={"weakens": "circuit_overlap", "withheld": "what the two circuits share"})
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechscope.subject import Subject

log = logging.getLogger(__name__)


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.noted: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        weakens = getattr(record, "weakens", None)
        if weakens is not None:
            note = {"weakens": weakens, "text": record.getMessage(), "withheld": getattr(record, "withheld", "")}
            # what is said of each model or text in the same words is one caveat
            if note not in self.noted:
                self.noted.append(note)


@contextlib.contextmanager
def noting() -> Iterator[list[dict[str, Any]]]:
    """Collect the warnings that weaken results while the body runs: `weakens`, `text`, and `withheld` (what is left out; empty where nothing is)."""
    ours, notes = logging.getLogger("mechscope"), _Notes()
    ours.addHandler(notes)
    try:
        yield notes.noted
    finally:
        ours.removeHandler(notes)


def note_layers_without_heads(subject: Subject, table: str) -> None:
    """Say once, beside a table of heads or of attention, which layers of a hybrid stack do not attend."""
    mixing = subject.anatomy.mixing
    if mixing:
        log.warning(
            "%s: layers %s do not attend (%s), so they have no heads",
            subject.family,
            ", ".join(map(str, mixing)),
            ", ".join(sorted({type(mixer.module).__name__ for block in subject.anatomy.blocks if (mixer := block.mixer) is not None})),
            extra={"weakens": table},
        )
