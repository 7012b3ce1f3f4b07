"""Path patching: the effect of a sender on a receiver along chosen paths only (Wang et al. 2022; Goldowsky-Dill et al. 2023).

    1. The sender takes its value from the source run. What stands between it and the receivers stays as in the base run: attention always, MLPs
       unless `through_mlps`. The receivers' inputs are noted.
    2. The base run is run again with the receivers reading those inputs, everything behind them computed anew; the metric is read.

In step 1 only Δ, the change of what the sender writes, travels: behind a frozen layer the residual stream is base + Δ. So a block between sender and
receiver costs nothing, or its MLP alone, and the result is exact.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mechscope.causal.effects import Effects, effects, place_columns
from mechscope.causal.patching import Direction
from mechscope.causal.places import Place, places_of
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, Runs, check_fits, fetched, metric_of, score
from mechscope.errors import ModelError, SettingsError
from mechscope.instrument import AttentionCall, CachedRun, Edit, observed, record
from mechscope.instrument.execution import Execution
from mechscope.instrument.substitutes import stubbed
from mechscope.instrument.walk import Walk
from mechscope.subject import Components, Subject
from mechscope.subject.anatomy import Anatomy
from mechscope.subject.placement import index_for

_HEAD = re.compile(r"a(\d+)\.h(\d+)<([qkv])>")
_MLP = re.compile(r"m(\d+)")
ReceiverSite = Literal["query", "key", "value", "mlp_output", "logits"]
_INPUTS: dict[str, ReceiverSite] = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True)
class Receiver:
    """What reads the sender: a head's query, key or value, an MLP, or the logits.

    Attributes:
        site: `query`, `key`, `value`, `mlp_output` or `logits`.
        layer: Which block; the number of blocks for the logits.
        head: Which query head.
    """

    site: ReceiverSite
    layer: int
    head: int | None = None

    @classmethod
    def parse(cls, text: str, anatomy: Anatomy) -> Receiver:
        """Read `a5.h1<k>`, `m7` or `logits`.

        Raises:
            SettingsError: It is none of these, or the model has no such part.
        """
        if text == "logits":
            return cls("logits", anatomy.n_layers)
        if match := _HEAD.fullmatch(text):
            layer, head = int(match[1]), int(match[2])
            Components.of_heads([(layer, head)]).validate(anatomy)
            return cls(_INPUTS[match[3]], layer, head)
        if match := _MLP.fullmatch(text):
            layer = int(match[1])
            Components(mlps=(layer,)).validate(anatomy)
            return cls("mlp_output", layer)
        raise SettingsError(f"receiver {text!r} is not understood: write a5.h1<q>, a5.h1<k>, a5.h1<v>, m7 or logits")


def path_patch(
    subject: Subject,
    pairs: Pairs,
    senders: Components | str | None,
    receivers: Sequence[str],
    *,
    direction: Direction = "noise",
    metric: str = "logit-diff",
    through_mlps: bool = False,
    together: bool = False,
    execution: Execution = Execution(),
) -> Effects:
    """Patch the paths from senders to receivers.

    Args:
        subject: The model.
        pairs: Clean and corrupt prompts.
        senders: Heads, MLPs and whole layers; None for every head and MLP.
        receivers: For example `["a5.h1<k>"]`, `["m7", "logits"]`; the paths to all of them are patched at once.
        direction: `noise` (corrupt senders in the clean run) or `denoise`.
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        through_mlps: Let the paths lead through the MLPs between sender and receiver; otherwise only the direct path is patched.
        together: Patch all senders at once instead of one at a time.
        execution: Tokens of a batch (1,024 by default), progress.

    Returns:
        One row per sender, or one for all of them; `receivers` names what the paths lead to.

    Raises:
        MechscopeError: Senders, receivers, pairs or metric do not fit the model or each other.
    """
    if direction not in ("denoise", "noise"):
        raise SettingsError(f"direction {direction!r} is not known: use denoise (clean into corrupt) or noise (corrupt into clean)")
    anatomy = subject.anatomy
    if any(block.multiplier != 1.0 for block in anatomy.blocks):
        raise ModelError(f"{subject.family} scales what its blocks add (residual_multiplier): path patching is not supported")
    anatomy.require_all_attending("path patching")
    if not subject.heads_write:
        raise ModelError(
            f"{subject.family}: something (a gate, a norm) stands between its heads and their output projection: path patching is not supported"
        )
    if not receivers:
        raise SettingsError("no receiver was given: name at least one, such as 'logits' or 'a5.h1<k>'")
    wanted = [Receiver.parse(text, anatomy) for text in receivers]
    chosen = Components.of_layers(range(anatomy.n_layers)) if senders is None else senders
    chosen = Components.parse(chosen) if isinstance(chosen, str) else chosen
    each = sorted(places_of(chosen, anatomy), key=lambda place: (place.layer, place.site == "mlp_output", place.head or 0))
    if not each:
        raise SettingsError("no sender was given: name heads (a3.h5), MLPs (m3) or layers (layers:2)")
    sets = [tuple(each)] if together else [(place,) for place in each]
    check_fits(subject, pairs)
    recorded = {"z", "attention_output", "mlp_output", "query", "key", "value"}
    gathered = PerText(pairs)

    def patched(batch: PairBatch) -> dict[str, np.ndarray]:
        runs = {name: CachedRun(subject, getattr(batch, name), batch.real, sites=recorded) for name in ("clean", "corrupt")}
        by = metric_of(metric, batch, runs["clean"])
        unchanged = {name: Runs(run, by).unchanged() for name, run in runs.items()}
        base, source = (runs["clean"], runs["corrupt"]) if direction == "noise" else (runs["corrupt"], runs["clean"])
        paths = _Paths(base, source, wanted, through_mlps=through_mlps)
        changed = Runs(base, by)
        scores = []
        for senders_at_once in sets:
            noted = paths.send(senders_at_once)
            logits = noted.pop("logits", None)
            if logits is not None and noted:
                # both at once: what the other receivers add behind them meets Δ in the last residual stream
                scores.append(_with_direct(changed, noted, logits - base.recording["residual", anatomy.n_layers - 1]))
            elif logits is not None:
                with torch.no_grad():
                    scores.append(score(subject, changed.reading.take(logits[None]), by))
            else:
                scores.append(changed.launch([_edits(noted)]))
            gathered.step(1)
        return {**unchanged, "patched": fetched(torch.cat(scores))}

    gathered.run(patched, execution, tokens=1024, label="patching paths", units=len(sets))
    rows = [place_columns(place) for place in each]
    if together:
        rows = [{"component": str(chosen), "site": "set", "layer": -1, "head": -1, "feature": -1, "positions": "all"}]
    rows = [{**row, "receivers": ", ".join(receivers)} for row in rows]
    values, clean, corrupt = gathered["patched"], gathered["clean"], gathered["corrupt"]
    base = clean if direction == "noise" else corrupt
    return effects(rows, values, base, metric=metric, clean=clean, corrupt=corrupt, direction=direction, through_mlps=through_mlps)


Noted = dict[Receiver | str, Tensor]


def _edits(noted: Noted) -> list[Edit]:
    """Return the edits that let the receivers read what was noted."""
    return [
        Edit(receiver.site, receiver.layer, value, heads=None if receiver.head is None else (receiver.head,))
        for receiver, value in noted.items()
        if isinstance(receiver, Receiver) and receiver.site != "logits"
    ]


def _with_direct(runs: Runs, noted: Noted, delta: Tensor) -> Tensor:
    """Read the metric where some receivers' inputs are changed and Δ also reaches the logits directly."""
    last = runs.base.subject.anatomy.n_layers - 1
    added = Edit("residual", last, lambda hidden: hidden + delta.to(hidden.device))
    return runs.launch([[*_edits(noted), added]])


