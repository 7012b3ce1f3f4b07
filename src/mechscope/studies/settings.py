"""What a command is asked to do, as a value: every field is a flag of the command line and a key of `study.yaml`.

The dataclasses here are the one place where a setting's name, type, default and help are written; the command line builds its flags from them and
`resolve` checks a configuration file against them. Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

DEFAULT_TEMPLATE = "Article: {document}\nSummary: {summary}"


def _setting(default: Any, help: str) -> Any:
    """Declare a field with the sentence that explains it; `...` as the default means it must be given."""
    if default is ...:
        return field(metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How models are loaded."""

    dtype: str = _setting("float32", "Type of the weights: float32, bfloat16, float16, float64, or auto for the stored one.")
    device: str = _setting("auto", "Where to run: auto, cpu, cuda, cuda:N.")
    unsafe: bool = _setting(False, "Also accept pickled checkpoints (.bin), read with weights_only.")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which documents are used, and how they become tokens."""

    data: str = _setting(
        ..., "Documents: a JSONL, CSV or Parquet file, a hub data set such as cnn_dailymail:3.0.0, or newsroom (the generated corpus)."
    )
    document_column: str = _setting("document", "Column that holds the document.")
    summary_column: str = _setting("summary", "Column that holds the reference summary.")
    on_problem: Literal["skip", "error"] = _setting("skip", "Unusable rows: skip and count them, or stop with an error.")
    template: str = _setting(DEFAULT_TEMPLATE, "Prompt around the document and the summary; only the document is ever truncated.")
    max_tokens: int = _setting(1024, "Most tokens of a prompt with its summary; lowered to what the model can read.")
    seed: int = _setting(0, "Seed of every random choice: sampling, splitting, initialisation, resampling.")


@dataclass(frozen=True, kw_only=True)
class SplitSettings(DataSettings):
    """How documents are divided into training, validation and test."""

    validation_data: str | None = _setting(None, "Validation documents; by default a part of --data, disjoint from the others.")
    test_data: str | None = _setting(None, "Held-out documents for the difference and for ROUGE; by default a part of --data.")
    train_split: str = _setting("train", "Split of a hub data set to train on.")
    validation_split: str = _setting("validation", "Split of a hub data set to validate on.")
    test_split: str = _setting("test", "Split of a hub data set to test on.")
    train_documents: int = _setting(2000, "Documents to train on; fewer if there are not that many.")
    validation_documents: int = _setting(200, "Documents whose loss stops the training.")
    test_documents: int = _setting(300, "Held-out documents to measure on.")


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How the difference is measured."""

    tokens_per_batch: int = _setting(8192, "Tokens of a batch, padding included; decides the memory.")
    gini: bool = _setting(False, "Also measure the Gini sparsity of attention (several times slower on long documents).")
    replicates: int = _setting(200, "Bootstrap replicates for the stability of selections.")
    geometry_documents: int = _setting(300, "Most documents whose pooled states are kept for CKA and RSA.")
    pattern_documents: int = _setting(0, "Documents whose whole attention patterns are kept (tensors/patterns.safetensors).")
    resize: Literal["refuse", "truncate"] = _setting("refuse", "Vocabularies of different size: refuse, or compare the shared tokens.")
    rows: Literal["all", "document", "summary"] = _setting("all", "Which query rows selections and claims read.")


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """Which layers and heads are called most changed."""

    layer_rule: str = _setting(
        "layers_by_kl", "Rule that chooses layers: layers_by_kl (the paper's), layers_by_score, last_layers, random_layers."
    )
    head_rule: str = _setting("heads_by_kl", "Rule that chooses heads: heads_by_kl, heads_by_entropy, heads_by_score, random_heads.")
    selected_layers: int | None = _setting(None, "How many layers; by default a quarter of them.")
    selected_heads: int | None = _setting(None, "How many heads; by default as many as the selected layers hold.")


