"""`mechscope features measure`: what dictionaries keep of a model on texts, beside controls, and what their latents stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mechscope.errors import SettingsError
from mechscope.settings import Count, Rate, nested, setting
from mechscope.settings.features import TokenSettings
from mechscope.studies.dictionaries import Judged, LatentSettings, described, stages
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import split_names
from mechscope.studies.run import Input, JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts

if TYPE_CHECKING:
    from mechscope.features import Dictionary

Format = Literal["mechscope", "saelens", "dictionary-learning", "sparsify", "gemma-scope", "circuit-tracer"]


@dataclass(frozen=True, kw_only=True)
class FeaturesMeasureSettings(OneModel, Texts):
    """Which dictionaries, and on which texts."""

    panel: ClassVar[str] = "Dictionaries"

    dictionary: str = setting(..., "Dictionaries: files that `features train` wrote, or folders of --format; several joined by commas.")
    format: Format = setting("mechscope", "What wrote them.")
    place: str | None = setting(
        None,
        "The place that dictionaries of other formats read, where their file does not say it or names it in a way that depends on the model: resid6, m3.in; "
        "for circuit-tracer the hook, mlp.hook_in.",
    )
    output: str | None = setting(None, "What transcoders write, likewise: m3 for saelens; the hook, hook_mlp_out, for circuit-tracer.")
    other_model: bool = setting(False, "Measure dictionaries that were made for a model with other weights.")
    first: Count | None = setting(
        None, "Tokens at the beginning of each text that are left out; by default as in training, else 1. With --outlier alone: 1."
    )
    outlier: Rate | None = setting(
        None, "Norm, in medians, above which a token is left out; by default as in training, else 10. With --first alone: 10."
    )
    latent: LatentSettings = nested(LatentSettings)


def _read(settings: FeaturesMeasureSettings, path: str) -> dict[str, Dictionary]:
    from mechscope.features import Dictionary, formats

    name, place, output = Path(path).stem if Path(path).is_file() else Path(path).name, settings.place, settings.output
    if settings.format == "mechscope" and place is not None:
        raise SettingsError("setting 'place' is for dictionaries of other formats: those of mechscope say what they read")
    if output is not None and settings.format not in ("saelens", "circuit-tracer"):
        raise SettingsError(
            f"setting 'output' is for transcoders of saelens and circuit-tracer: format {settings.format} says what it writes"
        )
    match settings.format:
        case "mechscope":
            return {name: Dictionary.load(path)}
        case "saelens":
            return {name: formats.read_saelens(path, place=place, output=output)}
        case "dictionary-learning":
            return {name: formats.read_dictionary_learning(path, place=place)}
        case "sparsify":
            return {name: formats.read_sparsify(path, place=place)}
        case "gemma-scope":
            return {name: formats.read_gemma_scope(path, place=place)}
        case "circuit-tracer":
            if (place is None) != (output is None):
                raise SettingsError("settings 'place' and 'output' name the two hooks of a folder of circuit-tracer: give both, or none")
            hooks = None if place is None or output is None else (place, output)
            return {f"{name}-{written}": each for written, each in formats.read_circuit_tracer(path, hooks=hooks).items()}


def _load(run: JobRun[Any]) -> dict[str, Dictionary]:
    settings = run.settings
    found: dict[str, Dictionary] = {}
    for path in split_names(settings.dictionary):
        for name, dictionary in _read(settings, path).items():
            if name in found:
                raise SettingsError(f"setting 'dictionary' names two dictionaries {name!r}: give their files different names")
            found[name] = dictionary
    if not found:
        raise SettingsError("setting 'dictionary' is empty: name at least one file")
    return found


def _fingerprint(found: Mapping[str, Dictionary]) -> dict[str, Any]:
    from mechscope.store.hashing import hash_state

    return {
        name: [
            each.layout.to_json(),
            hash_state(each.tensors),
            [[m.scale, m.centre.tolist()] for m in (*each.input_maps, *each.output_maps)],
        ]
        for name, each in found.items()
    }


DICTIONARIES: Input[dict[str, Dictionary]] = Input(
    "dictionaries",
    _load,
    _fingerprint,
    lambda found: {"dictionaries": {name: {"layout": each.layout.to_json(), "about": dict(each.about)} for name, each in found.items()}},
)


def _check(run: JobRun[FeaturesMeasureSettings]) -> None:
    from mechscope.data.scoring import check_fits

    check_fits(run.first, run[TEXTS])
    for dictionary in run[DICTIONARIES].values():
        dictionary.check(run.first, other_model=run.settings.other_model)


def _describe(run: JobRun[FeaturesMeasureSettings]) -> Tables:
    import pandas as pd

    return {"dictionaries": pd.DataFrame([described(name, each) for name, each in run[DICTIONARIES].items()])}


def _judged(run: JobRun[FeaturesMeasureSettings]) -> Judged:
    first, outlier, tokens = run.settings.first, run.settings.outlier, None
    if first is not None or outlier is not None:
        usual = TokenSettings()
        tokens = TokenSettings(first=usual.first if first is None else first, outlier=usual.outlier if outlier is None else outlier)
    return Judged({name: each.to(run.first.device) for name, each in run[DICTIONARIES].items()}, run[TEXTS], tokens)


DESCRIPTION = Stage(name="description", work=_describe, inputs=(DICTIONARIES,), alone=True)
MEASURES, LATENTS = stages(_judged, hangs_on=("first", "outlier"), inputs=(DICTIONARIES,))


def _title(names: Mapping[str, str]) -> str:
    return f"Dictionaries of features in {names['model']}"


JOB = Job(
    name="features-measure",
    help="Measure dictionaries of features on texts, beside controls, and list what their latents stand for; reads five formats of other libraries.",
    panel="features",
    group="features",
    example="mechscope features measure gpt2 --dictionary runs/features/dictionaries/resid6-4096.safetensors --data articles.jsonl",
    settings=FeaturesMeasureSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS, DICTIONARIES),
    stages=(DESCRIPTION, MEASURES, LATENTS),
    sections=("dictionaries",),
    title=_title,
    check=_check,
)
