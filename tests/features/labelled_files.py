"""A file of labelled texts for the tiny models that read single words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests import families


def labelled_file(folder: Path, count: int = 90) -> Path:
    """Write texts of three topics and two days, each told by a word of its own among random ones."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        topic, day = "abc"[number % 3], "xy"[int(rng.integers(2))]
        words = [f"w{word}" for word in rng.integers(12, families.VOCABULARY, size=8)]
        words[2], words[4] = f"w{4 + 'abc'.index(topic)}", f"w{8 + 'xy'.index(day)}"
        rows.append({"text": " ".join(words), "topic": topic, "day": day})
    path = folder / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
