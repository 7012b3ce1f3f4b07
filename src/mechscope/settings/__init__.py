"""Settings as values: frozen dataclasses whose fields say their type, bounds, default and help, once.

A technique that has more than a few options keeps them in such a class; a job nests it, so a flag of the command line, a key of `study.yaml` and a
keyword of the Python function are one field. Bounds are part of the type (`Annotated[int, Ge(1)]`, `Literal[…]`) and are checked whenever a value is made,
from whatever side. Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt

from mechscope.errors import SettingsError

Count = Annotated[int, Ge(0)]
"""Zero or more of something."""
Number = Annotated[int, Ge(1)]
"""One or more of something."""
Rate = Annotated[float, Gt(0)]
"""A positive number, such as a learning rate."""
Share = Annotated[float, Ge(0), Le(1)]
"""A part of a whole, 0 to 1."""
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
"""A part of a whole that is never all of it."""

R = TypeVar("R")
S = TypeVar("S", bound="Settings")


def _per_class(function: Callable[[Any], R]) -> Callable[[Any], R]:
    """Keep what a function makes of each class; `functools.cache`, for types whose instances are compared field by field."""
    cached: Any = cache(function)

    @wraps(function)
    def once(kind: Any) -> R:
        return cached(kind)

    return once


def setting(default: Any, help: str) -> Any:
    """Declare a field with the sentence that explains it; `...` as the default means it must be given."""
    if default is ...:
        return field(metadata={"help": help})
    return field(default=default, metadata={"help": help})


def nested(kind: type[S], *, prefix: str = "") -> S:
    """Declare a field that holds the settings of a technique.

    Args:
        kind: Their class.
        prefix: What the names of flags and keys begin with, where the technique's own names say too little beside a job's: `lens_`.
    """
    return field(default_factory=kind, metadata={"prefix": prefix})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the settings of techniques and jobs have in common: every field is checked against its type when a value is made."""

    def __post_init__(self) -> None:
        # defaults are right as they stand: the help of the command line, which makes nothing else, is spared the import of pydantic
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if getattr(self, item.name) is not item.default}
        given = {name: value for name, value in own.items() if not isinstance(value, Settings)}
        if not given:
            return
        from pydantic import ValidationError

        checks = _checks(type(self))
        for name, value in given.items():
            try:
                object.__setattr__(self, name, checks[name](value))
            except ValidationError as error:
                first = error.errors()[0]
                raise SettingsError(f"setting {name!r} is {value!r}: {_wanted(first)}") from error

    def part(self, names: typing.Iterable[str]) -> dict[str, Any]:
        """Return some settings by name: fields of this class, fields of what it nests, or whole nested groups.

        Raises:
            KeyError: There is no setting of that name.
        """
        known = {leaf.name: leaf.read(self) for leaf in leaves(type(self))}
        groups = {item.name: value for item in dataclasses.fields(self) if isinstance(value := getattr(self, item.name), Settings)}
        return {name: dataclasses.asdict(groups[name]) if name in groups else known[name] for name in names}


@dataclass(frozen=True)
class Leaf:
    """One setting, wherever it is nested.

    Attributes:
        name: Its name, the same as a flag, in a file and in Python; with the prefix of its group.
        path: The names that lead to it, its own last.
        owner: The class that declares it.
        hint: Its type, bounds included.
        default: Its default; `dataclasses.MISSING` where it must be given.
        help: The sentence that explains it.
    """

    name: str
    path: tuple[str, ...]
    owner: type[Settings]
    hint: Any
    default: Any
    help: str

    def read(self, settings: Any) -> Any:
        """Return the setting's value."""
        for name in self.path:
            settings = getattr(settings, name)
        return settings


@_per_class
def leaves(kind: type[Settings]) -> tuple[Leaf, ...]:
    """Return all settings of a class, nested ones in the place of their group.

    Raises:
        TypeError: Two settings have the same name, so that a flag could mean either.
    """
    listed = tuple(_leaves(kind, (), "", None))
    names = [leaf.name for leaf in listed]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"{kind.__name__} has two settings called {sorted(twice)[0]!r}: rename one")
    return listed


