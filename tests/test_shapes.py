"""Values print what they are (shapes, names, texts), never the numbers of a tensor or a list of token ids."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.causal.effects import effects
from mechscope.circuits import Circuit, EdgeScores, Graph
from mechscope.circuits.scores import Cost
from mechscope.data.newsroom import newsroom_tokenizer
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.data.scoring import PerText
from mechscope.instrument import Recording
from mechscope.shapes import by_shape, short

PACKAGES = ("subject", "instrument", "data", "stats", "difference", "lens", "causal", "circuits", "heads", "weights", "features", "adapt")


def public() -> dict[str, type]:
    """Return the dataclasses that the packages show at their front doors and that hold tensors, arrays, tables or models."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(f"mechscope.{package}")
        for name in vars(module).get("__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) and dataclasses.is_dataclass(value):
                holds = " ".join(str(each.type) for each in dataclasses.fields(value) if each.repr)
                if re.search(r"Tensor|ndarray|DataFrame|nn\.Module", holds):
                    found[f"{package}.{name}"] = value
    return found


@pytest.mark.parametrize("name", public())
def test_no_public_value_prints_its_tensors(name: str) -> None:
    # the method that dataclasses make prints every field in full; it wraps one that guards against recursion
    assert not hasattr(vars(public()[name]).get("__repr__"), "__wrapped__")


@dataclass(frozen=True)
class Held:
    """A value with one field of each kind."""

    tensor: torch.Tensor
    array: np.ndarray
    table: pd.DataFrame
    many: tuple[int, ...]
    few: tuple[int, ...]
    named: dict[str, Any]
    text: str
    share: float
    module: torch.nn.Module
    inner: Any
    absent: None = None
    nothing: dict[str, int] = field(default_factory=dict)
    secret: int = field(default=3, repr=False)

    __repr__ = by_shape


def test_a_value_prints_shapes_and_short_values() -> None:
    inside = Held(torch.zeros(1), np.zeros(1), pd.DataFrame(), (), (), {}, "", 0.0, torch.nn.Linear(1, 1), None)
    held = Held(
        torch.zeros(2, 3, dtype=torch.float16), np.zeros((4, 5), dtype=bool), pd.DataFrame({"a": range(1200), "b": 0}), tuple(range(40)),
        (1, 2), {"seed": 3, "weights": np.zeros(7)}, "a" * 80, 1 / 3, torch.nn.Linear(2, 2), inside,
    )  # fmt: skip
    assert repr(held) == (
        "Held(tensor=float16 (2, 3), array=bool (4, 5), table=1,200 rows × 2 columns, many=tuple of 40, few=(1, 2), "
        f"named={{'seed': 3, 'weights': float64 (7,)}}, text='{'a' * 60}…', share=0.333333, module=Linear, inner=Held(…))"
    )
    assert short(dict.fromkeys(range(9), 0)) == "9 entries"


def test_a_recording_prints_sites_shapes_and_layers() -> None:
    recording = Recording()
    assert repr(recording) == "Recording(empty: no forward pass was run)"
    recording.values |= {("z", layer): torch.zeros(1, 4, 2, 8) for layer in (3, 1)} | {("logits", 0): torch.zeros(1, 4, 9)}
    assert repr(recording) == "Recording(z float32 (1, 4, 2, 8) of layers 1,3, logits float32 (1, 4, 9))"


def test_edge_scores_print_method_size_cost_and_the_largest() -> None:
    graph = Graph(1, 2, False)
    mean = np.full(len(graph), np.nan)
    mean[[0, 1, 2, 3]] = [0.1, -0.5, 0.0, 0.25]
    scores = EdgeScores(graph, mean, None, "eap", Cost(2, 1))
    names = graph.names
    assert repr(scores) == (
        f"EdgeScores(eap: 4 of {len(graph)} edges, 2 forward, 1 backward passes; "
        f"largest: {names[1]} -0.5, {names[3]} +0.25, {names[0]} +0.1)"
    )
    assert " over 5 texts, " in repr(dataclasses.replace(scores, per_text=np.zeros((5, len(graph)))))
    assert repr(Circuit.of(graph, names[:2])) == f"Circuit(2 of {len(graph)} edges: {names[0]}, {names[1]})"
    assert repr(Circuit.empty(graph)) == f"Circuit(0 of {len(graph)} edges)"


def test_effects_print_metric_sizes_and_the_largest() -> None:
    rows = [{"component": f"a0.h{head}", "site": "z", "layer": 0, "head": head, "feature": -1, "positions": "last"} for head in (0, 1)]
    values = np.array([[1.0, 1.2, 1.1, 0.9], [-1.0, -1.4, -1.2, -0.9]])
    shown = effects(rows, values, np.zeros(4), metric="logit-diff")
    low, high = shown.table.loc[1, ["low", "high"]]
    assert repr(shown) == f"Effects(logit-diff of 2 places over 4 texts; largest: a0.h1 at last -1.12 [{low:+.3g}, {high:+.3g}])"


def test_pairs_print_their_number_length_and_source_and_are_read_as_text() -> None:
    tokenizer = newsroom_tokenizer()
    clean, corrupt = (tuple(tokenizer(f"The mayor of {town}")["input_ids"]) for town in ("Ashford", "Shelby"))
    length = min(len(clean), len(corrupt))
    answer, wrong = (tokenizer(f" {word}")["input_ids"][0] for word in ("said", "was"))
    pair = PromptPair("one", clean[:length], corrupt[:length], (answer,), (wrong,), segments={"town": ((3, 4),)})
    pairs = Pairs((pair,), "towns", {"too long": 2})
    assert repr(pairs) == f"Pairs(1 from 'towns' of {length}–{length} tokens; left out: 2 too long)"
    assert repr(pair) == f"PromptPair('one': {length} tokens; {len(pair.changed)} differ; 1 right; 1 wrong; segments town)"
    row = pairs.written(tokenizer).iloc[0]
    assert row["clean"] == tokenizer.decode(list(clean[:length]))
    assert (row["answers"], row["wrong_answers"], row["target"]) == (tokenizer.decode([answer]), tokenizer.decode([wrong]), "")
    per_text = PerText(pairs)
    per_text.put("norm", next(pairs.batches()), np.zeros((6, 1)))
    assert repr(per_text) == "PerText(1 text: norm float64 (6, 1))"
