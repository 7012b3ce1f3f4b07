"""Activations to train on: block-shuffled, from a folder on disk or straight from the model.

A block is what some thousands of texts, drawn in random order, give (`mechscope.features.batches` says in which order training takes them).

`harvest` writes every block into a file of a folder that describes itself (`harvest.json`: places, models, texts, what was left out) and whose files
carry hashes (`request.json`, as every artifact of mechscope): a killed harvest goes on behind its last file, and a finished one is not made again.
`Live` gives the same blocks without a disk, at the price of a pass through the model in every round. Ranks share the texts of a block; rank 0 writes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope import ranks
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, RunError, SettingsError
from mechscope.features.affine import Affine, moments_of
from mechscope.features.places import Place, places
from mechscope.features.rows import Models, Reader, Rows, blocks, require_rows
from mechscope.features.vocabulary import vocabulary
from mechscope.instrument import Execution
from mechscope.settings.features import HarvestSettings
from mechscope.stats.moments import Moments
from mechscope.store.artifact import REQUEST, Artifact
from mechscope.store.files import read_json, write_json
from mechscope.store.hashing import hash_if_there
from mechscope.store.tables import read_tensors, write_tensors

ABOUT, _KIND, _VERSION = "harvest.json", "mechscope harvest", 1
# what decides the activations; older folders do not name vocabularies
_IDENTITY = ("places", "models", "vocabularies", "texts", "settings", "seed")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Block = dict[Place, Float[Tensor, "row width"]]


class Source(Protocol):
    """Blocks of activations to train on."""

    places: tuple[Place, ...]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, JSON-able."""

    @property
    def limits(self) -> dict[str, float]:
        """Norms above which tokens were left out, by the names of the places; empty where none was."""

    def block(self, number: int) -> Block:
        """Return a block's rows by place."""

    def affine(self, place: Place) -> Affine:
        """Return the map to mean zero and mean squared norm one."""


class Live:
    """Blocks straight from the model: nothing is written, and every round runs the model again.

    Attributes:
        places: What is read.
    """

    def __init__(
        self,
        models: Models,
        texts: Pairs,
        where: Place | str | Sequence[Place | str],
        *,
        settings: HarvestSettings | None = None,
        execution: Execution = Execution(),
    ) -> None:
        """Prepare a harvest; the limits of norms are found here.

        Args:
            models: The model, or several by name that are given the same tokens.
            texts: Any texts; their clean versions are read.
            where: The places, such as `"resid3,m3.in"`, or `"base:resid3,tuned:resid3"` of two models.
            settings: Tokens of a block, and which are left out.
            execution: Tokens of a batch, seed (of the order of the texts), progress.

        Raises:
            MechscopeError: A place does not exist, the texts do not fit, or no token is left.
        """
        self.places, self._texts, self._execution = places(where), texts, execution
        self.settings = settings or HarvestSettings()
        self.reader = Reader(models, self.places, self.settings)
        self.reader.check(texts)
        order = list(range(len(texts)))
        random.Random(execution.seed).shuffle(order)
        self._blocks = list(blocks(texts, order, self.settings.rows, self.settings.first))
        self._quiet = Execution(execution.tokens_per_batch, execution.seed)
        self.reader.probe(texts, order, self._quiet)

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, JSON-able: a harvest of the same request has another precision, and maps of all blocks."""
        return {"kind": "live", **self.request}

    @property
    def limits(self) -> dict[str, float]:
        """Norms above which tokens are left out, by the names of the places."""
        return {place.name: limit for place, limit in self.reader.limits.items()}

    @property
    def request(self) -> dict[str, Any]:
        """What is read of which models and texts, JSON-able."""
        return {
            "places": [place.name for place in self.places],
            "models": {name: subject.fingerprint for name, subject in self.reader.subjects.items()},
            "vocabularies": {name: vocabulary(subject) for name, subject in self.reader.subjects.items()},
            "texts": self._texts.hash,
            "settings": asdict(self.settings),
            "seed": self._execution.seed,
        }

    def rows(self, number: int) -> Rows:
        """Return a block with its texts and positions.

        Raises:
            DataError: Values are not finite.
        """
        return self.reader.run(self._texts, self._blocks[number], self._quiet)

    def block(self, number: int) -> Block:
        """Return a block's rows by place."""
        return self.rows(number).values

    def affine(self, place: Place) -> Affine:
        """Return the map to mean zero and mean squared norm one, of the first block."""
        return self._maps[place]

    @cached_property
    def _maps(self) -> dict[Place, Affine]:
        rows = self.block(0)
        require_rows(len(rows[self.places[0]]), self._texts, self.settings)
        return {place: Affine.fitted(moments_of(value)) for place, value in rows.items()}


def harvest(
    models: Models,
    texts: Pairs,
    where: Place | str | Sequence[Place | str],
    folder: str | Path,
    *,
    settings: HarvestSettings | None = None,
    execution: Execution = Execution(),
) -> Harvest:
    """Write the activations at some places to a folder, all places in one pass; arguments as those of `Live`.

    A harvest that was killed goes on behind the last block that it wrote; one that is there already, of the same request, is read.

    Raises:
        RunError: The folder holds something else, or the disk is full; what was written is kept.
        MechscopeError: As for `Live`; or a value is too large for the type on disk.
    """
    live = Live(models, texts, where, settings=settings, execution=execution)
    folder = Path(folder)
    with Artifact(folder.parent, {"kind": _KIND, "version": _VERSION, **live.request}, name=folder.name) as artifact:
        if not artifact.done:
            _write(live, texts, artifact.result, execution)
    return Harvest(folder)


