"""What is looked at token by token: latents of a dictionary, neurons, heads. Of each batch: which of them are active in which tokens, and how strongly.

latents     their codes
neurons     what the MLP's last map reads; in gated MLPs, where it has either sign, its size
heads       the norm of what a head writes, ‖z W_O‖

Neurons and heads are hardly ever silent, so one counts as active only in the tokens where it is largest, a share of 1 % by default: its threshold is that
quantile over the first 4,096 tokens, so that it depends on no batch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import SettingsError
from mechscope.features.codes import Codes
from mechscope.features.dictionary import Dictionary
from mechscope.features.places import Latent, Place, subject_of
from mechscope.features.rows import PROBE, TOKENS_PER_BATCH, Models, Reader, Rows, blocks, reader_of, require_rows
from mechscope.instrument import Execution, record
from mechscope.instrument.mlp import Mlps
from mechscope.instrument.texts import over_texts
from mechscope.settings.features import TokenSettings
from mechscope.shapes import by_shape
from mechscope.subject import Components, Subject
from mechscope.subject.placement import require_in_memory

_NEURON = re.compile(r"m(\d+)\.n(\d+)")


@dataclass(frozen=True)
class Seen:
    """What is active in the tokens of a batch that are not left out.

    Attributes:
        codes: The active units of each token, on the CPU.
        text: ``(row)``: the place of the token's text among all.
        position: ``(row)``: its place in the text.
        heads: ``(row, head)``: the norm of what each head writes; None where it was not asked for.
    """

    codes: Codes
    text: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    heads: Float[np.ndarray, "row head"] | None = None

    __repr__ = by_shape


class Observed(Protocol):
    """Units that are looked at."""

    names: Sequence[str]
    """Each unit's text form."""
    reader: Reader
    """Reads the tokens."""

    def see(self, batch: PairBatch) -> Seen:
        """Return what is active in a batch."""


class Latents:
    """Latents of a dictionary, and beside them the heads of the blocks up to where they are read."""

    def __init__(
        self,
        models: Models,
        dictionary: Dictionary,
        texts: Pairs,
        *,
        latents: Sequence[int] | None = None,
        heads: bool = False,
        tokens: TokenSettings | None = None,
        other_model: bool = False,
        execution: Execution = Execution(),
    ) -> None:
        """Get ready.

        Args:
            models: The model, or several by name.
            dictionary: The dictionary.
            texts: What will be read.
            latents: Some of its latents; None for all.
            heads: Whether heads are looked at too: those of the model of the first place that is read.
            tokens: Which tokens are left out; None for those that its training left out, or the defaults where that is not known.
            other_model: Allow a dictionary of a model with other weights.
            execution: Tokens of a batch.

        Raises:
            MechscopeError: The dictionary or the texts do not fit, a latent does not exist, or no token is left.
        """
        self.reader = reader_of(models, dictionary, texts, tokens, other_model=other_model, execution=execution)
        self.dictionary = dictionary
        self._chosen = None if latents is None else torch.tensor(latents)
        if (
            self._chosen is not None
            and len(self._chosen)
            and not 0 <= int(self._chosen.min()) <= int(self._chosen.max()) < dictionary.latents
        ):
            raise SettingsError(f"latent {int(self._chosen.max())} does not exist: the dictionary has latents 0-{dictionary.latents - 1}")
        place = dictionary.layout.outputs[0]
        self.names: Sequence[str] = [Latent(place, latent).name for latent in (range(dictionary.latents) if latents is None else latents)]
        first = dictionary.layout.inputs[0]
        self._subject = subject_of(models, first)
        # what an MLP reads stands behind the attention of its own block
        anatomy = self._subject.anatomy
        # where something stands between heads and W_O, what they write is not z times a weight
        wanted = heads and self._subject.heads_write
        self._layers = tuple(layer for layer in anatomy.attending if layer <= first.layer) if wanted else ()
        self.head_names = [f"a{layer}.h{head}" for layer in self._layers for head in range(self._subject.anatomy.n_heads)]
        self._grams = {layer: _gram(self._subject, layer) for layer in self._layers}

    @torch.no_grad()
    def see(self, batch: PairBatch) -> Seen:
        """Return the codes of a batch."""
        if self._layers:
            with record(self._subject, "z", layers=self._layers) as recording:
                rows = self.reader.rows(batch)
            norms = torch.cat([_norms(_of_rows(recording["z", layer], rows, batch), self._grams[layer]) for layer in self._layers], dim=1)
            heads: np.ndarray | None = norms.cpu().numpy()
        else:
            rows, heads = self.reader.rows(batch), None
        inputs = [rows.values[place].to(self.dictionary.device, self.dictionary.dtype) for place in self.dictionary.layout.inputs]
        codes = self.dictionary.encode(inputs)
        if self._chosen is not None:
            codes = _columns(codes, self._chosen.to(codes.latents.device))
        return Seen(Codes(codes.latents.cpu(), codes.values.cpu(), codes.offsets.cpu(), codes.width), rows.text, rows.position, heads)