@dataclass(frozen=True, kw_only=True)
class CausalSettings:
    """How it is tested whether what changed matters."""

    causal: bool = _setting(True, "Test by interventions which layers and heads carry the gain.")
    causal_documents: int = _setting(16, "Held-out documents for the interventions.")
    ablation: Literal["mean", "resample", "zero"] = _setting("mean", "What ablated heads are replaced by.")
    random_sets: int = _setting(200, "Random head sets that the ablation of the selected heads is compared with.")


@dataclass(frozen=True, kw_only=True)
class CircuitStudySettings:
    """How the circuit of summarizing is found before and after fine-tuning."""

    circuit: bool = _setting(True, "Find the circuit of summarizing in both models and compare them.")
    circuit_documents: int = _setting(32, "Held-out documents for it, each beside a version that lacks its salient sentence.")
    circuit_method: str = _setting("eap-ig", "How edges are scored, as for `mechscope circuit --method`.")
    circuit_size: float | None = _setting(None, "Share of all edges in the circuit; by default the smallest that is 90 % faithful.")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How fine-tuning is run; the defaults are the paper's."""

    learning_rate_full: float = _setting(3e-5, "Peak learning rate of full fine-tuning.")
    learning_rate_lora: float = _setting(3e-4, "Peak learning rate of LoRA.")
    weight_decay: float = _setting(0.01, "AdamW's decoupled weight decay.")
    epochs: int = _setting(10, "Passes over the training documents at most.")
    max_steps: int | None = _setting(None, "Optimizer steps at most; by default what the epochs give.")
    batch_size: int = _setting(32, "Documents per forward pass.")
    gradient_accumulation: int = _setting(1, "Forward passes per optimizer step.")
    warmup: float = _setting(0.0, "Share of the steps in which the learning rate rises, 0 to 1.")
    schedule: Literal["linear", "cosine", "constant"] = _setting("linear", "What the learning rate does after the warm-up.")
    patience: int | None = _setting(6, "Evaluations without a better validation loss after which training stops.")
    eval_every: int | None = _setting(None, "Optimizer steps between evaluations; by default once per epoch.")
    loss_on: Literal["summary", "all"] = _setting("summary", "Tokens that are learned and scored.")
    bf16: bool = _setting(False, "Compute in bfloat16 while the learned weights stay float32.")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What a LoRA adapter is made of."""

    rank: int = _setting(8, "Rank of standard LoRA, and of every strategy at equal rank.")
    lora_scaling: float = _setting(2.0, "Alpha divided by rank.")
    lora_dropout: float = _setting(0.0, "Dropout in front of the adapter.")
    lora_modules: Literal["attention", "mlp", "all"] = _setting("attention", "Linear maps of a layer that are adapted.")


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """How summaries are written."""

    beams: int = _setting(1, "Beams of the search; 1 is greedy (the paper: 2).")
    no_repeat_ngram: int = _setting(0, "Length of word pieces that may not repeat; 0 allows all (the paper: 2).")
    max_new_tokens: int = _setting(150, "Longest summary, in tokens.")
    rouge_documents: int = _setting(100, "Held-out documents that are summarized and scored.")


@dataclass(frozen=True, kw_only=True)
class ContestSettings:
    """Which placements of LoRA compete."""

    strategies: str = _setting("all", "Strategies that compete, joined by commas; all: every one whose layers, heads or circuit are given.")
    target_circuit: str | None = _setting(
        None, 'Circuit for LoRA: its heads and MLPs, e.g. "a3.h5,m3", or a circuit file (.json, MIB/EAP-IG); without, no strategy uses one.'
    )
    circuit_layers: str | None = _setting(
        None, 'The circuit\'s critical layers, which get more rank than the others, e.g. "layers:2,5"; without, that strategy is left out.'
    )
    protocols: str = _setting("equal_rank,equal_parameters", "Budgets: equal_rank (the paper's), equal_parameters, or both.")
    seeds: int = _setting(3, "Seeds of every strategy.")


@dataclass(frozen=True, kw_only=True)
class DiffSettings(ModelSettings, DataSettings, MeasureSettings, SelectionSettings):
    """`mechscope diff`: what fine-tuning changed."""

    base: str = _setting(..., "The pre-trained model: hub id, directory, or adapter.")
    tuned: str = _setting(..., "The fine-tuned model or adapter.")
    split: str | None = _setting(None, "Split of a hub data set to measure on (default: test).")
    documents: int = _setting(300, "Documents to measure on.")


@dataclass(frozen=True, kw_only=True)
class TuneSettings(ModelSettings, SplitSettings, TrainingSettings, LoraSettings):
    """`mechscope tune`: fine-tune a model to summarize."""

    base: str = _setting(..., "The pre-trained model.")
    method: Literal["full", "lora"] = _setting("full", "Full fine-tuning or LoRA.")
    targets: str | None = _setting(None, 'Where LoRA learns, e.g. "layers:2,3,5" or "a3.h5,m3"; by default every layer.')


@dataclass(frozen=True, kw_only=True)
class BakeOffSettings(ModelSettings, SplitSettings, TrainingSettings, LoraSettings, DecodingSettings, ContestSettings):
    """`mechscope bakeoff`: is LoRA at chosen places as good as everywhere?"""

    base: str = _setting(..., "The pre-trained model.")
    target_layers: str = _setting(..., 'Layers for targeted LoRA, e.g. "layers:2,3,5".')
    target_heads: str | None = _setting(None, 'Heads for targeted LoRA, e.g. "a4.h11,a2.h2"; without, that strategy is left out.')


@dataclass(frozen=True, kw_only=True)
class StudySettings(
    ModelSettings,
    SplitSettings,
    MeasureSettings,
    SelectionSettings,
    CausalSettings,
    CircuitStudySettings,
    TrainingSettings,
    LoraSettings,
    DecodingSettings,
    ContestSettings,
):
    """`mechscope study summarization`: difference, selection, bake-off, claims, report."""

    base: str = _setting(..., "The pre-trained model: hub id, directory, or adapter.")
    tuned: str | None = _setting(None, "The fine-tuned model or adapter; without, one is fine-tuned here (full and LoRA).")
    bakeoff: bool = _setting(True, "Run the bake-off of LoRA placements.")


@dataclass(frozen=True, kw_only=True)
class PairsSettings(ModelSettings):
    """Which texts an intervention runs on."""

    pairs: str | None = _setting(
        None,
        "Prompt pairs: a JSONL file (clean, corrupt, answers, wrong_answers), a generated task (ioi, greater_than, docstring, induction), "
        "newsroom:ROLE (who, what, where, when, count), or salience:DOCUMENTS (with summaries; the corrupt text lacks the salient sentence).",
    )
    limit: int | None = _setting(None, "Pairs at most; generated tasks make 100 by default.")
    max_tokens: int = _setting(512, "Most tokens of a text that is made from a document and its summary.")
    on_problem: Literal["skip", "error"] = _setting("error", "Pairs that cannot be used: skip and count them, or stop with an error.")
    tokens_per_batch: int = _setting(1024, "Tokens of a batch of texts, padding included; decides the memory.")
    seed: int = _setting(0, "Seed of generated pairs, resampling and bootstrap.")


@dataclass(frozen=True, kw_only=True)
class PairSettings(PairsSettings):
    """Which model's components a sweep changes."""

    model: str = _setting(..., "The model: hub id, directory, or adapter.")
    components: str | None = _setting(None, 'Only these, e.g. "a3.h5,m3" or "layers:2,3"; by default all.')


