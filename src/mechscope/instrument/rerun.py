"""Running a model again with something changed, from where the change is (idea 7 of the design).

A change in layer l leaves the layers before it untouched. A `CachedRun` is a run that keeps what its layers computed; `rerun` takes any number of
changed runs ("units"), puts those that begin at the same place side by side as rows of one batch, and begins there:

1. a change inside attention (q, k, v, pattern, z, a knockout) begins after the projections: z is patched, W_O applied, and the rest of the
   block runs with attention replaced by that result;
2. a change of the attention output begins there;
3. a change of neurons, of experts or of the MLP output begins behind the block: residual + (new − old);
4. a change of the residual stream begins with the next block.

Changes further up act by `intervene` on their unit's rows. In the last block the MLP runs only where its result is read, and only these rows of
the last residual stream are returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechscope.errors import ModelError, SettingsError
from mechscope.instrument.attention import AttentionCall, attend, observed
from mechscope.instrument.edits import Change, Edit, apply, rewritten, validate, with_patterns
from mechscope.instrument.experts import ExpertOutputs, with_edits
from mechscope.instrument.intervene import intervene
from mechscope.instrument.patterns import pattern
from mechscope.instrument.record import Recording, Site, record
from mechscope.instrument.substitutes import fused_activations, only_at, stubbed, writing_instead
from mechscope.instrument.walk import Walk
from mechscope.shapes import by_shape
from mechscope.subject.anatomy import Block
from mechscope.subject.load import Subject
from mechscope.subject.placement import index_for, sent

Unit = Sequence[Change]
# where in a block a change begins
_STAGE = {
    "embedding": 0,
    **dict.fromkeys(("query", "key", "value", "mask", "pattern", "z"), 1),
    "attention_output": 2,
    "mixer_output": 2,
    "neuron": 3,
    "expert_output": 3,
    "mlp_output": 4,
    "residual": 5,
}
# tokens of one batch of units: enough for full speed of the matrix products, few enough to stay near the processor
TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Reading:
    """Which rows of the last residual stream are read: ``(read,)`` rows of the batch (`example`) and tokens in them (`position`)."""

    example: Int[Tensor, " read"]
    position: Int[Tensor, " read"]

    __repr__ = by_shape

    @classmethod
    def of(cls, where: Bool[Tensor, "batch token"]) -> Reading:
        """Read the marked tokens, text by text."""
        example, position = where.nonzero(as_tuple=True)
        return cls(example, position)

    def __len__(self) -> int:
        return len(self.example)

    def take(self, hidden: Float[Tensor, "units batch token d"]) -> Float[Tensor, "units read d"]:
        """Gather the rows out of several runs of the batch."""
        return hidden[:, sent(self.example, hidden.device), sent(self.position, hidden.device)]


class CachedRun:
    """One run of a batch that keeps what `rerun` needs.

    Attributes:
        subject: The model.
        input_ids: ``(batch, token)``.
        real: ``(batch, token)`` on the CPU, True where a token is real; None if all are.
        recording: The chosen sites, and the residual streams.
    """

    def __init__(
        self,
        subject: Subject,
        input_ids: Int[Tensor, "batch token"],
        real: Bool[Tensor, "batch token"] | None = None,
        *,
        sites: Collection[Site | str] = (),
    ) -> None:
        """Run the batch; `sites` are what changes begin at and sources are taken from, and residual streams are always kept."""
        self.subject = subject
        self.input_ids = sent(input_ids, subject.device)
        # on the CPU: every walk asks where the padding stands, and must not wait for a device to know
        real = None if real is None else real.cpu()
        self.real = None if real is None or bool(real.all()) else real
        self._walks: dict[int, Walk] = {}
        self._calls: dict[int, AttentionCall] = {}
        needed = {site for site in sites if site not in ("mask", "pattern")}
        if "neuron" in needed:
            needed.add("mlp_output")
        inside = any(_STAGE.get(site) == 1 for site in sites)
        recorded = cast(set[Site], (needed - {"embedding"}) | {"residual"} | ({"pattern"} if "pattern" in sites else set()))

        def tap(call: AttentionCall) -> None:
            self._calls[call.layer] = call

        with torch.no_grad(), observed(subject, tap if inside else None), fused_activations(subject):
            walk = self._walk(1)
            with record(subject, *sorted(recorded)) as recording:
                walk.run()
        self.recording: Recording = recording
        self.recording.values["embedding", 0] = walk.hidden

    @property
    def batch(self) -> int:
        """Number of texts."""
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens of a text, padding included."""
        return self.input_ids.shape[1]

    @property
    def tokens(self) -> Bool[Tensor, "batch token"]:
        """Mark the real tokens."""
        return torch.ones_like(self.input_ids, dtype=torch.bool) if self.real is None else self.real

    def read(self, reading: Reading) -> Float[Tensor, "read d_model"]:
        """Return rows of the last residual stream, unchanged."""
        return reading.take(self.recording["residual", self.subject.anatomy.n_layers - 1][None])[0]

    @torch.no_grad()
    def resume(self, layer: int, reading: Reading) -> Float[Tensor, "read d_model"]:
        """Run the batch from a layer on with the model as it is now, for weights that were changed there.

        Args:
            layer: First block to run; −1 to begin with the embedding.
            reading: Which rows are read.
        """
        if layer < 0:
            return CachedRun(self.subject, self.input_ids, self.real).read(reading)
        with observed(self.subject), fused_activations(self.subject):
            hidden = self.input_of(layer)
            return reading.take(self._walk(1).run(hidden, start=layer)[None])[0]

    def input_of(self, layer: int) -> Float[Tensor, "batch token d_model"]:
        """Return the residual stream that a block reads."""
        return self.recording["residual", layer - 1] if layer else self.recording["embedding"]

    @torch.no_grad()
    def rerun(
        self, units: Sequence[Unit], reading: Reading, *, tokens_per_pass: int = TOKENS_PER_PASS
    ) -> Iterator[tuple[list[int], Float[Tensor, "units read d_model"]]]:
        """Run the batch again once per unit, each with its own changes.

        Args:
            units: Changes of each run; their values, positions and masks are those of the batch, without rows.
            reading: Which rows are read.
            tokens_per_pass: Most tokens of one forward pass, padding included.

        Yields:
            Indices of some units, and the rows that are read of their last residual streams. Units come in order of their layers.

        Raises:
            SettingsError: A change names something the model does not have, or a site this run did not keep.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, unit in enumerate(units):
            validate(unit, self.subject.anatomy)
            for change in unit:
                if change.site in ("neuron", "expert_output", "mlp_output") and not self.subject.adds:
                    raise ModelError(
                        f"{self.subject.family}: what attention and MLPs write does not just add up to the residual stream, so a changed {change.site} "
                        "cannot be rerun from behind its block: change 'residual', or use intervene"
                    )
            start = min(((change.layer, _STAGE[change.site]) for change in unit), default=(self.subject.anatomy.n_layers, 0))
            groups.setdefault(start, []).append(index)
        at_once = max(1, tokens_per_pass // self.input_ids.numel())
        with observed(self.subject), fused_activations(self.subject):
            for start, members in sorted(groups.items()):
                for first in range(0, len(members), at_once):
                    chunk = members[first : first + at_once]
                    yield chunk, self._run_from(start, [units[index] for index in chunk], reading)

    def _run_from(self, start: tuple[int, int], units: list[Unit], reading: Reading) -> Tensor:
        layer, stage = start
        # where something stands between heads and W_O, the block's own code makes of z what is written
        whole = stage == 1 and not self.subject.heads_write
        if layer == self.subject.anatomy.n_layers:  # nothing is changed
            return self.read(reading).expand(len(units), -1, -1)
        later = [
            change.on_rows(slice(number * self.batch, (number + 1) * self.batch))
            for number, unit in enumerate(units)
            for change in unit
            if whole or change.layer > layer or (stage < 3 and _STAGE[change.site] > stage)
        ]
        walk = self._walk(len(units))
        with intervene(self.subject, *later), self._last_block(start, len(units), later, reading):
            if whole:
                hidden = self.input_of(layer).repeat(len(units), 1, 1)
            else:
                hidden, layer = self._begin(walk, layer, stage, units)
            hidden = walk.run(hidden, start=layer)
        return reading.take(hidden.unflatten(0, (len(units), self.batch)))

    def _last_block(
        self, start: tuple[int, int], units: int, later: Sequence[Change], reading: Reading
    ) -> contextlib.AbstractContextManager[object]:
        """Let the last block work only where it is read: nothing comes after it that would look at other tokens."""
        last = self.subject.anatomy.n_layers - 1
        if start >= (last, 3) or any(
            change.layer == last and change.site in ("attention_output", "mixer_output", "neuron", "expert_output", "mlp_output")
            for change in later
        ):
            return contextlib.nullcontext()  # no block runs, or those edits are made on whole texts
        block = self.subject.anatomy.blocks[last]
        wanted = (reading.example * self.length + reading.position).unique()
        rows = (torch.arange(units)[:, None] * self.batch * self.length + wanted.to("cpu")).flatten()
        stack = contextlib.ExitStack()
        if block.attends:
            stack.enter_context(only_at(block.output.module, block.output.module, rows))
        stack.enter_context(only_at(block.mlp_read, block.mlp_write, rows))
        return stack

    def _begin(self, walk: Walk, layer: int, stage: int, units: list[Unit]) -> tuple[Tensor, int]:
        """Return the units' residual streams behind what is changed first, and the layer to go on with."""
        block = self.subject.anatomy.blocks[layer]
        now = [[change for change in unit if change.layer == layer] for unit in units]
        if stage == 0:
            # blocks run from here on, with hooks for what is changed further up
            return torch.cat([apply(_edits(changes, "embedding"), self.input_of(0)) for changes in now]), 0
        if stage >= 3:
            return torch.cat([self._behind(block, layer, changes) for changes in now]), layer + 1
        given = self.input_of(layer).repeat(len(units), 1, 1)
        if stage == 1:
            z = torch.cat([self._z(layer, changes) for changes in now])
            attention = block.output.module(z.flatten(2))
            with stubbed(block.attention, (attention, None)):
                return walk.step(layer, given), layer + 1
        site = block.mixing_site
        written = torch.cat([apply(_edits(changes, site), self._recorded(site, layer)) for changes in now])
        written = written if block.multiplier == 1.0 else written / block.multiplier  # what is added, before the block multiplies it
        with writing_instead(block, written, given):
            return walk.step(layer, given), layer + 1

    def _z(self, layer: int, changes: Sequence[Change]) -> Tensor:
        """Patch what the heads of one layer compute."""
        try:
            call = self._calls[layer]
        except KeyError:
            raise SettingsError("this run did not keep attention: name the sites to change when it is made, e.g. sites=('z',)") from None
        z = call.z
        inside = [change for change in changes if change.site in ("query", "key", "value", "mask")]
        inputs = rewritten(call, inside)
        if inside:
            heads = sorted({head for change in inside for head in (range(z.shape[2]) if change.heads is None else change.heads)})
            z = z.clone()
            z[:, :, index_for(heads, z)] = attend(_of_heads(inputs, heads))
        if at := _edits(changes, "pattern"):
            z = with_patterns(at, inputs.value, z, lambda: pattern(AttentionCall(**{**vars(inputs), "z": z}), dtype=z.dtype))
        return apply(_edits(changes, "z"), z)

    def _behind(self, block: Block, layer: int, changes: Sequence[Change]) -> Tensor:
        """Change what the MLP wrote, or the residual stream behind the block."""
        hidden = self.recording["residual", layer]
        neurons, experts, outputs = (_edits(changes, site) for site in ("neuron", "expert_output", "mlp_output"))
        added: Tensor | float = with_edits(experts, self._experts(layer)).difference if experts else 0.0
        if neurons or outputs:
            old = written = self._recorded("mlp_output", layer)
            if neurons:
                written = block.mlp_down(apply(neurons, self._recorded("neuron", layer)))
                if block.mlp_behind is not None:
                    written = block.mlp_behind(written)
                written = written if block.multiplier == 1.0 else written * block.multiplier
            hidden = hidden + (apply(outputs, written + added) - old)
        elif experts:
            hidden = hidden + added
        return apply(_edits(changes, "residual"), hidden)

    def _recorded(self, site: str, layer: int) -> Tensor:
        try:
            return self.recording.values[site, layer]
        except KeyError:
            raise SettingsError(
                f"this run did not keep {site!r}: name the sites to change when it is made, e.g. sites=({site!r},)"
            ) from None

    def _experts(self, layer: int) -> ExpertOutputs:
        try:
            return self.recording.experts[layer]
        except KeyError:
            raise SettingsError(
                "this run did not keep experts: name the sites to change when it is made, e.g. sites=('expert_output',)"
            ) from None

    def _walk(self, units: int) -> Walk:
        """Return the pass of `units` copies of the batch; the single one is kept, and the latest two: a layer's full passes and its rest."""
        walk = self._walks.pop(units, None)
        if walk is None:
            others = [number for number in self._walks if number != 1]
            for number in others[:-1]:
                del self._walks[number]
            real = None if self.real is None else self.real.repeat(units, 1)
            walk = Walk(self.subject, self.input_ids.repeat(units, 1), real)
        self._walks[units] = walk
        return walk


def _edits(changes: Sequence[Change], site: str) -> list[Edit]:
    return [change for change in changes if isinstance(change, Edit) and change.site == site]


def _of_heads(inputs: Any, heads: list[int]) -> Any:
    """Cut some query heads out of an attention module's inputs, each with the key and value it sees."""
    n_heads = inputs.query.shape[1]
    if len(heads) == n_heads:
        return inputs
    groups = {name: n_heads // getattr(inputs, name).shape[1] for name in ("key", "value")}
    own = index_for(heads, inputs.query)
    mask = inputs.mask if inputs.mask is None or inputs.mask.shape[1] == 1 else inputs.mask[:, own]
    key, value = (getattr(inputs, name)[:, own // group] for name, group in groups.items())
    sinks = None if inputs.sinks is None else inputs.sinks[own]
    return replace(inputs, query=inputs.query[:, own], key=key, value=value, mask=mask, sinks=sinks)
