"""How far long work is: the callback through which it says so."""

from __future__ import annotations

from collections.abc import Callable

# called with a label, how much is done and how much there is
Progress = Callable[[str, int, int], None]
