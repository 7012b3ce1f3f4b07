"""Which of some texts are judged on, and not learned from: a part of them, or all in turn, fold by fold.

Corpora hold the same text twice more often than one thinks. One that stood on both sides would be judged on what was learned from it, so equal texts fall on
one side.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mechscope.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, Int

    from mechscope.data.pairs import Pairs


def judged_on(texts: Sequence[Hashable], share: float, seed: int, *, source: str) -> Bool[np.ndarray, " text"]:
    """Choose at random which texts are judged on; equal ones are all chosen or none.

    Args:
        texts: What makes a text the same as another, such as its tokens.
        share: Share of the different texts that are judged on; at least one is, and at least one is not.
        seed: Of the choice.
        source: Where they come from, for the error.

    Raises:
        DataError: There are fewer than two different texts.
    """
    import numpy as np

    different = list(dict.fromkeys(texts))
    if len(different) < 2:
        raise DataError(
            f"{source} has {len(different)} different text: some are learned from and others judged on, so give at least two different ones"
        )
    number = min(max(1, round(share * len(different))), len(different) - 1)
    chosen = {different[at] for at in np.random.default_rng(seed).permutation(len(different))[:number]}
    return np.array([text in chosen for text in texts])


def folds(texts: Sequence[Hashable], number: int, seed: int, *, strata: Sequence[Hashable], source: str) -> Int[np.ndarray, " text"]:
    """Deal texts out at random to folds, each of which is judged by what was learned from the others; equal texts fall into one.

    Args:
        texts: What makes a text the same as another: its tokens, or what it is about.
        number: How many folds.
        seed: Of the choice.
        strata: What every fold should have its part of, such as a text's class; of equal texts that of the first counts.
        source: Where they come from, for the error.

    Returns:
        The fold of each text, from 0.

    Raises:
        DataError: There are fewer different texts than folds.
    """
    import numpy as np

    first = dict(zip(reversed(texts), reversed(strata), strict=True))
    different = list(dict.fromkeys(texts))
    if len(different) < number:
        raise DataError(f"{source} has {len(different)} different texts, {number} folds need as many: give more texts, or fewer folds")
    order = [different[at] for at in np.random.default_rng(seed).permutation(len(different))]
    kinds = {kind: rank for rank, kind in enumerate(dict.fromkeys(first[text] for text in different))}
    # one after the other within each stratum, and on from where the last one ended
    dealt = {text: at % number for at, text in enumerate(sorted(order, key=lambda text: kinds[first[text]]))}
    return np.array([dealt[text] for text in texts])


def held_out(pairs: Pairs, share: float, seed: int, *, of_pairs: bool = True) -> tuple[Pairs, Pairs]:
    """Split pairs into those that are learned from and those that are judged on; equal ones fall on one side.

    Args:
        pairs: All pairs.
        share: Share of the different ones that are judged on.
        seed: Of the choice.
        of_pairs: Whether pairs are equal where clean and corrupt text are; else where the clean texts are, which are all that is read.

    Raises:
        DataError: There are fewer than two different ones.
    """
    chosen = judged_on([(pair.clean, pair.corrupt if of_pairs else ()) for pair in pairs], share, seed, source=pairs.source)
    sides = [tuple(pair for pair, judged in zip(pairs, chosen, strict=True) if judged == side) for side in (False, True)]
    return replace(pairs, pairs=sides[0]), replace(pairs, pairs=sides[1])
