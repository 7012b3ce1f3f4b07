"""What can be known to be wrong about a circuit's settings before a model is loaded: hours of scoring should not end in a message about a flag."""

from __future__ import annotations

from typing import get_args

from mechscope.circuits.attribution import METHODS, Points, check_method
from mechscope.circuits.choosing import Sign, Unit
from mechscope.circuits.discovery import DISCOVERIES
from mechscope.circuits.graph import Graph
from mechscope.circuits.scores import UNSIGNED
from mechscope.data.metrics import METRICS
from mechscope.errors import SettingsError
from mechscope.studies.pair_settings import DiscoverySettings


def check_discovery(settings: DiscoverySettings, *, metric: str) -> None:
    """Refuse settings that cannot be used with any model.

    Args:
        settings: How circuits are found and judged.
        metric: What is measured.

    Raises:
        SettingsError: A setting is not known, out of range, or contradicts another.
    """
    known = {
        "method": (settings.method, DISCOVERIES),
        "metric": (metric, METRICS),
        "points": (settings.points, get_args(Points)),
        "source": (settings.source, ("corrupt", "mean", "zero")),
        "rule": (settings.rule, ("top", "greedy")),
        "by": (settings.by, get_args(Unit)),
        "sign": (settings.sign, get_args(Sign)),
    }
    for name, (value, values) in known.items():
        if value not in values:
            raise SettingsError(f"{name} {value!r} is not known: use one of {', '.join(values)}")
    _check_numbers(settings)
    if settings.method in METHODS:
        check_method(settings.method, steps=settings.steps, points=settings.points, metric=metric, source=settings.source)
    if settings.rule == "greedy" and settings.by == "nodes":
        raise SettingsError("rule 'greedy' grows edge by edge: use it with by 'edges', or rule 'top' for nodes")
    if settings.sign == "helpful" and settings.method in UNSIGNED:
        raise SettingsError(
            f"sign 'helpful' needs scores with a sign, and those of {settings.method!r} only say how important an edge is: use sign 'absolute'"
        )
    if settings.method == "edge-pruning" and settings.circuit_fraction == 1:
        raise SettingsError("method 'edge-pruning' learns which edges to leave out, so circuit_fraction must be below 1")


def check_size(settings: DiscoverySettings, graph: Graph) -> None:
    """Refuse a circuit larger than the model.

    Raises:
        SettingsError: There are not as many edges, or edge pruning would have none to leave out.
    """
    most = len(graph) - (settings.method == "edge-pruning")
    if settings.circuit_edges is not None and settings.circuit_edges > most:
        raise SettingsError(f"a circuit of {settings.circuit_edges:,} edges: this model has {len(graph):,}, ask for 1 to {most:,}")


def _check_numbers(settings: DiscoverySettings) -> None:
    size = settings.circuit_fraction
    if settings.circuit_edges is not None and size is not None:
        raise SettingsError("give the circuit's size as circuit_edges or as circuit_fraction, not both")
    if settings.circuit_edges is not None and settings.by == "nodes":
        raise SettingsError("circuit_edges counts edges, and by 'nodes' chooses heads and MLPs: give circuit_fraction, a share of these")
    ranges = {
        "circuit_edges": (settings.circuit_edges is None or settings.circuit_edges >= 1, "at least 1"),
        "circuit_fraction": (size is None or 0 < size <= 1, "a share above 0 and up to 1, such as 0.02 for 2 %"),
        "faithful": (0 < settings.faithful <= 1, "above 0 and up to 1"),
        "held_out": (0 <= settings.held_out < 1, "a share of the pairs, from 0 to below 1"),
        "steps": (settings.steps >= 1, "at least 1"),
        "random_circuits": (settings.random_circuits >= 0, "0 or more"),
        "circuit_resamples": (settings.circuit_resamples >= 2, "at least 2"),
    }
    for name, (fits, wanted) in ranges.items():
        if not fits:
            raise SettingsError(f"setting {name!r} is {getattr(settings, name)}: give {wanted}")
