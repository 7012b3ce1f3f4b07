"""What is changed in a forward pass, as values.

An `Edit` says where (a site of a layer, some heads or neurons of it, some tokens, some rows of the batch) and what stands there instead: a tensor,
a number, or a function of what stood there. A `Knockout` cuts attention between query and key positions. Both are declared once and used by
`intervene` (any forward pass, `generate` included) and by `CachedRun.rerun` (sweeps that start in the middle of the model).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.instrument.attention import AttentionInputs
from mechscope.shapes import by_shape
from mechscope.subject.anatomy import Anatomy
from mechscope.subject.placement import index_for, sent

EditSite = Literal[
    "embedding",
    "query",
    "key",
    "value",
    "pattern",
    "z",
    "attention_output",
    "mixer_output",
    "neuron",
    "expert_output",
    "mlp_output",
    "residual",
]
# in the order in which a block reaches them; `embedding` is what the first block reads
EDIT_SITES: tuple[str, ...] = get_args(EditSite)
HEAD_SITES = frozenset({"query", "key", "value", "pattern", "z"})
# sites whose values have an axis of heads or experts before the last
_OF_UNITS = HEAD_SITES | {"expert_output"}
Value = Tensor | float | Callable[[Tensor], Tensor]
Rows = slice | Sequence[int]


@dataclass(frozen=True)
class Edit:
    """One change of one site of one layer.

    Values have the layout in which `record` gives the site: ``(batch, token, head, d_head)`` for query, key, value and z (key and value may
    hold key/value heads or query heads), ``(batch, head, query, key)`` for pattern, ``(batch, token, expert, d_model)`` of the chosen experts for
    expert_output, ``(batch, token, features)`` for the rest. A tensor of a smaller shape is broadcast. Only the chosen heads, experts, features, tokens
    and rows are replaced.

    Attributes:
        site: Where in the block.
        layer: Which block; 0 for `embedding`.
        value: What stands there instead: a tensor, a number, or a function of the rows that stood there.
        heads: Query heads; None for all. One query head of a group can have a key or value of its own.
        features: Neurons or residual dimensions, None for all; of sites without heads.
        positions: ``(batch, token)``, True where a token is changed; None for all. Of a pattern: query tokens.
        rows: Rows of the batch that are changed; None for all. Value and positions then have one entry per chosen row.
        experts: Experts, None for all; of site `expert_output`.
    """

    site: EditSite
    layer: int
    value: Value
    heads: tuple[int, ...] | None = None
    features: tuple[int, ...] | None = None
    positions: Bool[Tensor, "batch token"] | None = None
    rows: Rows | None = None
    experts: tuple[int, ...] | None = None

    __repr__ = by_shape

    def __post_init__(self) -> None:
        _as_list_of_rows(self)

    def on_rows(self, rows: slice) -> Edit:
        """Return the same change on some rows of a larger batch.

        Raises:
            SettingsError: It is already on some rows.
        """
        if self.rows is not None:
            raise SettingsError(
                f"the edit of {self.site} in layer {self.layer} already names rows of the batch: a sweep places edits itself"
            )
        return replace(self, rows=rows)


@dataclass(frozen=True)
class Knockout:
    """Attention cut between query and key positions (Geva et al. 2023): those scores become −∞, the rest of the row is renormalised.

    Attributes:
        layer: Which block.
        queries: ``(batch, token)``: the tokens that may not look.
        keys: ``(batch, token)``: the tokens that are not seen.
        heads: Query heads; None for all.
        rows: Rows of the batch; None for all.
    """

    layer: int
    queries: Bool[Tensor, "batch token"]
    keys: Bool[Tensor, "batch token"]
    heads: tuple[int, ...] | None = None
    rows: Rows | None = None
    site: Literal["mask"] = "mask"

    __repr__ = by_shape

    def __post_init__(self) -> None:
        _as_list_of_rows(self)

    def on_rows(self, rows: slice) -> Knockout:
        """Return the same cut on some rows of a larger batch."""
        return replace(self, rows=rows)


def _as_list_of_rows(change: Edit | Knockout) -> None:
    # a tuple would index axes where a list indexes rows
    if isinstance(change.rows, tuple):
        object.__setattr__(change, "rows", list(change.rows))


Change = Edit | Knockout


def validate(changes: Sequence[Change], anatomy: Anatomy) -> None:
    """Check that every change names something the model has.

    Raises:
        SettingsError: A site, layer, head or feature does not exist.
    """
    for change in changes:
        if isinstance(change, Edit) and change.site not in EDIT_SITES:
            raise SettingsError(f"site {change.site!r} cannot be changed: the sites are {', '.join(EDIT_SITES)}")
        if not 0 <= change.layer < anatomy.n_layers:
            raise SettingsError(f"layer {change.layer} does not exist: the model has layers 0-{anatomy.n_layers - 1}")
        layer_mixes = change.layer in anatomy.mixing
        of_attention = change.site in HEAD_SITES or change.site in ("attention_output", "mask")
        if (of_attention and layer_mixes) or (change.site == "mixer_output" and not layer_mixes):
            raise SettingsError(f"layer {change.layer} has no {change.site} to change: {anatomy.instead(change.layer)}")
        for head in change.heads or ():
            if not 0 <= head < anatomy.n_heads:
                raise SettingsError(f"head a{change.layer}.h{head} does not exist: the model has heads 0-{anatomy.n_heads - 1}")
        if not isinstance(change, Edit):
            continue
        if change.site == "embedding" and change.layer:
            raise SettingsError(f"the embedding is what layer 0 reads, not layer {change.layer}: for later layers change 'residual'")
        if change.site == "expert_output":
            _require_experts(change, anatomy)
        elif change.experts is not None:
            raise SettingsError(f"site {change.site!r} has no experts: leave experts out, or change 'expert_output'")
        if change.heads is not None and change.site not in HEAD_SITES:
            raise SettingsError(f"site {change.site!r} has no heads: leave heads out, or change 'z' (what a head computes)")
        if change.features is not None:
            if change.site in _OF_UNITS:
                chosen_by = "heads" if change.site in HEAD_SITES else "experts"
                raise SettingsError(f"site {change.site!r} is chosen by {chosen_by}, not by features")
            width = anatomy.blocks[change.layer].d_mlp if change.site == "neuron" else anatomy.d_model
            for feature in change.features:
                if not 0 <= feature < width:
                    raise SettingsError(f"feature {feature} of {change.site} in layer {change.layer} does not exist: there are {width}")


def _require_experts(edit: Edit, anatomy: Anatomy) -> None:
    experts = anatomy.blocks[edit.layer].experts
    if experts is None:
        raise SettingsError(f"the MLP of layer {edit.layer} is dense: it has no experts to change")
    for expert in edit.experts or ():
        if not 0 <= expert < experts.number:
            raise SettingsError(f"expert m{edit.layer}.e{expert} does not exist: the layer has experts 0-{experts.number - 1}")


def apply(edits: Sequence[Edit], current: Tensor) -> Tensor:
    """Return a site's values with the edits made, one after another; the values given stay as they are."""
    changed = current
    for edit in edits:
        if edit.rows is None:
            changed = _edited(edit, changed)
        else:
            changed = changed.clone() if changed is current else changed
            rows = _rows(edit, changed)
            changed[rows] = _edited(edit, changed[rows])
    return changed


