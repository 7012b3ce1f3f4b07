"""A world whose truth is known, drawn many times: what a verdict or an interval should say there, and what it says."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from mechscope.studies import calibration

# modules of the package that hold no truths
_OTHER = ("truth", "rates")


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A verdict or an interval under a known truth.

    Attributes:
        claim: What is judged: a claim's name as in the table `claims`, or the quantity an interval is for ("faithfulness").
        world: What is true, in words a table can carry: "tuned is worse than base", "heavy-tailed losses, ratio .6".
        kind: `null`: nothing of what the claim says is there, so a verdict among `wrong` is an error. `planted`: it is there with `size`, and
            the rate of `right` is the power. `coverage`: `draw` answers "inside", "outside" or "withheld".
        size: The planted effect's size, or for coverage the number of units; 0 for a null.
        unit: What is observed independently: "document", "prompt pair", "seed", "training", "head".
        draw: Draws the world from a seed, measures it with the product's own functions and returns the verdict.
        wrong: Verdicts that are errors here.
        right: Verdicts that find what is there.
        small: Draws in the small form of the suite (minutes for all truths together).
        full: Draws in the full form.
    """

    claim: str
    world: str
    kind: Literal["null", "planted", "coverage"]
    draw: Callable[[int], str]
    unit: str
    size: float = 0.0
    wrong: tuple[str, ...] = ()
    right: tuple[str, ...] = ()
    small: int = 100
    full: int = 2000


def all_truths() -> tuple[Truth, ...]:
    """Return the truths of every module of `mechscope.studies.calibration`, in the order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(calibration.__path__))
    modules = [import_module(f"{calibration.__name__}.{name}") for name in names if name not in _OTHER]
    return tuple(truth for module in modules for truth in module.TRUTHS)
