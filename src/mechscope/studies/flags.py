"""Errors in the words of the command line: a setting is called by its flag, `unsafe=True` is `--unsafe`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

from mechscope.errors import MechscopeError


@contextlib.contextmanager
def flags_in_errors(names: Iterable[str], arguments: Iterable[str] = ()) -> Iterator[None]:
    """Speak of flags where an error that the body raises speaks of Python's names.

    Args:
        names: The settings that have a flag.
        arguments: Those of them that stand by position, which are called by their name in capitals.
    """
    try:
        yield
    except MechscopeError as error:
        message, positional = str(error), set(arguments)
        for name in names:
            message = _with_flag(message, name, name.upper() if name in positional else f"--{name.replace('_', '-')}")
        error.args = (message,)
        raise


def _with_flag(message: str, name: str, flag: str) -> str:
    """Return a message with one setting called by its flag."""
    message = re.sub(rf"setting '{name}'", flag, message)

    def given(match: re.Match[str]) -> str:
        value = match["text"] if match["text"] is not None else match["plain"]
        return flag if value == "True" else f"{flag} {value}"

    message = re.sub(rf"(?<![\w./-]){name}=(?:\"(?P<text>[^\"]*)\"|(?P<plain>\w+|…))", given, message)
    if "_" in name:
        # a word with an underscore is a name, not prose; but not as part of a path
        message = re.sub(rf"(?<![\w'/.-]){name}(?![\w'/]|\.\w)", flag, message)
    return message
