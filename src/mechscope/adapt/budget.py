"""How many parameters each placement may spend, and the ranks that spend them.

The paper compares placements at equal rank, so the one with fewer layers also has fewer parameters and the comparison mixes where with how
much. Here ranks are solved so that every placement has the same number of trainable parameters: the highest common rank that fits, then one
more for some maps until the remainder is spent. A slice of n features cannot use a rank above n, so small selections can be too small for a
budget; that is an error which names the nearest possible number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mechscope.adapt.targets import Placement, Target, placement
from mechscope.errors import SettingsError

TOLERANCE = 0.02


def spend(targets: Iterable[Target], budget: int, *, fixed: Sequence[tuple[Target, int]] = (), what: str = "the placement") -> Placement:
    """Find ranks whose trainable parameters match a budget.

    Args:
        targets: Maps whose rank is to be found.
        budget: Trainable parameters wanted, those of `fixed` included.
        fixed: Maps with ranks that stand already (the low ranks of "more rank").
        what: Name of the placement, for the error.

    Returns:
        A placement within 2 % of the budget; ranks differ by at most one where no slice is full.

    Raises:
        SettingsError: No ranks come within 2 %; the message says the nearest possible number.
    """
    solved = list(targets)
    held = sum(target.cost * rank for target, rank in fixed)
    ranks = _fill(solved, budget - held)
    total = held + _cost(solved, ranks)
    if abs(total - budget) > TOLERANCE * budget:
        most = held + _cost(solved, [target.capacity for target in solved])
        least = held + _cost(solved, [1] * len(solved))
        raise SettingsError(
            f"{what} cannot have {budget:,} trainable parameters within {TOLERANCE:.0%}: the nearest is {total:,} "
            f"(its {len(solved)} maps can hold from {least:,} to {most:,}); "
            f"change the rank of the standard or select {'more' if total < budget else 'fewer'} components"
        )
    return placement([*solved, *(target for target, _ in fixed)], [*ranks, *(rank for _, rank in fixed)])


def _cost(targets: Sequence[Target], ranks: Sequence[int]) -> int:
    return sum(target.cost * rank for target, rank in zip(targets, ranks, strict=True))


def _fill(targets: Sequence[Target], budget: int) -> list[int]:
    """Raise all ranks together while they fit, then single ones, dearest first so that the remainder is spent in big coins."""
    level = 1
    highest = max(target.capacity for target in targets)
    while level < highest and _cost(targets, _at(targets, level + 1)) <= budget:
        level += 1
    ranks = _at(targets, level)
    left = budget - _cost(targets, ranks)
    room = [index for index, target in enumerate(targets) if ranks[index] < target.capacity]
    for index in sorted(room, key=lambda index: -targets[index].cost):
        if targets[index].cost <= left:
            ranks[index] += 1
            left -= targets[index].cost
    # going over by less than what is left under is nearer
    over = [index for index in room if ranks[index] == level and targets[index].cost - left < left]
    if over:
        ranks[min(over, key=lambda index: targets[index].cost)] += 1
    return ranks


def _at(targets: Sequence[Target], level: int) -> list[int]:
    return [min(level, target.capacity) for target in targets]
