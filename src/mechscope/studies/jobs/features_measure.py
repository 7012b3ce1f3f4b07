"""`mechscope features measure`: what dictionaries keep of a model on texts, beside controls, and what their latents stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mechscope.errors import SettingsError
from mechscope.settings import nested, setting
from mechscope.settings.features import TokenSettings
from mechscope.studies.dictionaries import LatentSettings, measure_all, show_latents
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
        None, "The place that they read, where their file does not say it or names it in a way that depends on the model (resid6, m3.in)."
    )
    output: str | None = setting(None, "The place that transcoders of SAELens write, likewise.")
    other_model: bool = setting(False, "Measure dictionaries that were made for a model with other weights.")
    tokens: TokenSettings = nested(TokenSettings)
    latent: LatentSettings = nested(LatentSettings)


def _read(settings: FeaturesMeasureSettings, path: str) -> dict[str, Dictionary]:
    from mechscope.features import Dictionary, formats

    name, place = Path(path).stem if Path(path).is_file() else Path(path).name, settings.place
    match settings.format:
        case "mechscope":
            return {name: Dictionary.load(path)}
        case "saelens":
            return {name: formats.read_saelens(path, place=place, output=settings.output)}
        case "dictionary-learning":
            return {name: formats.read_dictionary_learning(path, place=place)}
        case "sparsify":
            return {name: formats.read_sparsify(path, place=place)}
        case "gemma-scope":
            return {name: formats.read_gemma_scope(path, place=place)}
        case "circuit-tracer":
            return {f"{name}-{first}": each for first, each in formats.read_circuit_tracer(path).items()}


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


def _given(run: JobRun[FeaturesMeasureSettings]) -> tuple[dict[str, Dictionary], TokenSettings | None]:
    """Return the dictionaries where the model is, and which tokens are left out: those of their training unless others are named."""
    tokens = None if run.settings.tokens == TokenSettings() else run.settings.tokens
    return {name: each.to(run.first.device) for name, each in run[DICTIONARIES].items()}, tokens


def _measure(run: JobRun[FeaturesMeasureSettings]) -> Tables:
    import pandas as pd

    found, tokens = _given(run)
    rows = [
        {
            "dictionary": name,
            "reads": ",".join(map(str, each.layout.inputs)),
            "writes": ",".join(map(str, each.layout.outputs)),
            "latents": each.latents,
            "rule": each.layout.rule.name,
            "k": float("nan") if each.layout.rule.k is None else float(each.layout.rule.k),
        }
        for name, each in found.items()
    ]
    return {"dictionaries": pd.DataFrame(rows), **measure_all(run, found, run[TEXTS], tokens)}


def _show(run: JobRun[FeaturesMeasureSettings]) -> Tables:
    found, tokens = _given(run)
    return show_latents(run, found, run[TEXTS], tokens, run.settings.latent)


_INPUTS = (MODELS, TEXTS, DICTIONARIES)
MEASURES = Stage(name="measures", work=_measure, hangs_on=("tokens", "seed"), inputs=_INPUTS, alone=True)
LATENTS = Stage(
    name="latents",
    work=_show,
    hangs_on=("tokens", "seed", "latent"),
    inputs=_INPUTS,
    when=lambda settings: settings.latent.latents_shown > 0,
    alone=True,
)


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
    inputs=_INPUTS,
    stages=(MEASURES, LATENTS),
    sections=("dictionaries",),
    title=_title,
    check=_check,
)
