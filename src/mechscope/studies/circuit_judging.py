"""What a circuit is asked about, and what is measured of it on pairs that it was not found on.

Its size is chosen on the pairs that found it: the smallest one of several that is faithful on some texts looks better on these than it is.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mechscope.circuits.cards import component_cards
from mechscope.circuits.choosing import choose
from mechscope.circuits.criteria import Minimality, completeness, minimality
from mechscope.circuits.evaluation import Area, Curve, evaluate, faithfulness_curve
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.overlap import compare_seeds, robustness
from mechscope.circuits.scores import Scores
from mechscope.circuits.written import Source, Written
from mechscope.data.pairs import Pairs
from mechscope.progress import Progress
from mechscope.studies.circuit_checks import check_discovery
from mechscope.studies.pair_settings import DiscoverySettings
from mechscope.studies.stages import fields_of
from mechscope.subject import Subject

log = logging.getLogger(__name__)

# size where no size is faithful or nothing can be said of it
FALLBACK = 0.05
# pairs that a half needs
FEWEST = 4
# below it a component is said to be needed
_LEVEL = 0.05


@dataclass(frozen=True)
class Asked:
    """What a circuit is asked about.

    Attributes:
        found_on: Pairs that edges are scored on.
        judged_on: Pairs that circuits are judged on.
        metric: What is measured.
        tokens_per_batch: Most tokens of a batch.
        seed: Seed of every random choice.
        settings: How circuits are found and judged.
    """

    found_on: Pairs
    judged_on: Pairs
    metric: str
    tokens_per_batch: int
    seed: int
    settings: DiscoverySettings

    @classmethod
    def of(cls, pairs: Pairs, settings: DiscoverySettings, *, metric: str, tokens_per_batch: int, seed: int) -> Asked:
        """Divide pairs into those that find and those that judge; arguments as the attributes.

        Raises:
            SettingsError: A setting is not usable.
        """
        check_discovery(settings, metric=metric)
        share = settings.held_out
        judged = round(share * len(pairs))
        if not share or min(judged, len(pairs) - judged) < FEWEST:
            if share:
                log.warning("%d pairs are too few to hold some out: the circuit is judged on the pairs it was found on", len(pairs))
            return cls(pairs, pairs, metric, tokens_per_batch, seed, settings)
        order = np.random.default_rng(seed).permutation(len(pairs))
        found_on, judged_on = (
            Pairs(tuple(pairs.pairs[at] for at in sorted(which)), pairs.source, pairs.problems)
            for which in (order[judged:].tolist(), order[:judged].tolist())
        )
        return cls(found_on, judged_on, metric, tokens_per_batch, seed, settings)

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the result, for a stage."""
        return {
            "found_on": self.found_on.hash,
            "judged_on": self.judged_on.hash,
            "metric": self.metric,
            "seed": self.seed,
            **fields_of(self.settings, DiscoverySettings),
        }

    @property
    def running(self) -> dict[str, Any]:
        """Options of everything that runs a model."""
        return {"metric": self.metric, "tokens_per_batch": self.tokens_per_batch}

    @property
    def choice(self) -> dict[str, Any]:
        """Options of choosing edges, but for their number."""
        better = self.metric in ("logit-diff", "probability")
        return {"rule": self.settings.rule, "by": self.settings.by, "sign": self.settings.sign, "higher_is_better": better}

    def share_of(self, graph: Graph) -> float | None:
        """Return the size that is asked for as a share of all edges (or nodes), or None."""
        if self.settings.circuit_edges is not None:
            return self.settings.circuit_edges / len(graph)
        return self.settings.circuit_fraction

    def source(self, subject: Subject) -> Source:
        """Return what closed edges of a model carry."""
        if self.settings.source == "mean":
            return Written.mean_over(subject, self.found_on, tokens_per_batch=self.tokens_per_batch)
        return self.settings.source


@dataclass(frozen=True)
class Judged:
    """A model's circuit with everything that was measured of it.

    Attributes:
        scores: The scores of all edges.
        circuit: The chosen circuit.
        fraction: Its size before dead ends were removed, as a share of all edges (or of all heads and MLPs, where nodes are chosen).
        tables: Tables by name, without the column that names the model.
    """

    scores: Scores
    circuit: Circuit
    fraction: float
    tables: dict[str, pd.DataFrame]


