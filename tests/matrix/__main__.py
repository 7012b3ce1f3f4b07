"""Write docs/models.md: `python -m tests.matrix > docs/models.md`; with names, say what is found of these families instead."""

from __future__ import annotations

import logging
import sys

import transformers

from tests.matrix.configs import families
from tests.matrix.outcome import outcome
from tests.matrix.page import page

logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()
if names := sys.argv[1:]:
    for name in names:
        print(outcome(name))
else:
    outcomes = []
    for name in families():
        print(name, file=sys.stderr)
        outcomes.append(outcome(name))
    print(page(outcomes), end="")
    if faults := [f"{one.family}: {fault}" for one in outcomes for fault in one.faults]:
        sys.exit("\n".join(faults))
