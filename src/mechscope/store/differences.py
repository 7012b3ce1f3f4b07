"""Which fields of two nested settings differ, by dotted name.

The same list tells a person why a folder is refused, why a stage runs again, and what changed since a run began.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# longer values (prompt templates, lists of targets) make the message unreadable
_LONGEST_VALUE = 80


@dataclass(frozen=True)
class ChangedSetting:
    """One field that differs: its dotted name and both values as JSON text, "absent" where there is none."""

    name: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.name}: {_shortened(self.old)} -> {_shortened(self.new)}"

    def is_within(self, names: Iterable[str]) -> bool:
        """Tell whether the field is one of `names` (dotted) or lies in one of them."""
        return any(f"{self.name}.".startswith(f"{name}.") for name in names)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[ChangedSetting]:
    """Return the fields in which two nested JSON-able mappings differ, in the order of `old`; lists are compared whole."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    names = dict.fromkeys([*before, *after])
    pairs = ((name, before.get(name, "absent"), after.get(name, "absent")) for name in names)
    return [ChangedSetting(*pair) for pair in pairs if pair[1] != pair[2]]


def describe(changes: Iterable[ChangedSetting]) -> str:
    """Return what changed as one line of text."""
    return "; ".join(map(str, changes))


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            # as text, because nan != nan
            yield f"{prefix}{key}", json.dumps(item, ensure_ascii=False)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
