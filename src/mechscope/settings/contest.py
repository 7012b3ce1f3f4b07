"""Which placements of LoRA compete in a bake-off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar, get_args

from mechscope.choices import BudgetProtocol, Strategy
from mechscope.errors import SettingsError
from mechscope.settings import Number, Settings, setting

T = TypeVar("T", bound=str)


@dataclass(frozen=True, kw_only=True)
class ContestSettings(Settings):
    """Strategies, budgets and seeds of a bake-off, as text."""

    panel: ClassVar[str] = "Contest"

    strategies: str = setting("all", "Strategies that compete, joined by commas; all: every one whose layers, heads or circuit are given.")
    target_circuit: str | None = setting(
        None,
        'Circuit for LoRA: its heads and MLPs, e.g. "a3.h5,m3", or a file that mechscope circuit wrote (RUN/circuits/model.json, the format of MIB and '
        "EAP-IG); without, no strategy uses one.",
    )
    circuit_layers: str | None = setting(
        None, 'The circuit\'s critical layers, which get more rank than the others, e.g. "layers:2,5"; without, that strategy is left out.'
    )
    protocols: str = setting("equal_rank,equal_parameters", "Budgets: equal_rank (the paper's), equal_parameters, or both.")
    seeds: Number = setting(3, "Seeds of every strategy.")

    def __post_init__(self) -> None:
        """Refuse strategies and protocols that are not known, and no protocol at all, by a `SettingsError`."""
        super().__post_init__()
        if not self.named_protocols:
            raise SettingsError(f"setting 'protocols' is {self.protocols!r}: name at least one of {', '.join(get_args(BudgetProtocol))}")
        _ = self.named_strategies  # making them raises what is wrong with them

    @property
    def named_strategies(self) -> tuple[Strategy, ...]:
        """The strategies by name; none where all compete."""
        return () if self.strategies == "all" else _parts("strategies", self.strategies, get_args(Strategy))

    @property
    def named_protocols(self) -> tuple[BudgetProtocol, ...]:
        """The protocols by name."""
        return _parts("protocols", self.protocols, get_args(BudgetProtocol))


def _parts(name: str, text: str, known: tuple[T, ...]) -> tuple[T, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [part for part in parts if part not in known]:
        raise SettingsError(f"setting {name!r} names {unknown[0]!r}, which is not known: use {', '.join(known)}")
    return tuple(one for part in parts for one in known if one == part)
