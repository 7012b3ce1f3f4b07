"""Mappings that a person writes into a file, JSON or YAML: the hypotheses of `mechscope scrub`, the runs of `mechscope counterfactual`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mechscope.errors import SettingsError


def read_mapping(source: str, what: str) -> dict[str, Any]:
    """Read a file that holds a mapping of names.

    Args:
        source: A `.json`, `.yaml` or `.yml` file.
        what: What it should hold, for errors: `the hypothesis`.

    Raises:
        SettingsError: The file cannot be read, is of neither format, or holds no mapping or an empty one.
    """
    import yaml

    path = Path(source).expanduser()
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise SettingsError(f"{what} {source!r} is neither .json nor .yaml: write it in one of these formats")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{what} {source!r} cannot be read: {error}") from error
    try:
        value = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{what} {source!r} is not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict) or not value:
        raise SettingsError(
            f"{what} {source!r} holds {'nothing' if not value else f'a {type(value).__name__}'}: write names and what they mean"
        )
    return {str(name): inner for name, inner in value.items()}