class _Paths:
    """Sends changes from senders to the receivers' inputs."""

    def __init__(self, base: CachedRun, source: CachedRun, receivers: Sequence[Receiver], *, through_mlps: bool) -> None:
        self.base, self.source, self.receivers, self.through_mlps = base, source, receivers, through_mlps
        self.anatomy = base.subject.anatomy
        self.walk = Walk(base.subject, base.input_ids, base.real)

    @torch.no_grad()
    def send(self, senders: Sequence[Place]) -> Noted:
        """Return what each receiver reads when the senders take the source run's values."""
        by_layer: dict[int, list[Place]] = {}
        for sender in senders:
            by_layer.setdefault(sender.layer, []).append(sender)
        open_mlps = set(range(self.anatomy.n_layers)) if self.through_mlps else set()
        receiving = {receiver.layer for receiver in self.receivers if receiver.site == "mlp_output"}
        noted = self._carry(by_layer, open_mlps)
        if "logits" in noted and open_mlps & receiving:
            # what an MLP receives it hands on in the second run: here it must not reach the logits through that MLP too
            noted["logits"] = self._carry(by_layer, open_mlps - receiving)["logits"]
        return noted

    def _carry(self, senders: dict[int, list[Place]], open_mlps: Collection[int]) -> Noted:
        """Carry Δ upwards, through the MLPs of some layers, and note what each receiver reads of it."""
        noted: Noted = {}
        end = max(receiver.layer for receiver in self.receivers)
        hidden: Tensor | None = None  # the residual stream before the block, once something has changed
        with observed(self.base.subject):
            for layer in range(min(senders), min(end + 1, self.anatomy.n_layers)):
                given = self.base.input_of(layer) if hidden is None else hidden
                here = [receiver for receiver in self.receivers if receiver.layer == layer]
                heads = [place for place in senders.get(layer, ()) if place.head is not None]
                mlp = any(place.head is None for place in senders.get(layer, ()))
                if hidden is not None:
                    self._note_inputs(layer, given, [receiver for receiver in here if receiver.head is not None], noted)
                attention = self._attention(layer, heads)
                to_mlp = [receiver for receiver in here if receiver.site == "mlp_output"]
                computed = None
                if to_mlp or layer in open_mlps:
                    computed = self._mlp(layer, given, attention)
                    noted.update(dict.fromkeys(to_mlp, computed))
                delta = (given - self.base.input_of(layer).to(given.device)).to(attention.device)
                delta = delta + attention - self.base.recording["attention_output", layer]
                own = self.base.recording["mlp_output", layer]
                if mlp:
                    delta = delta + self.source.recording["mlp_output", layer] - own
                elif layer in open_mlps and computed is not None:
                    delta = delta + computed - own
                hidden = self.base.recording["residual", layer] + delta
        if end == self.anatomy.n_layers:
            noted["logits"] = self.base.recording["residual", end - 1] if hidden is None else hidden
        return noted

    def _note_inputs(self, layer: int, hidden: Tensor, receivers: Sequence[Receiver], noted: Noted) -> None:
        """Note what heads would read from a residual stream."""
        if not receivers:
            return
        calls: list[AttentionCall] = []

        def tap(call: AttentionCall) -> None:
            if call.layer == layer:
                calls.append(call)

        with observed(self.base.subject, tap):
            self.walk.step(layer, hidden)
        for receiver in receivers:
            noted[receiver] = getattr(calls[0], receiver.site).transpose(1, 2)

    def _attention(self, layer: int, heads: Sequence[Place]) -> Tensor:
        """Return what attention writes when some heads take the source run's z."""
        written = self.base.recording["attention_output", layer]
        if not heads:
            return written
        z = self.base.recording["z", layer].clone()
        chosen = index_for([place.head for place in heads if place.head is not None], z)
        z[:, :, chosen] = self.source.recording["z", layer][:, :, chosen]
        block = self.anatomy.blocks[layer]
        projected = block.output.module(z.flatten(2))
        return projected if block.attention_write is block.attention else block.attention_write(projected)

    def _mlp(self, layer: int, hidden: Tensor, attention: Tensor) -> Tensor:
        """Return what a block's MLP writes when the block reads a residual stream and its attention writes a given value."""
        block = self.anatomy.blocks[layer]
        with record(self.base.subject, "mlp_output", layers=[layer]) as recording:
            if block.attention_write is block.attention:
                with stubbed(block.attention, (attention, None)):
                    self.walk.step(layer, hidden)
            else:
                with stubbed(block.attention, (hidden, None)), stubbed(block.attention_write, attention):
                    self.walk.step(layer, hidden)
        return recording["mlp_output", layer]
