"""What keys a layer sees: C = E[k kᵀ], the uncentred second moment of the inputs of its MLP's last map, over the tokens of many texts.

An edit that moves W by (v* − W k*) (C⁻¹ k*)ᵀ / (k*ᵀ C⁻¹ k*) takes k* to v* and changes what is written for other keys least, in the mean over those that C
was taken from (Meng et al. 2022, eq. 2). One pass over the texts, in float64; sums of ranks and of runs are added. On disk it is an artifact whose name hangs
on the weights, not on what the model is called: a fine-tuned model never meets the base's C.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope import ranks
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.edit.maps import require_layers
from mechscope.errors import DataError, ModelError
from mechscope.instrument import Execution, record
from mechscope.instrument.texts import over_texts
from mechscope.instrument.walk import run_backbone
from mechscope.shapes import by_shape
from mechscope.store.artifact import Artifact
from mechscope.store.tables import read_tensors, write_tensors
from mechscope.subject import Subject
from mechscope.subject.placement import sent

_FILE = "keys.safetensors"
# what is added to C's diagonal, as a share of its mean, so that directions without any key can be solved for
RIDGE = 0.01


@dataclass(frozen=True)
class KeyMoments:
    """The summed k kᵀ of some layers.

    Attributes:
        n: Over how many tokens.
        sums: By layer, ``(d_mlp, d_mlp)``, float64, on the CPU.
    """

    n: int
    sums: dict[int, Float[Tensor, "d_mlp d_mlp"]]

    __repr__ = by_shape

    def mean(self, layer: int, *, ridge: float = 0.0) -> Float[Tensor, "d_mlp d_mlp"]:
        """Return C of a layer.

        Args:
            layer: One of those that were read.
            ridge: Added to the diagonal, as a share of its mean.

        Raises:
            DataError: The layer was not read.
        """
        if layer not in self.sums:
            raise DataError(f"keys were read in layers {', '.join(map(str, self.sums))}, not in layer {layer}: read them there too")
        mean = self.sums[layer] / self.n
        return mean + ridge * mean.diagonal().mean() * torch.eye(len(mean), dtype=mean.dtype)

    def merged(self, other: KeyMoments) -> KeyMoments:
        """Return the moments of both lots of tokens; `DataError` where they are of other layers or widths."""
        if {layer: own.shape for layer, own in self.sums.items()} != {layer: own.shape for layer, own in other.sums.items()}:
            raise DataError(
                f"keys of layers {', '.join(map(str, self.sums))} cannot be added to those of {', '.join(map(str, other.sums))}"
            )
        return KeyMoments(self.n + other.n, {layer: own + other.sums[layer] for layer, own in self.sums.items()})

    def as_identity(self) -> KeyMoments:
        """Return the control: C = I in every layer, as if all keys were alike in all directions."""
        return KeyMoments(1, {layer: torch.eye(len(own), dtype=own.dtype) for layer, own in self.sums.items()})

    def save(self, path: Path) -> None:
        """Write a safetensors file; `RunError` where it cannot be written."""
        write_tensors({str(layer): own for layer, own in self.sums.items()}, path, meta={"n": self.n})

    @classmethod
    def load(cls, path: Path) -> KeyMoments:
        """Read what `save` wrote; `RunError` where it is missing or damaged."""
        tensors, meta = read_tensors(path)
        return cls(int(meta["n"]), {int(layer): own for layer, own in sorted(tensors.items(), key=lambda item: int(item[0]))})


def key_moments(subject: Subject, texts: Pairs, *, layers: Collection[int], execution: Execution = Execution()) -> KeyMoments:
    """Run over texts once and return the second moment of the keys of some layers; ranks share the texts and have the same.

    Args:
        subject: The model.
        texts: The texts; every token counts, the first too, whose keys are often the largest and must not be moved.
        layers: Which layers.
        execution: Tokens of a batch (2,048 by default), progress.

    Raises:
        SettingsError: There are no texts, or a layer does not exist.
        ModelError: A layer is a mixture of experts; or keys are not finite.
        RunError: Not even a single text fits into memory.
    """
    maps = require_layers(subject, layers)

    def grams(batch: PairBatch) -> list[Tensor]:
        with torch.no_grad(), subject.active(), record(subject, "neuron", layers=[own.layer for own in maps]) as recording:
            run_backbone(subject, batch.clean, None if bool(batch.real.all()) else batch.real)
        neurons = [recording["neuron", own.layer] for own in maps]
        rows = [value[sent(batch.real, value.device)].double() for value in neurons]
        return [(x.T @ x).cpu() for x in rows]

    sums = [torch.zeros(here.weight.shape[1], here.weight.shape[1], dtype=torch.float64) for here in maps]
    tokens = torch.zeros(1, dtype=torch.int64)
    for batch, found in over_texts(texts, grams, execution, tokens=2048, label="keys", dealt=True):
        for total, gram in zip(sums, found, strict=True):
            total += gram
        tokens += int(batch.real.sum())
    ranks.add_up(*sums, tokens)
    for here, total in zip(maps, sums, strict=True):
        if not bool(torch.isfinite(total).all()):
            raise ModelError(
                f"keys of layer {here.layer} of {subject.source!r} are NaN or infinite: its type is too narrow, try dtype float32"
            )
    return KeyMoments(int(tokens), {here.layer: total for here, total in zip(maps, sums, strict=True)})


def kept_key_moments(
    folder: Path, subject: Subject, texts: Pairs, *, layers: Collection[int], execution: Execution = Execution()
) -> KeyMoments:
    """Return the second moment of keys, from a folder of those that were read before: named by weights, texts and layers.

    Args:
        folder: Where they are kept.
        subject: The model.
        texts: The texts.
        layers: Which layers.
        execution: As of `key_moments`.

    Raises:
        MechscopeError: As `key_moments`; or the folder cannot be used.
    """
    request = {
        "what": "second moment of keys",
        "weights": subject.fingerprint,
        "texts": texts.hash,
        "layers": [own.layer for own in require_layers(subject, layers)],
    }
    with Artifact(folder, request) as artifact:
        if not artifact.done:
            moments = key_moments(subject, texts, layers=layers, execution=execution)
            ranks.by_first(lambda: moments.save(artifact.result / _FILE))
    return ranks.by_first(lambda: KeyMoments.load(artifact.path / _FILE))