def judge(subject: Subject, scores: Scores, asked: Asked, *, other_seed: Scores | None = None, progress: Progress | None) -> Judged:
    """Choose a circuit by its scores and measure it on the pairs that judge.

    Args:
        subject: The model.
        scores: The scores of its edges.
        asked: Pairs, metric and settings.
        other_seed: What the same method said with another seed, for methods that draw.
        progress: Called with what is being done.
    """
    settings, options = asked.settings, {**asked.running, "source": asked.source(subject), "progress": progress}
    told = {**asked.choice, **options, "seed": asked.seed}
    curve = faithfulness_curve(subject, asked.judged_on, scores, random=settings.random_circuits, **told)
    fraction = asked.share_of(scores.graph)
    if fraction is None:
        same = asked.found_on is asked.judged_on
        fraction = _smallest(curve if same else faithfulness_curve(subject, asked.found_on, scores, random=0, **told), settings.faithful)
    circuit = choose(scores, fraction=fraction, **asked.choice)
    if not len(circuit):
        log.warning("no path of the %.3g %% strongest edges leads from the input to the logits: the circuit is empty", 100 * fraction)
    own = evaluate(subject, asked.judged_on, [circuit], **options)
    share = own.faithfulness(seed=asked.seed)
    summary = [
        _measure("edges", len(circuit)),
        _measure("edges of the model", len(scores.graph)),
        _measure("nodes", int(circuit.nodes.sum())),
        _measure("metric of the model", own.clean.mean()),
        _measure("metric without edges", own.empty.mean()),
        _measure("metric of the circuit", own.values[0].mean()),
        _measure("faithfulness", share.value[0], share.low[0], share.high[0]),
        _area("CPR", curve.cpr),
        _area("CMD", curve.cmd),
    ]
    needed: Minimality | None = None
    if settings.criteria and circuit.components():
        whole = completeness(subject, asked.judged_on, circuit, seed=asked.seed, **options)
        summary.append(_measure("incompleteness, mean over knockouts", whole.table["normalised"].mean()))
        if whole.table["normalised"].notna().any():
            worst = whole.table.sort_values("normalised", ascending=False).to_dict("records")[0]
            ends = (worst["normalised_low"], worst["normalised_high"])
            summary.append(_measure("incompleteness, worst knockout", worst["normalised"], *ends))
        needed = minimality(subject, asked.judged_on, circuit, seed=asked.seed, **options)
        summary.append(_needed(needed))
    if scores.per_text is not None and len(scores.per_text) >= FEWEST:
        stable = robustness(scores, fraction=fraction, resamples=settings.circuit_resamples, seed=asked.seed, **asked.choice).table
        for row in stable.to_dict("records"):
            name = f"Jaccard of {row['of']}, {row['comparison']}"
            summary.append(_measure(name, row["mean"], row["low"], row["high"], random=row["null"]))
    if other_seed is not None:
        summary += _seeds(circuit, choose(other_seed, fraction=fraction, **asked.choice))
    summary += [_measure("forward passes to score", scores.cost.forward), _measure("backward passes to score", scores.cost.backward)]
    tables = {
        "circuit_edges": scores.table().assign(in_circuit=circuit.edges),
        "circuit_nodes": scores.node_table().assign(in_circuit=circuit.nodes),
        "circuit_curve": curve.table,
        "circuit_summary": pd.DataFrame(summary),
        "circuit_components": _components(subject, scores, circuit, needed, asked, options["source"]),
    }
    return Judged(scores, circuit, fraction, tables)


def _smallest(curve: Curve, faithful: float) -> float:
    """Return the smallest size at which a circuit is near enough to the model: neither too little nor too much of its effect."""
    if curve.table["faithfulness"].isna().all():
        log.warning("%s; the circuit is the %g %% strongest edges", curve.notes["faithfulness"], 100 * FALLBACK)
        return FALLBACK
    enough = curve.table.loc[(1 - curve.table["faithfulness"]).abs() <= 1 - faithful, "fraction"]
    return float(enough.iloc[0]) if len(enough) else 1.0


def _needed(found: Minimality) -> dict[str, Any]:
    """Count the components that a circuit needs, beside how many would seem to be needed if all were superfluous."""
    name, p, parts = f"components that are needed (p < {_LEVEL})", found.table["p"], len(found.controls)
    if not parts:
        return _measure(name, np.nan)
    # p is a rank among the parts: each of parts + 1 values is equally likely for one more of them
    small = np.count_nonzero(np.arange(1, parts + 2) / (parts + 1) < _LEVEL)
    return _measure(name, int((p < _LEVEL).sum()), random=len(p) * small / (parts + 1))


def _seeds(circuit: Circuit, other: Circuit) -> list[dict[str, Any]]:
    found = compare_seeds([circuit, other]).iloc[0]
    return [_measure(f"Jaccard of {of}, other seed of the method", found[of], random=found[f"{of}_null"]) for of in ("edges", "nodes")]


def _measure(name: str, value: float, low: float = np.nan, high: float = np.nan, *, random: float = np.nan) -> dict[str, Any]:
    return {"measure": name, "value": float(value), "low": low, "high": high, "random": random, "random_low": np.nan, "random_high": np.nan}


def _area(name: str, area: Area) -> dict[str, Any]:
    found = _measure(name, area.value, area.low, area.high, random=area.random)
    return {**found, "random_low": area.random_low, "random_high": area.random_high}


def _components(
    subject: Subject, scores: Scores, circuit: Circuit, needed: Minimality | None, asked: Asked, source: Source
) -> pd.DataFrame:
    cards = component_cards(subject, asked.judged_on, circuit, source=source, **asked.running)
    nodes = scores.node_table().rename(columns={"node": "component"})
    columns = [name for name in ("component", "score", "low", "high") if name in nodes]
    table = cards.merge(nodes[columns], on="component", how="left")
    if needed is not None:
        found = needed.table[["component", "normalised", "p", "q"]]
        found = found.rename(columns={"normalised": "minimality", "p": "minimality_p", "q": "minimality_q"})
        table = table.merge(found, on="component", how="left")
    return table.sort_values("score", key=np.abs, ascending=False, kind="stable").reset_index(drop=True)


def plain(label: str) -> str:
    """Return a label as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", label)