class _Thresholded(ABC):
    """Units with a value in every token, active where it is largest."""

    names: Sequence[str]
    reader: Reader

    def __init__(
        self, subject: Subject, texts: Pairs, layers: Sequence[int], tokens: TokenSettings | None, share: float, execution: Execution
    ):
        if not 0 < share < 1:
            raise SettingsError(f"share={share}: a unit is active in a part of the tokens, between 0 and 1")
        self._subject = subject
        self.reader = Reader(subject, (Place("residual", max(layers)),), tokens or TokenSettings())
        self.reader.check(texts)
        self.reader.probe(texts, range(len(texts)), Execution(execution.tokens_per_batch))
        chosen = next(blocks(texts, range(len(texts)), PROBE, self.reader.tokens.first))
        first = Pairs(tuple(texts.pairs[index] for index in chosen), texts.source)
        parts = [values for _, (values, _) in over_texts(first, self._values, execution, tokens=TOKENS_PER_BATCH)]
        require_rows(sum(map(len, parts)), texts, self.reader.tokens)
        self.thresholds: Float[Tensor, " unit"] = torch.cat(parts).double().quantile(1 - share, dim=0).clamp(min=0)

    @abstractmethod
    def _record(self, batch: PairBatch) -> tuple[Tensor, Rows]:
        """Return the units' values in the tokens of a batch that count."""

    @torch.no_grad()
    def _values(self, batch: PairBatch) -> tuple[Float[Tensor, "row unit"], Rows]:
        values, rows = self._record(batch)
        return values.cpu(), rows

    def see(self, batch: PairBatch) -> Seen:
        """Return where the units of a batch exceed their thresholds."""
        values, rows = self._values(batch)
        above = values * (values > self.thresholds.to(values.dtype))
        return Seen(Codes.from_dense(above), rows.text, rows.position)


class Neurons(_Thresholded):
    """Some neurons."""

    def __init__(
        self,
        subject: Subject,
        neurons: Sequence[str],
        texts: Pairs,
        *,
        tokens: TokenSettings | None = None,
        share: float = 0.01,
        execution: Execution = Execution(),
    ) -> None:
        """Get ready.

        Args:
            subject: The model.
            neurons: Their text forms, `m3.n1024`.
            texts: What will be read.
            tokens: Which tokens are left out; the defaults for None.
            share: Share of the tokens in which a neuron counts as active.
            execution: Tokens of a batch.

        Raises:
            MechscopeError: A neuron does not exist, or no token is left.
        """
        self.names = list(neurons)
        self._places = check_neurons(subject, neurons)
        self._layers = sorted({layer for layer, _ in self._places})
        parts = Mlps(subject).parts
        self._by_size = torch.tensor([parts[layer].gate is not None for layer, _ in self._places])
        super().__init__(subject, texts, self._layers, tokens, share, execution)

    def _record(self, batch: PairBatch) -> tuple[Tensor, Rows]:
        with record(self._subject, "neuron", layers=self._layers) as recording:
            rows = self.reader.rows(batch)
        by_layer = {layer: _of_rows(recording["neuron", layer], rows, batch) for layer in self._layers}
        values = torch.stack([by_layer[layer][:, neuron].cpu() for layer, neuron in self._places], dim=1)
        return torch.where(self._by_size, values.abs(), values), rows


