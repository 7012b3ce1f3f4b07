"""Features: dictionaries of directions that a model writes; training them, measuring them, and using them inside the model."""

from mechscope.features.activations import Harvest, Live, harvest
from mechscope.features.codes import Codes
from mechscope.features.concepts import concept_scores, concept_scores_of_sets
from mechscope.features.controls import pca_control, random_control
from mechscope.features.dashboards import Dashboard, dashboard
from mechscope.features.dictionary import Dictionary
from mechscope.features.end_to_end import train_end_to_end
from mechscope.features.examples import Examples, promoted_tokens, top_examples
from mechscope.features.faithfulness import faithfulness
from mechscope.features.graphs import AttributionGraph, attribution_graph
from mechscope.features.layout import Group, Layout, autoencoder, cross_layer, crosscoder, transcoder
from mechscope.features.learner import DivergedError
from mechscope.features.measures import Measures, difference_of, measure, measure_together
from mechscope.features.node_edges import node_edges
from mechscope.features.node_effects import NodeEffects, node_effects
from mechscope.features.node_patching import node_means, patch_nodes, patch_places
from mechscope.features.places import Latent, Place
from mechscope.features.rules import Rule
from mechscope.features.shift import Shift, shift
from mechscope.features.spliced import LatentEdit, Spliced, ablated, scaled, splice, steered
from mechscope.features.splitting import splitting
from mechscope.features.standing import Node, Standing, in_order
from mechscope.features.trainer import Plan, TrainedDictionary, train
from mechscope.settings.features import (
    ConceptSettings,
    DashboardSettings,
    ExplainSettings,
    FeatureTraining,
    HarvestSettings,
    Objective,
    TokenSettings,
)

__all__ = [
    "AttributionGraph",
    "Codes",
    "ConceptSettings",
    "Dashboard",
    "DashboardSettings",
    "Dictionary",
    "DivergedError",
    "Examples",
    "ExplainSettings",
    "FeatureTraining",
    "Group",
    "Harvest",
    "HarvestSettings",
    "Latent",
    "LatentEdit",
    "Layout",
    "Live",
    "Measures",
    "Node",
    "NodeEffects",
    "Objective",
    "Place",
    "Plan",
    "Rule",
    "Shift",
    "Spliced",
    "Standing",
    "TokenSettings",
    "TrainedDictionary",
    "ablated",
    "attribution_graph",
    "autoencoder",
    "concept_scores",
    "concept_scores_of_sets",
    "cross_layer",
    "crosscoder",
    "dashboard",
    "difference_of",
    "faithfulness",
    "harvest",
    "in_order",
    "measure",
    "measure_together",
    "node_edges",
    "node_effects",
    "node_means",
    "patch_nodes",
    "patch_places",
    "pca_control",
    "promoted_tokens",
    "random_control",
    "scaled",
    "shift",
    "splice",
    "splitting",
    "steered",
    "top_examples",
    "train",
    "train_end_to_end",
    "transcoder",
]
