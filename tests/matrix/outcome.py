"""What holds of a family: every check's error, or the words with which mechscope refuses."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial

import torch

from mechscope.errors import MechscopeError
from mechscope.instrument import load
from tests.matrix import checks
from tests.matrix.configs import families
from tests.matrix.plain import build
from tests.matrix.world import NotSaid, World

# relative to the size of the values; many norms and softmaxes compute in float32 whatever the type
ALLOWED = {**dict.fromkeys(checks.CHECKS, 1e-5), "KL": 1e-4, "edge attribution": 2e-3}
HALF = "bfloat16"
# families whose code computes in a way that float64 cannot follow
_SINGLE = {"xglm"}


@dataclass
class Outcome:
    """One family.

    Attributes:
        family: The model type.
        name: The class.
        errors: By check, how far off.
        refusals: By check (or `load`), why it is not measured.
        untold: By check, why plain Hugging Face does not tell.
        faults: What is wrong, or no expected error: must be empty.
        unbuilt: Why there is no tiny model of it.
    """

    family: str
    name: str
    errors: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    untold: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    unbuilt: str = ""

    @property
    def right(self) -> bool:
        """Whether all that the family has is measured, and rightly."""
        return not (self.refusals or self.faults or self.unbuilt)

    @property
    def loads(self) -> bool:
        """Whether it is measured at all."""
        return not self.unbuilt and "load" not in self.refusals


def outcome(family: str) -> Outcome:
    """Try a family."""
    found = Outcome(family, families()[family])
    dtype = torch.float32 if family in _SINGLE else torch.float64
    try:
        one, other = (build(family, seed, dtype) for seed in (0, 1))
        plain = [copy.deepcopy(model) for model in (one, other)]
        with torch.no_grad():
            plain[0](input_ids=torch.arange(3, 17)[None], use_cache=False)
    except Exception as error:  # transformers' own
        found.unbuilt = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        return found
    try:
        world = World(load(one), plain[0], plain[1], load(other))
    except MechscopeError as error:
        found.refusals["load"] = str(error)
        return found
    except Exception as error:
        found.faults.append(f"load: {error!r}")
        return found
    for model in plain:
        model.set_attn_implementation("eager")
    for name, check in checks.CHECKS.items():
        _try(found, name, partial(check, world), ALLOWED[name])
    _try(found, HALF, partial(checks.half, family), 5e-2)
    return found


def _try(found: Outcome, name: str, check: checks.Check, allowed: float) -> None:
    try:
        found.errors[name] = error = check()
        if not error <= allowed:
            found.faults.append(f"{name}: off by {error:.1e}, allowed {allowed:.0e}")
    except MechscopeError as error:
        found.refusals[name] = str(error)
    except NotSaid as error:
        found.untold[name] = str(error)
    except Exception as error:
        found.faults.append(f"{name}: {error!r}")