@dataclass(frozen=True, kw_only=True)
class PatchSettings(PairSettings):
    """`mechscope patch`: put one run's values into another."""

    site: str = _setting("head", "What is patched: head, query, key, value, pattern, attention, mlp, neuron, residual, embedding.")
    metric: str = _setting("logit-diff", "Metric: logit-diff, probability, loss (of a target span), kl (to the clean run).")
    direction: Literal["denoise", "noise"] = _setting("denoise", "Clean values into the corrupt run (denoise) or the reverse (noise).")
    positions: str = _setting("all", "Tokens: all, last, changed, each, a segment, or several segments or numbers joined by commas.")
    method: Literal["exact", "attribution"] = _setting("exact", "Patch every place, or estimate all from one backward pass.")
    check: int = _setting(0, "With attribution: places that are also patched exactly, to report the estimate's error.")


@dataclass(frozen=True, kw_only=True)
class AblateSettings(PairSettings):
    """`mechscope ablate`: take components out, one at a time."""

    data: str | None = _setting(None, "Instead of pairs: documents with summaries, ablated with the loss on the summary.")
    documents: int = _setting(32, "Documents to run on, with --data.")
    sites: str = _setting("head,mlp", "What is ablated, joined by commas: head, mlp, attention, ….")
    source: Literal["zero", "mean", "resample", "corrupt"] = _setting("mean", "What stands in for an ablated component.")
    mode: Literal["each", "keep"] = _setting("each", "Leave one out, or keep only one.")
    metric: str | None = _setting(None, "Metric; by default loss with --data and logit-diff with --pairs.")


