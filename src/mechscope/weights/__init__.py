"""What weights alone show (heads' OV and QK circuits, copying, composition, and how fine-tuning changed them), and what neurons and experts do on texts."""

from mechscope.weights.activity import Activity, neuron_activity
from mechscope.weights.activity_change import ActivityChange, activity_change
from mechscope.weights.bilinear import Bilinear, Singular
from mechscope.weights.change import head_changes
from mechscope.weights.compositions import composition, composition_change
from mechscope.weights.copying import Eigenvalues, weight_heads
from mechscope.weights.forms import ChangedForms, Forms
from mechscope.weights.memories import agreement, memories
from mechscope.weights.neurons import neuron_tokens, neuron_weights
from mechscope.weights.positions import position_scores
from mechscope.weights.rotary import is_bilinear, position_turn, score_matrices
from mechscope.weights.routing import Routing, RoutingChange, routing, routing_change
from mechscope.weights.singular import singular_tokens
from mechscope.weights.tokens import ov_tokens, qk_tokens
from mechscope.weights.vocabulary import Vocabulary, position_rows

__all__ = [
    "Activity",
    "ActivityChange",
    "Bilinear",
    "ChangedForms",
    "Eigenvalues",
    "Forms",
    "Routing",
    "RoutingChange",
    "Singular",
    "Vocabulary",
    "activity_change",
    "agreement",
    "composition",
    "composition_change",
    "head_changes",
    "is_bilinear",
    "memories",
    "neuron_activity",
    "neuron_tokens",
    "neuron_weights",
    "ov_tokens",
    "position_rows",
    "position_scores",
    "position_turn",
    "qk_tokens",
    "routing",
    "routing_change",
    "score_matrices",
    "singular_tokens",
    "weight_heads",
]