def _leaves(kind: type[Settings], path: tuple[str, ...], prefix: str, template: Settings | None) -> Iterator[Leaf]:
    hints = _hints(kind)
    for item in dataclasses.fields(kind):
        inner = hints[item.name]
        default = item.default
        if template is not None:
            default = getattr(template, item.name)
        elif item.default_factory not in (dataclasses.MISSING, inner):  # a class's own defaults are known without making one
            default = item.default_factory()
        if isinstance(inner, type) and issubclass(inner, Settings):
            longer = prefix + item.metadata.get("prefix", "")
            yield from _leaves(inner, (*path, item.name), longer, None if default is dataclasses.MISSING else default)
        elif "help" in item.metadata:
            owner = next(base for base in reversed(kind.__mro__) if item.name in getattr(base, "__annotations__", {}))
            yield Leaf(prefix + item.name, (*path, item.name), owner, inner, default, item.metadata["help"])


@_per_class
def _hints(kind: type[Settings]) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


@_per_class
def _checks(kind: type[Settings]) -> dict[str, Any]:
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    checks = {}
    for item in dataclasses.fields(kind):
        hint = _hints(kind)[item.name]
        if isinstance(hint, type) and issubclass(hint, Settings):
            continue
        # a value that is a dataclass, such as a selection of components, brings its own checks
        checks[item.name] = TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else config).validate_python
    return checks


def _wanted(error: Mapping[str, Any]) -> str:
    """Return what a value should have been, in pydantic's words."""
    return str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ").lower()


def resolve(kind: type[S], config: str | Path | None = None, *, beneath: Mapping[str, Any] | None = None, **given: Any) -> S:
    """Build settings from a configuration file and what was given on top of it.

    Args:
        kind: The settings' class.
        config: A YAML file with settings by name; those of a nested group may stand under the group's name.
        beneath: Settings by name that stand where neither the file nor `given` says otherwise.
        given: Settings that were given explicitly; None means not given.

    Raises:
        SettingsError: The file cannot be read, or a setting is unknown, missing, out of bounds or of the wrong type; the message names it.
    """
    where = f" in {config}" if config is not None else ""
    known = leaves(kind)
    values = {**(beneath or {}), **(read_settings(config, kind) if config is not None else {})}
    values.update({name: value for name, value in given.items() if value is not None})
    names = [leaf.name for leaf in known]
    if unknown := sorted(values.keys() - set(names)):
        raise SettingsError(f"setting {unknown[0]!r}{where} is not known: {_nearest(unknown[0], names)}")
    missing = [leaf for leaf in known if leaf.default is dataclasses.MISSING and leaf.name not in values]
    if len(missing) == 1:
        raise SettingsError(f"setting {missing[0].name!r} is missing{where}: {missing[0].help}")
    if missing:
        *others, last = (f"setting {leaf.name!r}" for leaf in missing)
        raise SettingsError(f"{', '.join(others)} and {last} are missing{where}")
    return _built(kind, {leaf.path: values[leaf.name] for leaf in known if leaf.name in values})


def _built(kind: type[S], values: Mapping[tuple[str, ...], Any]) -> S:
    """Make nested settings from values by path; groups keep the defaults that the class gives them."""
    own = {path[0]: value for path, value in values.items() if len(path) == 1}
    for item in dataclasses.fields(kind):
        inner = {path[1:]: value for path, value in values.items() if len(path) > 1 and path[0] == item.name}
        if inner and item.default_factory is not dataclasses.MISSING:
            own[item.name] = _changed(item.default_factory(), inner)
    return kind(**own)


def _changed(group: Settings, values: Mapping[tuple[str, ...], Any]) -> Settings:
    own = {path[0]: value for path, value in values.items() if len(path) == 1}
    for name in {path[0] for path in values if len(path) > 1}:
        own[name] = _changed(getattr(group, name), {path[1:]: value for path, value in values.items() if path[0] == name and len(path) > 1})
    return dataclasses.replace(group, **own)


def read_settings(config: str | Path, kind: type[Settings]) -> dict[str, Any]:
    """Read settings by name from a YAML file; `SettingsError` where it cannot be read or holds none.

    Args:
        config: The file.
        kind: The settings' class, whose nested groups may stand under their names.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"configuration file {str(config)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"configuration file {str(config)!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"configuration file {str(config)!r} holds no settings: write one 'name: value' per line")
    return dict(_flat(values, (), {leaf.path: leaf.name for leaf in leaves(kind)}))


def _flat(values: Mapping[Any, Any], group: tuple[str, ...], known: Mapping[tuple[str, ...], str]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        path = (*group, str(name).replace("-", "_"))
        if isinstance(value, Mapping) and any(other[: len(path)] == path for other in known):
            yield from _flat(value, path, known)
        else:
            yield known.get(path, path[-1]), value


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
