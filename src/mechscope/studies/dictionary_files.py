"""Dictionaries of features as jobs take them: files of mechscope or folders of other libraries, named by `--dictionary`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mechscope.errors import SettingsError
from mechscope.settings import Count, Rate, Settings, setting
from mechscope.settings.features import TokenSettings
from mechscope.studies.pairs import split_names
from mechscope.studies.run import Input, JobRun

if TYPE_CHECKING:
    from mechscope.features import Dictionary, Standing

Format = Literal["mechscope", "saelens", "dictionary-learning", "sparsify", "gemma-scope", "circuit-tracer"]


@dataclass(frozen=True, kw_only=True)
class MaybeDictionaries(Settings):
    """Dictionaries that a job can do without."""

    panel: ClassVar[str] = "Dictionaries"

    dictionary: str | None = setting(
        None,
        "Dictionaries whose latents (resid6.f1024) are components here: files that `features train` wrote, a folder of them, or folders of --format; several "
        "joined by commas.",
    )
    format: Format = setting("mechscope", "What wrote them.")
    place: str | None = setting(
        None,
        "The place that dictionaries of other formats read, where their file does not say it or names it in a way that depends on the model: resid6, m3.in; "
        "for circuit-tracer the hook, mlp.hook_in.",
    )
    output: str | None = setting(None, "What transcoders write, likewise: m3 for saelens; the hook, hook_mlp_out, for circuit-tracer.")
    other_model: bool = setting(False, "Take dictionaries that were made for a model with other weights.")


@dataclass(frozen=True, kw_only=True)
class DictionaryFiles(MaybeDictionaries):
    """Which dictionaries."""

    panel: ClassVar[str] = "Dictionaries"

    dictionary: str = setting(
        ..., "Dictionaries: files that `features train` wrote, a folder of them, or folders of --format; several joined by commas."
    )


@dataclass(frozen=True, kw_only=True)
class LeftOutTokens(Settings):
    """Which tokens dictionaries are not looked at on."""

    panel: ClassVar[str] = "Dictionaries"

    first: Count | None = setting(
        None, "Tokens at the beginning of each text that are left out; by default as in training, else 1. With --outlier alone: 1."
    )
    outlier: Rate | None = setting(
        None, "Norm, in medians, above which a token is left out; by default as in training, else 10. With --first alone: 10."
    )


def left_out(settings: LeftOutTokens) -> TokenSettings | None:
    """Return which tokens are left out; None for those that a dictionary's training left out."""
    if settings.first is None and settings.outlier is None:
        return None
    usual = TokenSettings()
    first, outlier = (getattr(usual if getattr(settings, name) is None else settings, name) for name in ("first", "outlier"))
    return TokenSettings(first=first, outlier=outlier)


def _read(settings: MaybeDictionaries, path: str) -> dict[str, Dictionary]:
    from mechscope.features import Dictionary, formats

    name, place, output = Path(path).stem if Path(path).is_file() else Path(path).name, settings.place, settings.output
    if settings.format == "mechscope" and place is not None:
        raise SettingsError("setting 'place' is for dictionaries of other formats: those of mechscope say what they read")
    if output is not None and settings.format not in ("saelens", "circuit-tracer"):
        raise SettingsError(
            f"setting 'output' is for transcoders of saelens and circuit-tracer: format {settings.format} says what it writes"
        )
    match settings.format:
        case "mechscope" if Path(path).is_dir():
            files = sorted(Path(path).glob("*.safetensors"))
            if not files:
                raise SettingsError(
                    f"setting 'dictionary' names the folder {path}, which holds no dictionary: give files that `features train` wrote"
                )
            return {file.stem: Dictionary.load(file) for file in files}
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


def _load(run: JobRun[Any], setting: str = "dictionary") -> dict[str, Dictionary]:
    settings, named = run.settings, getattr(run.settings, setting)
    found: dict[str, Dictionary] = {}
    if named is None:
        return found
    for path in split_names(named):
        for name, dictionary in _read(settings, path).items():
            if name in found:
                raise SettingsError(f"setting {setting!r} names two dictionaries {name!r}: give their files different names")
            found[name] = dictionary
    if not found:
        raise SettingsError(f"setting {setting!r} is empty: name at least one file")
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


def _described(name: str, found: Mapping[str, Dictionary]) -> dict[str, Any]:
    return {name: {each: {"layout": own.layout.to_json(), "about": dict(own.about)} for each, own in found.items()}}


DICTIONARIES: Input[dict[str, Dictionary]] = Input("dictionaries", _load, _fingerprint, lambda found: _described("dictionaries", found))
"""The dictionaries that a job names, by the names of their files; none where it names none."""


def autoencoders(run: JobRun[Any]) -> tuple[Standing, ...]:
    """Return the dictionaries of a job whose latents are components of the model, in the order in which a run comes by them; none where it names none.

    Raises:
        MechscopeError: One is no autoencoder of one place, is another model's, or two stand at one place.
    """
    from mechscope.features import Standing, in_order

    found = [Standing.of(each, run.first, other_model=run.settings.other_model) for each in run[DICTIONARIES].values()]
    return in_order(found) if found else ()


AGAINST: Input[dict[str, Dictionary]] = Input(
    "against", lambda run: _load(run, "against"), _fingerprint, lambda found: _described("against", found) if found else {}
)
"""The dictionaries that these are compared with (`--against`), likewise."""
