"""Which entries of which linear maps a low-rank update may change.

A selection of components is turned into targets: one per linear map, with the output features (rows) and input features (columns) that may
change. A whole layer frees whole maps. A head frees only its own slices: its output features of query, key and value, its input features of
the output projection. With grouped queries a head's key and value slices are those of the key/value head it shares with its group, so the
update reaches the group's attention through them; nothing smaller exists in the weights.

A low-rank update ΔW = B A costs (active rows + active columns) parameters per unit of rank, whatever the map's full size: parameters that are
zero and stay zero are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mechscope.choices import LoraModules
from mechscope.errors import SettingsError
from mechscope.shapes import by_shape
from mechscope.subject.anatomy import Block, Slice
from mechscope.subject.components import Components
from mechscope.subject.linear import is_conv1d, oriented_weight


@dataclass(frozen=True)
class Target:
    """One linear map that learns, or the part of it that does.

    Attributes:
        name: Path of the linear module in the plain Hugging Face model.
        out_features: Output features of the map.
        in_features: Input features of the map.
        conv1d: Whether the weight is stored as (input, output).
        rows: Output features that may change; None for all.
        columns: Input features that may change; None for all.
    """

    name: str
    out_features: int
    in_features: int
    conv1d: bool
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None

    @property
    def active(self) -> tuple[int, int]:
        """How many output and input features may change."""
        rows = self.out_features if self.rows is None else len(self.rows)
        return rows, self.in_features if self.columns is None else len(self.columns)

    @property
    def cost(self) -> int:
        """Trainable parameters per unit of rank."""
        return sum(self.active)

    @property
    def capacity(self) -> int:
        """The highest rank a change of this shape can have."""
        return min(self.active)


@dataclass(frozen=True)
class Placement:
    """Targets with the rank each of them gets, in the same order."""

    targets: tuple[Target, ...]
    ranks: tuple[int, ...]

    __repr__ = by_shape

    @property
    def trainable_parameters(self) -> int:
        """Entries that can move: zeros that stay zero are not counted."""
        return sum(target.cost * rank for target, rank in zip(self.targets, self.ranks, strict=True))

    @property
    def rank_text(self) -> str:
        """The ranks as a table shows them: `8`, or `8-9` where they differ."""
        low, high = min(self.ranks), max(self.ranks)
        return str(low) if low == high else f"{low}-{high}"


def find_targets(subject: Any, components: Components, *, modules: LoraModules = "attention") -> tuple[Target, ...]:
    """List the linear maps that a selection of components frees.

    Args:
        subject: The `Subject` whose weights would learn.
        components: Heads free their slices of q, k, v and the output projection, MLPs (`m3`) their linear maps (of a mixture of experts those that all tokens
            pass: its experts share stacked weights and are left as they are), mixers (`mixer3`) theirs, whole layers what `modules` says.
        modules: What a whole layer means: `"attention"` (q, k, v and output projection, LoRA's usual place; in a layer that does not attend its mixer's
            linear maps), `"mlp"`, or `"all"`.

    Raises:
        SettingsError: The selection is empty or names what the model lacks.
    """
    if modules not in ("attention", "mlp", "all"):
        raise SettingsError(f"modules {modules!r} is not known: use 'attention', 'mlp' or 'all'")
    if not len(components):
        raise SettingsError("the selection of components is empty ('none'): name at least one layer, head or MLP to adapt")
    anatomy = subject.anatomy
    if components.experts:
        layer, expert = components.experts[0]
        raise SettingsError(
            f"m{layer}.e{expert} is an expert: the experts of a layer share stacked weights, which PEFT adapts all together (target_parameters) and never one "
            "alone; adapt heads or layers instead, or train everything (method full)"
        )
    components.validate(anatomy)
    whole = set(components.layers) if modules in ("attention", "all") else set()
    mlps = set(components.mlps) | (set(components.layers) if modules in ("mlp", "all") else set())
    targets: list[Target] = []
    for layer, block in enumerate(anatomy.blocks):
        if block.mixer is not None:
            if layer in whole or layer in components.mixers:
                targets.extend(_target(name, subject.plain.get_submodule(name), None, None) for name in block.mixer.linears)
            if layer in mlps:
                targets.extend(_mlp_targets(subject.plain, block))
            continue
        heads = None if layer in whole else [head for number, head in components.heads if number == layer]
        if heads is None or heads:
            targets.extend(_attention_targets(block, heads))
        if layer in mlps:
            targets.extend(_mlp_targets(subject.plain, block))
    return tuple(targets)


def place(
    subject: Any, components: Components, *, rank: int = 8, ranks: Mapping[str, int] | None = None, modules: LoraModules = "attention"
) -> Placement:
    """Give every target of a selection a rank.

    Args:
        subject: The `Subject` whose weights would learn.
        components: What learns.
        rank: Rank of every map that `ranks` does not name.
        ranks: Rank by module path.
        modules: What a whole layer means: `"attention"`, `"mlp"` or `"all"`.

    Raises:
        SettingsError: A rank is below one, more than its slice can hold, or given for a map that is not among the targets.
    """
    targets = find_targets(subject, components, modules=modules)
    ranks = dict(ranks or {})
    if unknown := sorted(set(ranks) - {target.name for target in targets}):
        raise SettingsError(f"ranks are given for {', '.join(unknown[:3])}, which {components} does not contain")
    return placement(targets, [ranks.get(target.name, rank) for target in targets])


def placement(targets: Iterable[Target], ranks: Iterable[int]) -> Placement:
    """Pair targets with ranks.

    Raises:
        SettingsError: A rank is below one or more than its slice can hold.
    """
    placed = Placement(tuple(targets), tuple(ranks))
    for target, rank in zip(placed.targets, placed.ranks, strict=True):
        if rank < 1:
            raise SettingsError(f"rank {rank} for {target.name}: a rank is at least 1")
        if rank > target.capacity:
            rows, columns = target.active
            raise SettingsError(
                f"rank {rank} for {target.name} is more than its {rows} × {columns} slice can hold: use at most {target.capacity}, or adapt more of the layer"
            )
    return placed


def _attention_targets(block: Block, heads: list[int] | None) -> list[Target]:
    """List the attention maps of one block; `heads` None frees them whole. Query, key and value that share a module are one target."""
    features: dict[str, set[int]] = {}
    slices: dict[str, Slice] = {}
    for piece in block.own_heads.slices.values():
        slices[piece.name] = piece
        owned = features.setdefault(piece.name, set())
        for head in heads or ():
            owned.update(piece.features(head).tolist())
    targets = []
    for name, piece in slices.items():
        chosen = None if heads is None else tuple(sorted(features[name]))
        rows, columns = (chosen, None) if piece.side == "output" else (None, chosen)
        targets.append(_target(name, piece.module, rows, columns))
    return targets


def _mlp_targets(model: Any, block: Block) -> list[Target]:
    if not block.mlp_linears:
        why = "" if block.experts is None else f" (its {block.experts.number} experts share stacked weights)"
        raise SettingsError(f"the MLP of {block.name} has no linear maps that LoRA could adapt{why}: leave it out of the selection")
    return [_target(name, model.get_submodule(name), None, None) for name in block.mlp_linears]


def _target(name: str, module: Any, rows: tuple[int, ...] | None, columns: tuple[int, ...] | None) -> Target:
    out_features, in_features = oriented_weight(module).shape
    # all features named one by one is the whole map: no mask is needed
    rows = None if rows is not None and len(rows) == out_features else rows
    columns = None if columns is not None and len(columns) == in_features else columns
    return Target(name, int(out_features), int(in_features), is_conv1d(module), rows, columns)
