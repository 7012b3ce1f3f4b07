"""`mechscope spectrum`: how much of the residual stream the unembedding can see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mechscope.errors import SettingsError
from mechscope.settings import Number, setting
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import layers_of
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts, sites_of


@dataclass(frozen=True, kw_only=True)
class SpectrumSettings(OneModel, Texts):
    """What is taken apart, and into how many bands."""

    panel: ClassVar[str] = "Spectrum"

    sites: str = setting(
        "residual", "What is taken apart, joined by commas: residual, attention_output, mixer_output, mlp_output, head_output."
    )
    layers: str | None = setting(None, 'Layers, such as "0-5,11"; by default all, and the embedding.')
    bands: Number = setting(20, "Bands of equal width into which the directions of the residual stream are cut, the brightest first.")

    def __post_init__(self) -> None:
        """Refuse sites that there are not.

        Raises:
            SettingsError: There is not one source of texts, or a site is not known.
        """
        super().__post_init__()
        sites_of(self.sites)


def _layers(run: JobRun[SpectrumSettings]) -> tuple[int, ...] | None:
    return None if run.settings.layers is None else layers_of(run.settings.layers, run.first.anatomy)


def _check(run: JobRun[SpectrumSettings]) -> None:
    from mechscope.data.scoring import check_fits

    check_fits(run.first, run[TEXTS])
    _layers(run)
    if run.settings.bands > (width := run.first.anatomy.d_model):
        raise SettingsError(f"setting 'bands' is {run.settings.bands}: the residual stream has {width} directions")


def _spectrum(run: JobRun[SpectrumSettings]) -> Tables:
    from mechscope.lens import bands, logit_spectrum

    settings, subject = run.settings, run.first
    table = logit_spectrum(
        subject,
        run[TEXTS],
        using=bands(subject, n=settings.bands),
        sites=sites_of(settings.sites),
        layers=_layers(run),
        execution=run.execution,
    )
    return {"spectrum": table}


def _title(names: Mapping[str, str]) -> str:
    return f"What the unembedding of {names['model']} sees of its residual stream"


JOB = Job(
    name="spectrum",
    help="Logit spectroscopy: how much of the residual stream lies where the unembedding can see it, and how much does not (Cancedda 2024).",
    panel="read",
    example="mechscope spectrum gpt2 --data articles.jsonl --sites residual,mlp_output --out runs/spectrum",
    settings=SpectrumSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS),
    stages=(Stage(name="spectrum", work=_spectrum, hangs_on=("sites", "layers", "bands"), inputs=(MODELS, TEXTS)),),
    sections=("spectrum",),
    title=_title,
    check=_check,
)