@dataclass(frozen=True, kw_only=True)
class DiscoverySettings:
    """How a circuit is found and judged."""

    method: str = _setting(
        "eap-ig", "How edges are scored: eap, eap-ig, eap-ig-activations, clean-corrupted, exact, acdc, edge-pruning, flow-routes."
    )
    steps: int = _setting(5, "Points of integrated gradients.")
    points: Literal["left", "midpoint"] = _setting("left", "Where they lie: left (as EAP-IG's authors) or midpoint.")
    source: Literal["corrupt", "mean", "zero"] = _setting("corrupt", "What closed edges carry: the corrupt run's values, means, or zero.")
    rule: Literal["top", "greedy"] = _setting("top", "How edges are chosen: the strongest, or greedily from the logits.")
    by: Literal["edges", "nodes"] = _setting("edges", "What is chosen: edges, or nodes with all edges among them.")
    sign: Literal["absolute", "helpful"] = _setting("absolute", "Strongest by absolute score, or by how much an edge helps the metric.")
    circuit_edges: int | None = _setting(None, "Edges of the circuit, before dead ends are removed.")
    circuit_fraction: float | None = _setting(None, "The same as a share of all edges.")
    faithful: float = _setting(0.9, "Without either: the smallest size (of 0.1 % to 100 % of edges) with this faithfulness.")
    held_out: float = _setting(0.5, "Share of the pairs that only judge and are not used to find the circuit; 0 for all in both.")
    random_circuits: int = _setting(10, "Random circuits of every size, as controls.")
    circuit_resamples: int = _setting(50, "Halvings and resamples of the pairs, for the model's own noise.")
    criteria: bool = _setting(True, "Completeness and minimality of the circuit.")


@dataclass(frozen=True, kw_only=True)
class CircuitSettings(PairsSettings, DiscoverySettings):
    """`mechscope circuit`: find and judge a model's circuit."""

    model: str = _setting(..., "The model: hub id, directory, or adapter.")
    metric: str = _setting("logit-diff", "Metric: logit-diff, probability, loss (of a target span), kl (to the clean run).")
    tokens_per_batch: int = _setting(256, "Tokens of a batch of texts, padding included; decides the memory.")


@dataclass(frozen=True, kw_only=True)
class CircuitDiffSettings(PairsSettings, DiscoverySettings):
    """`mechscope circuit-diff`: what fine-tuning changed in a circuit."""

    base: str = _setting(..., "The pre-trained model: hub id, directory, or adapter.")
    tuned: str = _setting(..., "The fine-tuned model or adapter.")
    metric: str = _setting("logit-diff", "Metric: logit-diff, probability, loss (of a target span), kl (to the clean run).")
    tokens_per_batch: int = _setting(256, "Tokens of a batch of texts, padding included; decides the memory.")
    checkpoints: str | None = _setting(None, "Models on the way from base to tuned, in order, joined by commas: the circuit over time.")
    resize: Literal["refuse", "truncate"] = _setting("refuse", "Vocabularies of different size: refuse, or compare the shared tokens.")


# do not change what is measured, only where and how fast: a run may be continued with others
VOLATILE = ("device",)
