"""The arms of a bake-off: which placement, at which ranks, from which seed.

Two protocols. At `equal_rank` every placement has the standard's rank, as in paper 1: fewer layers then also means fewer parameters. At
`equal_parameters` ranks are solved so that each placement has as many trainable parameters as the standard (within 2 %), so only the place
differs. More rank for the targets (CircuitLoRA, arXiv 2502.11812) keeps half the standard's rank everywhere else. Full fine-tuning and the
untouched base are references, outside both protocols. The controls are random layers, drawn anew for every seed, and the last layers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mechscope.adapt.budget import spend
from mechscope.adapt.generate import PAPER, Decoding
from mechscope.adapt.settings import TrainSettings
from mechscope.adapt.targets import Modules, Placement, find_targets, place, placement
from mechscope.errors import SettingsError
from mechscope.subject.components import Components

Strategy = Literal["standard", "targeted_layers", "targeted_heads", "more_rank", "random_layers", "last_layers", "full", "none"]
Protocol = Literal["equal_rank", "equal_parameters", "reference"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
PROTOCOLS: tuple[Protocol, ...] = ("equal_rank", "equal_parameters")
REFERENCES: tuple[Strategy, ...] = ("full", "none")
NO_SEED = -1  # the untouched base was trained from no seed


@dataclass(frozen=True, kw_only=True)
class BakeOffSettings:
    """What a bake-off compares.

    Attributes:
        layers: The targeted layers, whole (`layers:2,3,5`).
        heads: The targeted heads; needed by the strategy `targeted_heads` alone.
        strategies: Which strategies run.
        protocols: Which protocols run.
        seeds: One training of each arm per seed.
        rank: Rank of standard LoRA.
        modules: What of a layer LoRA adapts: `"attention"`, `"mlp"` or `"all"`.
        scaling: LoRA's α/r.
        dropout: LoRA's dropout.
        training: How each arm is trained; its seed is replaced by each of `seeds`.
        decoding: How the held-out documents are summarized.
    """

    layers: Components
    heads: Components = field(default_factory=Components)
    strategies: tuple[Strategy, ...] = STRATEGIES
    protocols: tuple[Protocol, ...] = PROTOCOLS
    seeds: tuple[int, ...] = (0, 1, 2)
    rank: int = 8
    modules: Modules = "attention"
    scaling: float = 2.0
    dropout: float = 0.0
    training: TrainSettings = field(default_factory=TrainSettings)
    decoding: Decoding = PAPER

    def __post_init__(self) -> None:
        for name, given, known in (("strategy", self.strategies, STRATEGIES), ("protocol", self.protocols, PROTOCOLS)):
            if unknown := [item for item in given if item not in known]:
                raise SettingsError(f"bake-off {name} {unknown[0]!r} is not known: use {', '.join(known)}")
        if not self.strategies or not self.seeds or not self.protocols:
            raise SettingsError("a bake-off needs at least one strategy, one protocol and one seed")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise SettingsError(f"bake-off seeds {self.seeds} must be different numbers from 0 up")
        if self.layers.heads or self.layers.mlps:
            raise SettingsError(f"targeted layers {self.layers} must be whole layers such as 'layers:2,3,5'")
        if "targeted_heads" in self.strategies and not self.heads.heads:
            raise SettingsError("the strategy targeted_heads needs heads, such as 'a2.h1,a3.h5': name them or leave the strategy out")
        if "more_rank" in self.strategies and self.rank < 2:
            raise SettingsError("the strategy more_rank keeps half the standard's rank elsewhere, so the rank must be at least 2")


@dataclass(frozen=True)
class Arm:
    """One training to compare, or the untouched base.

    Attributes:
        protocol: Under which rule its ranks were chosen.
        strategy: Where it learns.
        seed: Its seed; −1 for the base.
        components: What it targets, as text; `all` for full fine-tuning.
        placed: Maps and ranks; None for full fine-tuning and the base.
    """

    protocol: Protocol
    strategy: Strategy
    seed: int
    components: str
    placed: Placement | None

    @property
    def trained(self) -> bool:
        """Whether anything is trained at all."""
        return self.strategy != "none"


def plan(subject: Any, settings: BakeOffSettings) -> tuple[Arm, ...]:
    """List all arms, seeds outermost; arms with the same placement and seed are one training listed twice.

    Args:
        subject: The base `Subject`.
        settings: What to compare.

    Raises:
        SettingsError: A selection does not fit the model, or a placement cannot have the standard's number of parameters.
    """
    settings.layers.validate(subject.anatomy)
    settings.heads.validate(subject.anatomy)
    arms = []
    if "none" in settings.strategies:
        arms.append(Arm("reference", "none", NO_SEED, "none", None))
    for seed in settings.seeds:
        for protocol in settings.protocols:
            for strategy in settings.strategies:
                if strategy not in REFERENCES:
                    components, placed = _placed(subject, settings, protocol, strategy, seed)
                    arms.append(Arm(protocol, strategy, seed, str(components), placed))
        if "full" in settings.strategies:
            arms.append(Arm("reference", "full", seed, "all", None))
    return tuple(arms)


def _placed(subject: Any, settings: BakeOffSettings, protocol: Protocol, strategy: Strategy, seed: int) -> tuple[Components, Placement]:
    """Choose components and ranks of one LoRA arm."""
    everywhere = Components.of_layers(range(subject.anatomy.n_layers))
    standard = place(subject, everywhere, rank=settings.rank, modules=settings.modules)
    if strategy == "standard":
        return everywhere, standard
    components = _components(subject.anatomy.n_layers, settings, strategy, seed)
    targets = find_targets(subject, components, modules=settings.modules)
    low = [(target, settings.rank // 2) for target in standard.targets if target not in targets] if strategy == "more_rank" else []
    if protocol == "equal_parameters":
        return components, spend(targets, standard.trainable_parameters, fixed=low, what=strategy)
    maps = [*targets, *(target for target, _ in low)]
    return components, placement(maps, [*[settings.rank] * len(targets), *(rank for _, rank in low)])


def _components(n_layers: int, settings: BakeOffSettings, strategy: Strategy, seed: int) -> Components:
    chosen = settings.layers.layers
    if strategy == "targeted_heads":
        return settings.heads
    if strategy == "last_layers":
        return Components.of_layers(range(n_layers - len(chosen), n_layers))
    if strategy == "random_layers":
        return Components.of_layers(random_layers(n_layers, chosen, seed))
    return settings.layers


def random_layers(n_layers: int, avoid: Sequence[int], seed: int) -> tuple[int, ...]:
    """Draw as many layers as `avoid` has, any set but exactly that one.

    Raises:
        SettingsError: There is no other set: the targeted layers are none or all.
    """
    if not 0 < len(avoid) < n_layers:
        raise SettingsError(
            f"random layers need another choice than the targeted {len(avoid)} of {n_layers} layers: target at least one layer, and not all"
        )
    generator = random.Random(f"random layers {seed}")
    while True:
        drawn = tuple(sorted(generator.sample(range(n_layers), len(avoid))))
        if drawn != tuple(sorted(avoid)):
            return drawn
