"""The errors a user can cause and mend.

Every expected failure (bad input, wrong model, full disk) is a `MechscopeError`: its message names the thing, says what was found and what
to do. The command line prints it as one red line and exits with code 2; anything else is a bug and keeps its traceback.
"""


class MechscopeError(ValueError):
    """Something the user gave or the machine refused; the message says what to do."""


class ModelError(MechscopeError):
    """A model that cannot be loaded, read or compared."""


class DataError(MechscopeError):
    """Documents or prompts that cannot be used."""


class RunError(MechscopeError):
    """A run folder that cannot be written, continued or verified."""


class SettingsError(MechscopeError):
    """Settings that contradict each other or the model."""
