"""What jobs on prompt pairs share: positions as a command line writes them, and refusals before the first forward pass."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mechscope.errors import SettingsError

if TYPE_CHECKING:
    from mechscope.causal.patching import Positions
    from mechscope.data.pairs import Pairs
    from mechscope.subject import Subject
    from mechscope.subject.anatomy import Anatomy


def parse_positions(text: str) -> Positions:
    """Read positions as a command line gives them: a name, names, or numbers, joined by commas.

    Raises:
        SettingsError: There are none.
    """
    parts = split_names(text)
    if not parts:
        raise SettingsError("positions are empty: use all, last, changed, each, a segment or numbers")
    if all(re.fullmatch(r"-?\d+", part) for part in parts):
        return [int(part) for part in parts]
    return parts[0] if len(parts) == 1 else parts


def one_position(text: str) -> str | list[int]:
    """Read the tokens of one place in a text: a name, or numbers joined by commas.

    Raises:
        SettingsError: There are none, or several names.
    """
    positions = parse_positions(text)
    if isinstance(positions, str):
        return positions
    numbers = [] if isinstance(positions, int) else [at for at in positions if isinstance(at, int)]
    if not numbers:
        raise SettingsError(f"positions {text!r} name several places: give one name, or numbers joined by commas")
    return numbers


def split_names(text: str) -> list[str]:
    """Split a list that a command line gives, at its commas."""
    return [part for part in (part.strip() for part in text.split(",")) if part]


def layers_of(text: str | None, anatomy: Anatomy) -> tuple[int, ...]:
    """Read layers as a command line gives them, `0-3,5`; all of the model for None.

    Raises:
        SettingsError: They are not understood, none are named, or the model lacks one.
    """
    from mechscope.subject import Components

    if text is None:
        return tuple(range(anatomy.n_layers))
    return Components.parse(f"layers:{text.removeprefix('layers:')}").validate(anatomy).layers


def check_pairs(subject: Subject, pairs: Pairs, *, metric: str | None, positions: tuple[str, ...] = ()) -> None:
    """Refuse pairs that a model cannot read, or that lack what a metric or positions need, without a run of the model.

    Args:
        subject: The model.
        pairs: The pairs.
        metric: What they are judged by; None where they are not.
        positions: Tokens that every pair must have, as `one_position` reads them.

    Raises:
        MechscopeError: A pair does not fit; the message names it.
    """
    from mechscope.data.metrics import check_metric
    from mechscope.data.scoring import check_fits

    check_fits(subject, pairs)
    if metric is not None:
        check_metric(metric, pairs)
    for where in positions:
        for batch in pairs.batches():
            batch.positions(one_position(where))
