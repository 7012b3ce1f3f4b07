"""How a circuit is found and judged: which edges count, how many, and beside what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from annotated_types import Ge, Gt, Le

from mechscope.choices import DiscoveryMethod, EdgeSign, EdgeUnit, GradientMethod, MetricName, PathPoints, UnsignedMethod
from mechscope.errors import SettingsError
from mechscope.settings import Count, Number, Settings, ShareBelowOne, setting


@dataclass(frozen=True, kw_only=True)
class DiscoverySettings(Settings):
    """How a circuit is found and judged."""

    panel: ClassVar[str] = "Circuit"

    method: DiscoveryMethod = setting("eap-ig", "How edges are scored.")
    metric: MetricName = setting("logit-diff", "What is measured; loss is of a target span, kl compares with the clean run.")
    steps: Number = setting(5, "Points of integrated gradients.")
    pruning_steps: Number = setting(1000, "Steps of edge-pruning; the circuit's measures say whether it converged.")
    points: PathPoints = setting("left", "Where they lie: left (as EAP-IG's authors) or midpoint.")
    source: Literal["corrupt", "mean", "zero"] = setting("corrupt", "What closed edges carry: the corrupt run's values, means, or zero.")
    rule: Literal["top", "greedy"] = setting("top", "How edges are chosen: the strongest, or greedily from the logits.")
    by: EdgeUnit = setting("edges", "What is chosen: edges, or nodes with all edges among them.")
    sign: EdgeSign = setting("absolute", "Strongest by absolute score, or by how much an edge helps the metric.")
    circuit_edges: Number | None = setting(None, "Edges of the circuit, before dead ends are removed.")
    circuit_fraction: Annotated[float, Gt(0), Le(1)] | None = setting(None, "The same as a share of all edges, such as 0.02 for 2 %.")
    faithful: Annotated[float, Gt(0), Le(1)] = setting(
        0.9,
        "Without either: the smallest size (of 0.1 % to 100 % of edges) whose faithfulness f, on the pairs that edges are scored on, is this near the "
        "model's: |1 - f| at most 1 - this.",
    )
    held_out: ShareBelowOne = setting(0.5, "Share of the pairs that only judge and are not used to find the circuit; 0 for all in both.")
    random_circuits: Count = setting(10, "Random circuits of every size, as controls.")
    circuit_resamples: Annotated[int, Ge(2)] = setting(50, "Halvings and resamples of the pairs, for the model's own noise.")
    criteria: bool = setting(True, "Completeness and minimality of the circuit.")

    def __post_init__(self) -> None:
        """Refuse settings that are out of bounds or contradict each other, by a `SettingsError`."""
        super().__post_init__()
        if self.method in get_args(GradientMethod):
            check_combination(self.method, metric=self.metric, source=self.source)
        if self.circuit_edges is not None and self.circuit_fraction is not None:
            raise SettingsError("give the circuit's size as circuit_edges or as circuit_fraction, not both")
        if self.circuit_edges is not None and self.by == "nodes":
            raise SettingsError(
                "circuit_edges counts edges, and by 'nodes' chooses heads and MLPs: give circuit_fraction, a share of these"
            )
        if self.rule == "greedy" and self.by == "nodes":
            raise SettingsError("rule 'greedy' grows edge by edge: use it with by 'edges', or rule 'top' for nodes")
        if self.sign == "helpful" and self.method in get_args(UnsignedMethod):
            raise SettingsError(
                f"sign 'helpful' needs scores with a sign, and those of {self.method!r} only say how important an edge is: use sign 'absolute'"
            )
        if self.method == "edge-pruning" and self.circuit_fraction == 1:
            raise SettingsError("method 'edge-pruning' learns which edges to leave out, so circuit_fraction must be below 1")


def check_combination(method: str, *, metric: str, source: object) -> None:
    """Refuse a method of gradients with a metric, or a source of closed edges (or a word for it), that it cannot work with.

    Raises:
        SettingsError: They contradict each other.
    """
    if metric == "kl" and method == "eap":
        raise SettingsError(
            "metric 'kl' is least, so flat, at the clean run: its gradient there is 0; use eap-ig or clean-corrupted, or logit-diff"
        )
    if source != "corrupt" and method in ("eap-ig", "clean-corrupted"):
        raise SettingsError(
            f"method {method!r} runs between the clean and the corrupt text, so the source must be 'corrupt': use eap or eap-ig-activations"
        )
