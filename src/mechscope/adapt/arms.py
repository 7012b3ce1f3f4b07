"""The arms of a bake-off: which placement, at which ranks, from which seed.

Two protocols. At `equal_rank` every placement has the standard's rank, as in paper 1: fewer layers then also means fewer parameters. At
`equal_parameters` ranks are solved so that each placement has as many trainable parameters as the standard (within 2 %), so only the place
differs. More rank for the targets (CircuitLoRA, arXiv 2502.11812) keeps half the standard's rank everywhere else. A circuit can be used both
ways: LoRA in its heads and MLPs alone, or more rank in its critical layers. Full fine-tuning and the untouched base are references, outside
both protocols. The controls are random layers and random circuits, drawn anew for every seed, and the last layers.

A circuit names its MLPs one by one, so they are adapted whatever `modules` says of whole layers. That shifts the budget from attention to MLPs,
not its size: the standard's trainable parameters bind every placement at equal parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mechscope.adapt.budget import spend
from mechscope.adapt.generate import PAPER
from mechscope.adapt.places import random_circuit, random_layers
from mechscope.adapt.targets import Placement, find_targets, place, placement
from mechscope.choices import BudgetProtocol, Strategy
from mechscope.errors import SettingsError
from mechscope.settings import Count, Settings, nested
from mechscope.settings.decoding import Decoding
from mechscope.settings.lora import LoraSettings
from mechscope.settings.training import TrainSettings
from mechscope.subject.anatomy import Anatomy
from mechscope.subject.components import Components

ArmProtocol = Literal[BudgetProtocol, "reference"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
PROTOCOLS: tuple[BudgetProtocol, ...] = get_args(BudgetProtocol)
REFERENCES: tuple[Strategy, ...] = ("full", "none")
MORE_RANK: tuple[Strategy, ...] = ("more_rank", "circuit_rank")
_OF_LAYERS: tuple[Strategy, ...] = ("targeted_layers", "more_rank", "random_layers", "last_layers")
NO_SEED = -1  # the untouched base was trained from no seed


@dataclass(frozen=True, kw_only=True)
class BakeOffSettings(Settings):
    """What a bake-off compares.

    Attributes:
        layers: The targeted layers, whole (`layers:2,3,5`); needed by `targeted_layers`, `more_rank`, `random_layers` and `last_layers`.
        heads: The targeted heads; needed by the strategy `targeted_heads` alone.
        circuit: The circuit's heads and MLPs; needed by `circuit` and `random_circuit`.
        circuit_layers: The circuit's critical layers, whole; needed by `circuit_rank`.
        strategies: Which strategies run; without any, all whose components are given.
        protocols: Which protocols run.
        seeds: One training of each arm per seed.
        lora: Rank of standard LoRA, and what all adapters have in common.
        training: How each arm is trained, each seed in turn.
        decoding: How the held-out documents are summarized.
    """

    layers: Components = field(default_factory=Components)
    heads: Components = field(default_factory=Components)
    circuit: Components = field(default_factory=Components)
    circuit_layers: Components = field(default_factory=Components)
    strategies: tuple[Strategy, ...] = ()
    protocols: tuple[BudgetProtocol, ...] = PROTOCOLS
    seeds: tuple[Count, ...] = (0, 1, 2)
    lora: LoraSettings = nested(LoraSettings)
    training: TrainSettings = nested(TrainSettings)
    decoding: Decoding = PAPER

    def __post_init__(self) -> None:
        """Refuse what cannot be compared; strategies that are not named are filled in.

        Raises:
            SettingsError: A strategy or protocol is not known, its components are missing, or there are no seeds.
        """
        super().__post_init__()
        if not self.seeds or not self.protocols:
            raise SettingsError("a bake-off needs at least one protocol and one seed")
        if len(set(self.seeds)) < len(self.seeds):
            raise SettingsError(f"bake-off seeds {self.seeds} must be different numbers")
        for name, layers in (("targeted", self.layers), ("critical", self.circuit_layers)):
            if layers.heads or layers.mlps:
                raise SettingsError(f"{name} layers {layers} must be whole layers such as 'layers:2,3,5'")
        if self.circuit.layers:
            raise SettingsError(f"circuit {self.circuit} must be heads and MLPs such as 'a3.h5,m3', not whole layers")
        needs = self._missing()
        if not self.strategies:
            object.__setattr__(self, "strategies", tuple(strategy for strategy in STRATEGIES if strategy not in needs))
        for strategy in self.strategies:
            if strategy in needs:
                raise SettingsError(f"the strategy {strategy} needs {needs[strategy]}: name them or leave the strategy out")
            if strategy in MORE_RANK and self.lora.rank < 2:
                raise SettingsError(f"the strategy {strategy} keeps half the standard's rank elsewhere, so the rank must be at least 2")

    def _missing(self) -> dict[Strategy, str]:
        """Return the strategies whose components are not given, and what they need."""
        needs: dict[Strategy, str] = {}
        if not self.layers.layers:
            needs.update(dict.fromkeys(_OF_LAYERS, "target layers, such as 'layers:2,3,5'"))
        if not self.heads.heads:
            needs["targeted_heads"] = "heads, such as 'a2.h1,a3.h5'"
        if not len(self.circuit):
            needs["circuit"] = needs["random_circuit"] = "a circuit's heads and MLPs, such as 'a3.h5,m3'"
        if not len(self.circuit_layers):
            needs["circuit_rank"] = "the circuit's critical layers, such as 'layers:2,5'"
        return needs


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

    protocol: ArmProtocol
    strategy: Strategy
    seed: int
    components: str
    placed: Placement | None

    @property
    def trained(self) -> bool:
        """Whether anything is trained at all."""
        return self.strategy != "none"


def plan(subject: Any, settings: BakeOffSettings) -> tuple[Arm, ...]:
    """List all arms of a base `Subject`, seeds outermost; arms with the same placement and seed are one training listed twice.

    Raises:
        SettingsError: A selection does not fit the model, or a placement cannot have the standard's number of parameters.
    """
    for components in (settings.layers, settings.heads, settings.circuit, settings.circuit_layers):
        components.validate(subject.anatomy)
    arms = []
    if "none" in settings.strategies:
        arms.append(Arm("reference", "none", NO_SEED, "none", None))
    for seed in settings.seeds:
        for protocol in settings.protocols:
            for strategy in settings.strategies:
                if strategy not in REFERENCES:
                    where, placed = _placed(subject, settings, protocol, strategy, seed)
                    arms.append(Arm(protocol, strategy, seed, str(where), placed))
        if "full" in settings.strategies:
            arms.append(Arm("reference", "full", seed, "all", None))
    return tuple(arms)


def _placed(
    subject: Any, settings: BakeOffSettings, protocol: BudgetProtocol, strategy: Strategy, seed: int
) -> tuple[Components, Placement]:
    """Choose components and ranks of one LoRA arm."""
    everywhere = Components.of_layers(range(subject.anatomy.n_layers))
    standard = place(subject, everywhere, rank=settings.lora.rank, modules=settings.lora.lora_modules)
    if strategy == "standard":
        return everywhere, standard
    components = _components(subject.anatomy, settings, strategy, seed)
    targets = find_targets(subject, components, modules=settings.lora.lora_modules)
    low = [(target, settings.lora.rank // 2) for target in standard.targets if target not in targets] if strategy in MORE_RANK else []
    if strategy in MORE_RANK and not low:
        raise SettingsError(f"the strategy {strategy} keeps half the rank in other layers than {components}: name some layers, and not all")
    if protocol == "equal_parameters":
        return components, spend(targets, standard.trainable_parameters, fixed=low, what=strategy)
    maps = [*targets, *(target for target, _ in low)]
    return components, placement(maps, [*[settings.lora.rank] * len(targets), *(rank for _, rank in low)])


def _components(anatomy: Anatomy, settings: BakeOffSettings, strategy: Strategy, seed: int) -> Components:
    layers = settings.layers.layers
    match strategy:
        case "targeted_heads":
            return settings.heads
        case "circuit":
            return settings.circuit
        case "circuit_rank":
            return settings.circuit_layers
        case "last_layers":
            return Components.of_layers(range(anatomy.n_layers - len(layers), anatomy.n_layers))
        case "random_layers":
            return Components.of_layers(random_layers(anatomy.n_layers, layers, seed))
        case "random_circuit":
            anatomy.require_all_attending("strategy random_circuit")
            return random_circuit(settings.circuit, anatomy.n_layers, anatomy.n_heads, seed)
        case _:
            return settings.layers
