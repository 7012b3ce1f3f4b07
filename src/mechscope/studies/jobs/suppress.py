"""`mechscope suppress`: what a model loses when bands of its residual stream are taken out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mechscope.errors import DataError, SettingsError
from mechscope.settings import Count, Number, setting
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import layers_of, split_names
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts

if TYPE_CHECKING:
    from mechscope.lens import Bands


@dataclass(frozen=True, kw_only=True)
class SuppressSettings(OneModel, Texts):
    """Which bands are taken out, where, and what is measured."""

    panel: ClassVar[str] = "Suppression"

    suppressed: str = setting(..., 'Bands that are taken out together, 0 the brightest, such as "0" or "15-19".')
    bands: Number = setting(20, "Bands of equal width into which the directions of the residual stream are cut.")
    layers: str | None = setting(
        None, 'Layers behind which they are taken out, each by itself, such as "0-5,11"; by default all, and the embedding.'
    )
    rows: Literal["all", "target"] = setting("all", "Loss of all next tokens, or of those in the texts' target (the summary).")
    controls: Count = setting(2, "Random sets of as many directions that are taken out instead: the control.")

    def __post_init__(self) -> None:
        """Refuse bands that there are not.

        Raises:
            SettingsError: There is not one source of texts, or a band does not exist.
        """
        super().__post_init__()
        self.numbers()

    def numbers(self) -> tuple[int, ...]:
        """Return the bands that are taken out.

        Raises:
            SettingsError: They are not understood, none are named, or one does not exist.
        """
        chosen: set[int] = set()
        for part in split_names(self.suppressed):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
            if match is None:
                raise SettingsError(f"setting 'suppressed' is {self.suppressed!r}: give numbers of bands, such as 0 or 15-19")
            chosen.update(range(int(match[1]), int(match[2] or match[1]) + 1))
        if not chosen or max(chosen) >= self.bands:
            raise SettingsError(f"setting 'suppressed' is {self.suppressed!r}: name some of the bands 0-{self.bands - 1}")
        return tuple(sorted(chosen))


def _layers(run: JobRun[SuppressSettings]) -> tuple[int, ...] | None:
    return None if run.settings.layers is None else layers_of(run.settings.layers, run.first.anatomy)


def _check(run: JobRun[SuppressSettings]) -> None:
    from mechscope.data.scoring import check_fits

    settings, texts = run.settings, run[TEXTS]
    check_fits(run.first, texts)
    _layers(run)
    if settings.bands > (width := run.first.anatomy.d_model):
        raise SettingsError(f"setting 'bands' is {settings.bands}: the residual stream has {width} directions")
    if settings.rows == "target" and not any(pair.target for pair in texts):
        raise DataError(f"{texts.source}: no text has a target, which --rows target reads: take documents with summaries, or --rows all")


def _suppressed(run: JobRun[SuppressSettings]) -> Tables:
    import pandas as pd

    from mechscope.lens import bands, suppress_bands

    settings, subject = run.settings, run.first
    own = bands(subject, n=settings.bands)
    parts = []
    for draw in range(-1, settings.controls):
        using = own if draw < 0 else _random(own, settings.seed + draw)
        part = suppress_bands(
            subject, run[TEXTS], settings.numbers(), using=using, layers=_layers(run), rows=settings.rows, execution=run.execution
        )
        parts.append(part.assign(directions="bands" if draw < 0 else "random", draw=draw))
    count = sum(own.edges[band + 1] - own.edges[band] for band in settings.numbers())
    return {"suppress": pd.concat(parts, ignore_index=True).assign(suppressed=settings.suppressed, count=count, width=own.edges[-1])}


def _random(own: Bands, seed: int) -> Bands:
    """Return bands of the same widths along random orthogonal directions."""
    from dataclasses import replace

    import torch

    noise = torch.randn(own.vectors.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return replace(own, vectors=torch.linalg.qr(noise).Q.to(own.vectors))


def _title(names: Mapping[str, str]) -> str:
    return f"Bands of the residual stream taken out of {names['model']}"


JOB = Job(
    name="suppress",
    help="Take bands of the unembedding's spectrum out of the residual stream and see what the model loses, beside random directions (Cancedda 2024).",
    panel="read",
    example="mechscope suppress gpt2 --data articles.jsonl --suppressed 18-19 --out runs/suppress",
    settings=SuppressSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS),
    stages=(
        Stage(
            name="suppress",
            work=_suppressed,
            hangs_on=("suppressed", "bands", "layers", "rows", "controls", "seed"),
            inputs=(MODELS, TEXTS),
        ),
    ),
    sections=("suppress",),
    title=_title,
    check=_check,
)