class Heads(_Thresholded):
    """Some heads, by the norm of what they write."""

    def __init__(
        self,
        subject: Subject,
        heads: Sequence[str],
        texts: Pairs,
        *,
        tokens: TokenSettings | None = None,
        share: float = 0.01,
        execution: Execution = Execution(),
    ) -> None:
        """Get ready; arguments and errors as those of `Neurons`, heads as `a3.h5`."""
        self.names = list(heads)
        self._places = check_heads(subject, heads)
        self._layers = sorted({layer for layer, _ in self._places})
        self._grams = {layer: _gram(subject, layer) for layer in self._layers}
        super().__init__(subject, texts, self._layers, tokens, share, execution)

    def _record(self, batch: PairBatch) -> tuple[Tensor, Rows]:
        with record(self._subject, "z", layers=self._layers) as recording:
            rows = self.reader.rows(batch)
        norms = {layer: _norms(_of_rows(recording["z", layer], rows, batch), self._grams[layer]) for layer in self._layers}
        return torch.stack([norms[layer][:, head] for layer, head in self._places], dim=1), rows


def check_neurons(subject: Subject, neurons: Sequence[str]) -> list[tuple[int, int]]:
    """Return (layer, neuron) of neurons by their text forms; `SettingsError` where one is not understood or does not exist."""
    places: list[tuple[int, int]] = []
    for name in neurons:
        if (match := _NEURON.fullmatch(name.strip())) is None:
            raise SettingsError(f"neuron {name!r} is not understood: write m3.n1024")
        places.append((int(match[1]), int(match[2])))
    for layer, neuron in places:
        if layer >= subject.anatomy.n_layers or neuron >= subject.anatomy.blocks[layer].d_mlp:
            raise SettingsError(f"neuron m{layer}.n{neuron} does not exist: the model has layers 0-{subject.anatomy.n_layers - 1}")
    return places


def check_heads(subject: Subject, heads: Sequence[str]) -> list[tuple[int, int]]:
    """Return (layer, head) of heads by their text forms; `SettingsError` where one is not understood or does not exist."""
    places: list[tuple[int, int]] = []
    for name in heads:
        chosen = Components.parse(name)
        if not len(chosen) == len(chosen.heads) == 1:
            raise SettingsError(f"{name!r} is not one head: write a3.h5")
        places += chosen.validate(subject.anatomy).heads
    return places


def _of_rows(value: Float[Tensor, "batch token ..."], rows: Rows, batch: PairBatch) -> Float[Tensor, "row ..."]:
    """Return what was recorded at the tokens of rows."""
    place = {index: row for row, index in enumerate(batch.indices)}
    own = torch.tensor([place[index] for index in rows.text.tolist()], dtype=torch.int64)
    shift = torch.tensor([batch.shift(row) for row in range(len(batch))])
    return value[own.to(value.device), (rows.position + shift[own]).to(value.device)]


def _gram(subject: Subject, layer: int) -> Float[Tensor, "head d_head d_head"]:
    """Return W_Oᵀ W_O of every head, with which the norm of what it writes is had without writing it."""
    output = subject.anatomy.blocks[layer].output
    require_in_memory(subject.source, output.module, "the norm of what heads write")
    weight = torch.stack([output.weight(head) for head in range(subject.anatomy.n_heads)]).detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.einsum("hmd,hme->hde", weight, weight)


def _norms(z: Float[Tensor, "row head d_head"], gram: Float[Tensor, "head d_head d_head"]) -> Float[Tensor, "row head"]:
    z = z.to(gram).transpose(0, 1)
    return ((z @ gram) * z).sum(-1).clamp(min=0).sqrt().T.cpu()


def _columns(codes: Codes, chosen: Int[Tensor, " chosen"]) -> Codes:
    """Return the entries of some latents, counted in the order in which they were chosen."""
    at = torch.full((codes.width,), -1, dtype=torch.int64, device=codes.latents.device)
    at[chosen] = torch.arange(len(chosen), device=at.device)
    own = at[codes.latents] >= 0
    return Codes.of(codes.rows[own], at[codes.latents[own]], codes.values[own], codes.tokens, len(chosen))