def _edited(edit: Edit, part: Tensor) -> Tensor:
    """Change the rows an edit is about: ``(row, token, head, d_head)``, ``(row, token, expert, d_model)`` or ``(row, token, features)``."""
    heads, units = edit.site in HEAD_SITES, edit.site in _OF_UNITS
    if callable(edit.value):
        value = sent(edit.value(part), part.device)
    else:
        value = sent(torch.as_tensor(edit.value, dtype=part.dtype), part.device)
        if heads and value.ndim >= 2 and value.shape[-2] not in (1, part.shape[-2]):
            # key and value of key/value heads, for one query head of the group
            value = value.repeat_interleave(part.shape[-2] // value.shape[-2], dim=-2)
    keep = torch.ones((), dtype=torch.bool, device=part.device)
    if edit.heads is not None:
        keep = keep & _chosen(edit.heads, part.shape[-2], part.device)[:, None]
    if edit.features is not None:
        keep = keep & _chosen(edit.features, part.shape[-1], part.device)
    if edit.positions is not None:
        where = sent(edit.positions, part.device)
        if where.shape[-1] != part.shape[1] or where.shape[0] not in (1, part.shape[0]):
            raise SettingsError(
                f"positions of shape {tuple(where.shape)} do not fit {part.shape[0]} rows of {part.shape[1]} tokens at {edit.site} of layer {edit.layer}"
            )
        keep = keep & (where[..., None, None] if units else where[..., None])
    _require_fit(edit, value, part)
    if not keep.ndim and value.shape == part.shape and value.dtype == part.dtype:
        return value.clone()  # all of it: nothing of what stood there stays in an autograd graph
    return torch.where(keep, value, part)


def _require_fit(edit: Edit, value: Tensor, part: Tensor) -> None:
    # before anything is computed: there the same type of error also says that memory ran out
    try:
        fits = torch.broadcast_shapes(value.shape, part.shape) == part.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise SettingsError(
            f"a value of shape {tuple(value.shape)} does not fit {edit.site} of layer {edit.layer}, which has shape {tuple(part.shape)}"
        )


def _rows(change: Change, of: Tensor) -> slice | Tensor:
    """Return an index of the rows a change is about."""
    if change.rows is None:
        return slice(None)
    return change.rows if isinstance(change.rows, slice) else index_for(change.rows, of)


def _chosen(indices: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    mark = torch.zeros(size, dtype=torch.bool)
    mark[list(indices)] = True
    return sent(mark, device)


def rewritten(inputs: AttentionInputs, changes: Sequence[Change]) -> AttentionInputs:
    """Return an attention module's inputs with edits of query, key and value and with knockouts made; others are passed over."""
    changed: dict[str, Any] = {}
    for site in ("query", "key", "value"):
        edits = [change for change in changes if isinstance(change, Edit) and change.site == site]
        if not edits:
            continue
        current = getattr(inputs, site)
        if any(edit.heads is not None for edit in edits):
            # a query head whose key or value is changed alone leaves its group
            current = current.repeat_interleave(inputs.query.shape[1] // current.shape[1], dim=1)
        changed[site] = apply(edits, current.transpose(1, 2)).transpose(1, 2)
    cuts = [change for change in changes if isinstance(change, Knockout)]
    if cuts:
        changed["mask"] = _cut(inputs, cuts)
    return replace(inputs, **changed) if changed else inputs


def _cut(inputs: AttentionInputs, cuts: Sequence[Knockout]) -> Bool[Tensor, "batch head query key"]:
    batch, heads, queries, _ = inputs.query.shape
    keys = inputs.key.shape[2]
    mask = inputs.mask
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=inputs.query.device).tril(keys - queries)
    mask = mask.expand(batch, heads, queries, keys).clone()
    for cut in cuts:
        if cut.queries.shape[-1] < queries or cut.keys.shape[-1] != keys:
            raise SettingsError(
                f"a knockout over {cut.keys.shape[-1]} tokens does not fit a pass with {queries} queries and {keys} keys: during generation "
                "the text grows, so attention cannot be cut by position there"
            )
        rows = _rows(cut, mask)
        pairs = sent(cut.queries, mask.device)[:, None, -queries:, None] & sent(cut.keys, mask.device)[:, None, None, :]
        if cut.heads is not None:
            pairs = pairs & _chosen(cut.heads, heads, mask.device)[:, None, None]
        mask[rows] = mask[rows] & ~pairs
    return mask


def with_patterns(edits: Sequence[Edit], value: Tensor, z: Tensor, current: Callable[[], Tensor]) -> Tensor:
    """Return z where some heads' patterns were replaced: z = P·V with the values of this pass.

    Args:
        edits: Edits of `pattern`.
        value: ``(batch, kv_head, key, d_head)``.
        z: ``(batch, query, head, d_head)`` so far.
        current: Gives the whole pattern, where an edit is a function of it.
    """
    value = value.repeat_interleave(z.shape[2] // value.shape[1], dim=1)
    changed = z.clone()
    for edit in edits:
        rows = _rows(edit, z)
        chosen = slice(None) if edit.heads is None else index_for(edit.heads, z)
        if callable(edit.value):
            p = edit.value(current()[rows])
        else:
            p = sent(torch.as_tensor(edit.value, dtype=z.dtype), z.device)
        p = p.expand(*z[rows].shape[:1], z.shape[2], z.shape[1], value.shape[2])[:, chosen]
        new = (p @ value[rows][:, chosen]).transpose(1, 2)
        if edit.positions is not None:
            new = torch.where(sent(edit.positions, z.device)[..., None, None], new, changed[rows][:, :, chosen])
        part = changed[rows]
        part[:, :, chosen] = new
        changed[rows] = part
    return changed