def _write(live: Live, texts: Pairs, result: Path, execution: Execution) -> None:
    dtype = _DTYPES[live.settings.precision]
    left_out: Counter[str] = Counter()
    counts = []
    for number in range(live.blocks):
        meta = ranks.by_first(partial(_kept, result / _name(number)))
        if meta is None:
            rows = live.rows(number)
            meta = ranks.by_first(partial(_keep, rows, result / _name(number), dtype))
        counts.append(meta["rows"])
        left_out.update(meta["left_out"])
        execution.told("harvest", number + 1, live.blocks)
    require_rows(sum(counts), texts, live.settings)
    about = {
        "kind": _KIND,
        "version": _VERSION,
        **live.request,
        "source": texts.source,
        "rows": counts,
        "left_out": dict(left_out),
        "limits": live.limits,
        "widths": {place.name: place.width(live.reader.subjects[place.model]) for place in live.places},
    }
    ranks.by_first(lambda: write_json(about, result / ABOUT))


def _kept(path: Path) -> dict[str, Any] | None:
    """Return what is known of a block that is there."""
    return read_tensors(path)[1] if path.is_file() else None


def _keep(rows: Rows, path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write a block and return what is known of it."""
    tensors = {place.name: _narrow(value, dtype, place) for place, value in rows.values.items()}
    # of what will be read back, rounding included
    for place in rows.values if len(rows) else ():
        state = moments_of(tensors[place.name].float()).state()
        tensors |= {f"{place.name}:{part}": torch.from_numpy(state[part]) for part in ("mean", "m2")}
    tensors |= {"text": rows.text.int(), "position": rows.position.int()}
    meta = {"rows": len(rows), "left_out": dict(rows.left_out)}
    write_tensors(tensors, path, meta=meta)
    return meta


def _name(number: int) -> str:
    return f"block-{number:05}.safetensors"


def _narrow(value: Tensor, dtype: torch.dtype, place: Place) -> Tensor:
    narrow = value.to(dtype)
    if not bool(narrow.isfinite().all()):
        raise DataError(
            f"activations at {place} reach {value.abs().max():.3g}, more than {str(dtype).removeprefix('torch.')} holds: harvest with precision='bfloat16' or "
            "'float32', or a lower outlier"
        )
    return narrow


class Harvest:
    """Activations in a folder, as `harvest` wrote them.

    Attributes:
        path: The folder.
        about: What `harvest.json` says.
        places: What was read.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder.

        Raises:
            RunError: It is missing, no harvest, or of a later version.
        """
        self.path = Path(path)
        self.about: dict[str, Any] = read_json(self.path / ABOUT)
        if not isinstance(self.about, dict) or self.about.get("kind") != _KIND:
            raise RunError(f"{self.path} holds no harvest of activations: give a folder that mechscope harvested")
        if self.about["version"] > _VERSION:
            raise RunError(
                f"{self.path} was written by a later mechscope (format {self.about['version']}, this one reads {_VERSION}): update mechscope"
            )
        self.places = places(self.about["places"])

    def verify(self) -> None:
        """See that no file was changed since it was written; `RunError` that names those that were."""
        files = read_json(self.path / REQUEST)["files"]
        changed = [name for name, digest in files.items() if hash_if_there(self.path / name) != digest]
        if changed:
            raise RunError(f"{self.path} was changed after it was finished ({', '.join(changed)}): harvest again")

    def __len__(self) -> int:
        return sum(self.about["rows"])

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.about["rows"])

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, JSON-able."""
        return {"kind": "harvest", **{name: self.about[name] for name in _IDENTITY if name in self.about}}

    @property
    def limits(self) -> dict[str, float]:
        """Norms above which tokens were left out, by the names of the places."""
        return dict(self.about["limits"])

    def rows(self, number: int) -> Rows:
        """Return a block with its texts and positions, in the type on disk."""
        tensors, meta = read_tensors(self.path / _name(number))
        values = {place: tensors[place.name] for place in self.places}
        return Rows(values, tensors["text"].long(), tensors["position"].long(), Counter(meta["left_out"]))

    def block(self, number: int) -> Block:
        """Return a block's rows by place, in the type on disk."""
        return self.rows(number).values

    def moments(self, place: Place) -> Moments:
        """Return count, mean and squared deviations of all rows, feature by feature; `SettingsError` where the place was not harvested."""
        if place not in self._moments:
            raise SettingsError(f"{self.path} holds no activations of {place}: it holds {', '.join(map(str, self.places))}")
        return self._moments[place]

    def affine(self, place: Place) -> Affine:
        """Return the map to mean zero and mean squared norm one."""
        return Affine.fitted(self.moments(place))

    @cached_property
    def _moments(self) -> dict[Place, Moments]:
        found = {place: Moments((self.about["widths"][place.name],)) for place in self.places}
        for number, rows in enumerate(self.about["rows"]):
            if not rows:
                continue
            tensors, _ = read_tensors(self.path / _name(number))
            for place, moments in found.items():
                mean, m2 = (tensors[f"{place.name}:{part}"].numpy() for part in ("mean", "m2"))
                moments.merge(Moments.from_state({"count": np.full(mean.shape, rows), "mean": mean, "m2": m2}))
        return found
