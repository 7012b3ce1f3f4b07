"""Circuits: a model as a graph of edges, finding those that do a task, judging them, and comparing them before and after fine-tuning."""

from mechscope.circuits.acdc import acdc
from mechscope.circuits.attribution import attribute_edges
from mechscope.circuits.cards import component_cards
from mechscope.circuits.change import edge_shift, overlap_table
from mechscope.circuits.choosing import MIB_FRACTIONS, choose, fractions_curve
from mechscope.circuits.criteria import completeness, minimality
from mechscope.circuits.discovery import discover
from mechscope.circuits.evaluation import auroc, evaluate, faithfulness_curve
from mechscope.circuits.exact import exact_effects
from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.gain import tuned_edges
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.overlap import jaccard, node_jaccard, overlap, random_like, robustness
from mechscope.circuits.pruning import prune_edges
from mechscope.circuits.routes import flow_routes
from mechscope.circuits.scores import EdgeScores, from_json, to_json
from mechscope.circuits.sender_outputs import SenderOutputs

__all__ = [
    "MIB_FRACTIONS",
    "Circuit",
    "CircuitRuns",
    "EdgeScores",
    "Graph",
    "SenderOutputs",
    "acdc",
    "attribute_edges",
    "auroc",
    "choose",
    "completeness",
    "component_cards",
    "discover",
    "edge_shift",
    "evaluate",
    "exact_effects",
    "faithfulness_curve",
    "flow_routes",
    "fractions_curve",
    "from_json",
    "jaccard",
    "minimality",
    "node_jaccard",
    "overlap",
    "overlap_table",
    "prune_edges",
    "random_like",
    "robustness",
    "to_json",
    "tuned_edges",
]
