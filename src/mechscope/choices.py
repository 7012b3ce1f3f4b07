"""Names that a user chooses among, each list once: techniques, settings and the help of the command line read them here.

Nothing is imported, so that settings which name a choice stay light.
"""

from __future__ import annotations

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Rows = Literal["all", "document", "summary"]
"""Query rows, or tokens, that a statistic is over."""
MetricName = Literal["logit-diff", "probability", "loss", "kl"]
LogitMetric = Literal["logit-diff", "target-logit"]
"""Metrics that weigh logits, which direct logit attribution takes apart."""
PatchSite = Literal[
    "head", "query", "key", "value", "pattern", "attention", "mixer", "mlp", "neuron", "expert", "residual", "embedding", "latent"
]
AblationSource = Literal["zero", "mean", "resample", "corrupt"]
VectorSite = Literal["residual", "attention", "mixer", "mlp", "neuron", "embedding", "head"]
"""Sites that hold one vector per token; of `head` one per head."""
Among = Literal["vocabulary", "answers"]
"""Among which tokens the likeliest is sought: all, or the right and wrong answers."""
LensSite = Literal["residual", "attention_output", "mixer_output", "mlp_output", "head_output"]
MatrixKind = Literal["query_key_value", "attention_output", "mlp_up", "mlp_down"]
"""Weight matrices that read or write the residual stream."""
LensNorm = Literal["applied", "frozen"]
LayerRule = Literal["layers_by_kl", "layers_by_write", "layers_by_score", "last_layers", "random_layers"]
HeadRule = Literal["heads_by_kl", "heads_by_entropy", "heads_by_write", "heads_by_score", "random_heads"]
GradientMethod = Literal["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"]
UnsignedMethod = Literal["acdc", "edge-pruning", "flow-routes"]
"""Methods whose scores only say how important an edge is, not which way it works."""
DiscoveryMethod = Literal[GradientMethod, "exact", UnsignedMethod]
"""Ways to score the edges of a circuit."""
PathPoints = Literal["left", "midpoint"]
"""Where the points of integrated gradients lie: at the left end of each step, or in its middle."""
EdgeUnit = Literal["edges", "nodes"]
EdgeSign = Literal["absolute", "helpful"]
TuningMethod = Literal["full", "lora"]
ControlKind = Literal["tuned", "seed", "shuffled", "other", "noise"]
"""What a model is beside a fine-tuning: the tuned one itself, the same training with another seed, one on shuffled summaries, another, or noise."""
TrainedControl = Literal["seed", "shuffled"]
"""Controls that `mechscope tune` trains."""
Schedule = Literal["linear", "cosine", "constant"]
LossOn = Literal["summary", "all"]
"""Tokens that a fine-tuning learns and scores."""
LoraModules = Literal["attention", "mlp", "all"]
"""Linear maps of a layer that LoRA adapts."""
CORPORA = ("newsroom",)
"""Documents that are generated and named by a word."""
PAIR_TASKS = ("ioi", "greater_than", "docstring", "induction", "repeated")
"""Prompt pairs that are generated and named by a word."""
PAIR_KINDS = ("newsroom", "facts", "salience")
"""Prompt pairs that are named by a word and, behind a colon, a role or a source."""
Strategy = Literal[
    "standard",
    "targeted_layers",
    "targeted_heads",
    "more_rank",
    "circuit",
    "circuit_rank",
    "random_layers",
    "random_circuit",
    "last_layers",
    "full",
    "none",
]
"""Where a fine-tuning that competes learns."""
BudgetProtocol = Literal["equal_rank", "equal_parameters"]
"""What competing placements of LoRA have in common."""
RuleName = Literal["relu", "gated", "topk", "batchtopk", "jumprelu"]
"""Which latents of a dictionary are active."""
Penalty = Literal["l1", "l0", "tanh", "target"]
"""What keeps the latents of a dictionary sparse while it is trained."""
End = Literal["none", "kl", "loss"]
"""What a dictionary that is trained end to end keeps of a model's predictions."""

Norms = Literal["unit", "free"]
"""Norms of a dictionary's decoders."""
NodeMethod = Literal["attribution", "integrated-gradients"]
"""Ways to estimate what a latent or an error does to a metric."""
NodeSource = Literal["corrupt", "zero"]
"""What a latent or an error becomes: its value on the corrupt text, or zero."""
Quadrature = Literal["gauss", "midpoint"]
"""Where the points of integrated gradients lie: those of Gauss and Legendre, or the middles of equal steps."""
Filling = Literal["corrupt", "zero", "mean"]
"""What stands in the place of nodes outside a circuit of latents: their value on the corrupt text, zero, or their mean."""
Errors = Literal["kept", "removed", "in circuit"]
"""What becomes of the errors of dictionaries where a circuit of latents is judged."""
ExplanationScorer = Literal["detection", "fuzzing", "simulation", "intruder"]
"""By what an explanation of a unit is scored."""
