"""From flags and a configuration file to checked settings; every error names the setting.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mechscope.errors import SettingsError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

_MAY_BE_ZERO = ("seed", "no_repeat_ngram", "pattern_documents", "check", "random_circuits")


def resolve(kind: type[S], config: str | Path | None = None, **given: Any) -> S:
    """Build settings from a configuration file and what was given on top of it.

    Args:
        kind: The settings' class.
        config: A YAML file with the fields of that class.
        given: Fields that were set explicitly; None means not given.

    Raises:
        SettingsError: The file cannot be read, or a field is unknown, missing or of the wrong type; the message names it.
    """
    values = _read(config) if config is not None else {}
    values.update({name: value for name, value in given.items() if value is not None})
    return validated(kind, values, source=str(config) if config is not None else None)


def validated(kind: type[S], values: Mapping[str, Any], *, source: str | None = None) -> S:
    """Check values against the fields of a settings class.

    Raises:
        SettingsError: A field is unknown, missing or of the wrong type.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

    fields = {item.name: item for item in dataclasses.fields(kind)}
    where = f" in {source}" if source else ""
    if unknown := sorted(values.keys() - fields.keys()):
        raise SettingsError(f"setting {unknown[0]!r}{where} is not known: {_nearest(unknown[0], list(fields))}")
    missing = [name for name, item in fields.items() if item.default is dataclasses.MISSING and name not in values]
    if missing:
        raise SettingsError(f"setting {missing[0]!r} is missing{where}: {fields[missing[0]].metadata['help']}")
    try:
        settings = TypeAdapter(with_config(ConfigDict(allow_inf_nan=False))(kind)).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        raise SettingsError(f"setting {name!r}{where} is {first['input']!r}: {first['msg'].lower()}") from error
    for name in fields:
        value = getattr(settings, name)
        if isinstance(value, int) and not isinstance(value, bool) and value < (0 if name in _MAY_BE_ZERO else 1):
            raise SettingsError(f"setting {name!r}{where} is {value}: it must be at least {0 if name in _MAY_BE_ZERO else 1}")
    return settings


def _read(config: str | Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"configuration file {str(config)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"configuration file {str(config)!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"configuration file {str(config)!r} holds no settings: write one 'name: value' per line")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
