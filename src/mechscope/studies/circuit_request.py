"""Which texts a circuit is of: the pairs that edges are scored on, those that judge it, and how it is found."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from mechscope.circuits.choosing import Manner
from mechscope.circuits.graph import Graph
from mechscope.circuits.sender_outputs import SenderOutputs, Source
from mechscope.data.pairs import Pairs
from mechscope.data.splits import held_out
from mechscope.instrument.execution import Execution
from mechscope.settings.discovery import DiscoverySettings
from mechscope.subject import Subject

log = logging.getLogger(__name__)

# pairs that a half needs
FEWEST = 4


@dataclass(frozen=True)
class CircuitRequest:
    """Which texts a circuit is of, and how it is found and judged.

    Attributes:
        scored_on: Pairs that edges are scored on.
        judged_on: Pairs that circuits are judged on.
        settings: How circuits are found and judged, and by which metric.
    """

    scored_on: Pairs
    judged_on: Pairs
    settings: DiscoverySettings

    @classmethod
    def of(cls, pairs: Pairs, settings: DiscoverySettings, *, seed: int) -> CircuitRequest:
        """Divide pairs at random into those that edges are scored on and those that judge; equal pairs fall on one side."""
        different = len({(pair.clean, pair.corrupt) for pair in pairs})
        judged = round(settings.held_out * different)
        if settings.held_out and min(judged, different - judged) >= FEWEST:
            return cls(*held_out(pairs, settings.held_out, seed), settings)
        if settings.held_out:
            log.warning(
                "%d different pairs are too few to hold some out: the circuit is judged on the pairs it was found on",
                different,
                extra={"weakens": "circuit_summary"},
            )
        return cls(pairs, pairs, settings)

    @property
    def fingerprint(self) -> dict[str, str]:
        """The pairs that decide a result."""
        return {"scored_on": self.scored_on.hash, "judged_on": self.judged_on.hash}

    @property
    def record(self) -> dict[str, Any]:
        """The pairs, described for the manifest."""
        scored, judged = self.scored_on, self.judged_on
        data = {
            "source": scored.source,
            "pairs": len(scored) + (len(judged) if judged is not scored else 0),
            "scored_on": len(scored),
            "judged_on": len(judged),
            "problems": scored.problems,
            "hash": self.fingerprint,
        }
        return {"data": data}

    @property
    def manner(self) -> Manner:
        """How edges are chosen, but for their number."""
        settings = self.settings
        better = settings.metric in ("logit-diff", "probability")
        return {"rule": settings.rule, "by": settings.by, "sign": settings.sign, "higher_is_better": better}

    def share_of(self, graph: Graph) -> float | None:
        """Return the size that is given, as a share of all edges (or nodes), or None."""
        if self.settings.circuit_edges is not None:
            return self.settings.circuit_edges / len(graph)
        return self.settings.circuit_fraction

    def source(self, subject: Subject, *, execution: Execution) -> Source:
        """Return what closed edges of a model carry."""
        if self.settings.source == "mean":
            return SenderOutputs.mean_over(subject, self.scored_on, execution=execution)
        return self.settings.source
