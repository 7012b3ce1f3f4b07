"""Errors on the command line speak of flags."""

from __future__ import annotations

import pytest

from mechscope.errors import DataError, SettingsError
from mechscope.studies.flags import flags_in_errors

NAMES = ("base", "data", "max_tokens", "on_problem", "resize", "unsafe", "tokenizer", "split", "validation_data")


@pytest.mark.parametrize(
    ("python", "spoken"),
    [
        ("setting 'base' is missing", "BASE is missing"),
        ("setting 'data' and setting 'base' are missing", "--data and BASE are missing"),
        ('pass resize="truncate" to compare', "pass --resize truncate to compare"),
        ("or pass unsafe=True to read them", "or pass --unsafe to read them"),
        ("name one with tokenizer=…", "name one with --tokenizer …"),
        ('say which (for example split="validation")', "say which (for example --split validation)"),
        ("raise max_tokens for both trainings", "raise --max-tokens for both trainings"),
        # paths and prose stay as they are
        ("runs/max_tokens.jsonl, line 3: no data here", "runs/max_tokens.jsonl, line 3: no data here"),
        ("'validation_data' is a column", "'validation_data' is a column"),
    ],
)
def test_a_setting_is_called_by_its_flag(python: str, spoken: str) -> None:
    with pytest.raises(DataError) as error, flags_in_errors(NAMES, ("base",)):
        raise DataError(python)
    assert str(error.value) == spoken


def test_an_error_keeps_its_kind() -> None:
    with pytest.raises(SettingsError), flags_in_errors(NAMES):
        raise SettingsError("x")
