"""The sections of the page: what each is called, which tables it needs, and which command adds it where it is absent.

A study's sections are all listed, those it lacks with the command that adds them. Sections of a sweep, of circuits and of readings (lenses, roles,
weights) stand alone or within a study and are not missed where they are absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechscope.report.circuit_summary import only_circuits
from mechscope.report.reading_summary import READING

_ADDS = {
    "claims": "mechscope study summarization --base BASE --tuned TUNED --data DATA --out NEW_RUN",
    "difference": "mechscope diff BASE TUNED --data DATA --out NEW_RUN",
    "bakeoff": "mechscope bakeoff BASE --data DATA --out NEW_RUN",
}
# sections of a single sweep: they stand alone
_SWEEP = {"effects"}
_SECTIONS = (
    # id, heading, tables of which one must be there, what adds it to a study; "" where a study does not miss it
    ("effects", "Effects", ("effects",), "claims"),
    ("claims", "Claims of the paper", ("claims",), "claims"),
    ("attention", "Attention", ("heads",), "difference"),
    ("layers", "Layers", ("layers",), "difference"),
    ("heads", "Heads", ("heads",), "difference"),
    ("weights", "Weights", ("weights",), "difference"),
    ("outputs", "Outputs", ("outputs",), "difference"),
    ("selection", "Selection and its stability", ("selection",), "claims"),
    ("matters", "What carries the gain", ("cross_model", "ablation", "importance"), "claims"),
    ("circuit", "Circuit", ("circuit_edges", "circuit_curve", "circuit_summary"), ""),
    ("circuit-components", "Components of the circuit", ("circuit_components",), ""),
    ("circuit-change", "What changed in the circuit", ("circuit_overlap", "circuit_shift", "circuit_gain"), ""),
    ("circuit-time", "The circuit over training", ("circuit_time",), ""),
    ("lens", "Through the lens", ("lens_grid", "lens_summary", "lens_change"), ""),
    ("attribution", "Direct logit attribution", ("logit_attribution", "logit_attribution_change"), ""),
    ("roles", "Roles of heads", ("head_roles", "role_definitions", "head_role_changes", "head_cards"), ""),
    ("token-attention", "Attention, token by token", ("attention_edges",), ""),
    (
        "head-weights",
        "Heads in vocabulary space",
        ("weight_heads", "weight_tokens", "weight_singular", "composition", "weight_changes"),
        "",
    ),
    ("neurons", "Neurons", ("neurons", "neuron_changes", "neuron_contexts"), ""),
    ("bakeoff", "Bake-off", ("bakeoff", "bakeoff_summary", "learning_curves"), "bakeoff"),
    ("samples", "Summaries", ("summaries", "rouge"), "claims"),
)


def only_readings(tables: Mapping[str, pd.DataFrame]) -> bool:
    """Return whether a run reads a model (lenses, roles, weights) and does nothing else."""
    return all(name in READING for name in tables)


def alone(tables: Mapping[str, pd.DataFrame]) -> bool:
    """Return whether a run is no study: it has only circuits and readings, so that the sections of a study are not missed."""
    return only_circuits({name: table for name, table in tables.items() if name not in READING})


def sections(tables: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Return the sections of the page in order: `id`, `heading`, whether its tables are `present`, and the command that `adds` it."""
    sweep = any(name in tables for name in _SWEEP)
    found: list[dict[str, Any]] = [
        {"id": name, "heading": heading, "present": any(table in tables for table in needed), "adds": _ADDS.get(adds, "")}
        for name, heading, needed, adds in _SECTIONS
        if (name in _SWEEP) is sweep
    ]
    own = alone(tables)
    return [section for section in found if (not own if section["adds"] else section["present"])]
