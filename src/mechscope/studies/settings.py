"""What a command is asked to do, as a value: every field is a flag of the command line and a key of `study.yaml`.

The dataclasses here are the one place where a setting's name, type, default and help are written; the command line builds its flags from them and
`resolve` checks a configuration file against them. Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

DEFAULT_TEMPLATE = "Article: {document}\nSummary: {summary}"


def setting(default: Any, help: str) -> Any:
    """Declare a field with the sentence that explains it; `...` as the default means it must be given."""
    if default is ...:
        return field(metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How models are loaded."""

    dtype: str = setting("float32", "Type of the weights: float32, bfloat16, float16, float64, or auto for the stored one.")
    device: str = setting("auto", "Where to run: auto, cpu, cuda, cuda:N, or spread (over all devices, for models too large for one).")
    unsafe: bool = setting(False, "Also accept pickled checkpoints (.bin), read with weights_only.")


@dataclass(frozen=True, kw_only=True)
class DocumentSettings:
    """How documents with summaries become tokens."""

    document_column: str = setting("document", "Column that holds the document.")
    summary_column: str = setting("summary", "Column that holds the reference summary.")
    on_problem: Literal["skip", "error"] = setting("skip", "Unusable rows: skip and count them, or stop with an error.")
    template: str = setting(DEFAULT_TEMPLATE, "Prompt around the document and the summary; only the document is ever truncated.")
    max_tokens: int = setting(1024, "Most tokens of a prompt with its summary; lowered to what the model can read.")
    seed: int = setting(0, "Seed of every random choice: sampling, splitting, initialisation, resampling.")


@dataclass(frozen=True, kw_only=True)
class DataSettings(DocumentSettings):
    """Which documents are used."""

    data: str = setting(
        ..., "Documents: a JSONL, CSV or Parquet file, a hub data set such as cnn_dailymail:3.0.0, or newsroom (the generated corpus)."
    )


@dataclass(frozen=True, kw_only=True)
class SplitSettings(DataSettings):
    """How documents are divided into training, validation and test."""

    validation_data: str | None = setting(None, "Validation documents; by default a part of --data, disjoint from the others.")
    test_data: str | None = setting(None, "Held-out documents for the difference and for ROUGE; by default a part of --data.")
    train_split: str = setting("train", "Split of a hub data set to train on.")
    validation_split: str = setting("validation", "Split of a hub data set to validate on.")
    test_split: str = setting("test", "Split of a hub data set to test on.")
    train_documents: int = setting(2000, "Documents to train on; fewer if there are not that many.")
    validation_documents: int = setting(200, "Documents whose loss stops the training.")
    test_documents: int = setting(300, "Held-out documents to measure on.")


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How the difference is measured."""

    tokens_per_batch: int | None = setting(
        None, "Most tokens of a batch, padding included; by default what free memory allows. A batch that does not fit is halved once."
    )
    gini: bool = setting(False, "Also measure the Gini sparsity of attention (several times slower on long documents).")
    replicates: int = setting(200, "Bootstrap replicates for the stability of selections.")
    geometry_documents: int = setting(300, "Most documents whose pooled states are kept for CKA and RSA.")
    pattern_documents: int = setting(0, "Documents whose whole attention patterns are kept (tensors/patterns.safetensors).")
    resize: Literal["refuse", "truncate"] = setting("refuse", "Vocabularies of different size: refuse, or compare the shared tokens.")
    rows: Literal["all", "document", "summary"] = setting("all", "Which query rows selections and claims read.")


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """Which layers and heads are called most changed."""

    layer_rule: str = setting(
        "layers_by_kl", "Rule that chooses layers: layers_by_kl (the paper's), layers_by_score, last_layers, random_layers."
    )
    head_rule: str = setting("heads_by_kl", "Rule that chooses heads: heads_by_kl, heads_by_entropy, heads_by_score, random_heads.")
    selected_layers: int | None = setting(None, "How many layers; by default a quarter of them.")
    selected_heads: int | None = setting(None, "How many heads; by default as many as the selected layers hold.")


@dataclass(frozen=True, kw_only=True)
class CausalSettings:
    """How it is tested whether what changed matters."""

    causal: bool = setting(True, "Test by interventions which layers and heads carry the gain.")
    causal_documents: int = setting(16, "Held-out documents for the interventions.")
    ablation: Literal["mean", "resample", "zero"] = setting("mean", "What ablated heads are replaced by.")
    random_sets: int = setting(200, "Random head sets that the ablation of the selected heads is compared with.")


@dataclass(frozen=True, kw_only=True)
class CircuitStudySettings:
    """How the circuit of summarizing is found before and after fine-tuning."""

    circuit: bool = setting(True, "Find the circuit of summarizing in both models and compare them.")
    circuit_documents: int = setting(32, "Held-out documents for it, each beside a version that lacks its salient sentence.")
    circuit_method: str = setting("eap-ig", "How edges are scored, as for `mechscope circuit --method`.")
    circuit_size: float | None = setting(None, "Share of all edges in the circuit; by default the smallest that is 90 % faithful.")


@dataclass(frozen=True, kw_only=True)
class ReadingStudySettings:
    """What is read off the models beside the difference: the roles of their heads, and what each layer already knows of a summary."""

    roles: bool = setting(True, "Score the roles of all heads in both models (previous-token, induction, retrieval, …).")
    role_documents: int = setting(32, "Held-out documents for the roles that are about documents.")
    lens: bool = setting(True, "Read both models' layers with the logit lens.")
    lens_documents: int = setting(16, "Held-out documents for it; the first is shown token by token.")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How fine-tuning is run; the defaults are the paper's."""

    learning_rate_full: float = setting(3e-5, "Peak learning rate of full fine-tuning.")
    learning_rate_lora: float = setting(3e-4, "Peak learning rate of LoRA.")
    weight_decay: float = setting(0.01, "AdamW's decoupled weight decay.")
    epochs: int = setting(10, "Passes over the training documents at most.")
    max_steps: int | None = setting(None, "Optimizer steps at most; by default what the epochs give.")
    batch_size: int = setting(32, "Documents per forward pass.")
    gradient_accumulation: int = setting(1, "Forward passes per optimizer step.")
    warmup: float = setting(0.0, "Share of the steps in which the learning rate rises, 0 to 1.")
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "What the learning rate does after the warm-up.")
    patience: int | None = setting(6, "Evaluations without a better validation loss after which training stops.")
    eval_every: int | None = setting(None, "Optimizer steps between evaluations; by default once per epoch.")
    loss_on: Literal["summary", "all"] = setting("summary", "Tokens that are learned and scored.")
    bf16: bool = setting(False, "Compute in bfloat16 while the learned weights stay float32.")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What a LoRA adapter is made of."""

    rank: int = setting(8, "Rank of standard LoRA, and of every strategy at equal rank.")
    lora_scaling: float = setting(2.0, "Alpha divided by rank.")
    lora_dropout: float = setting(0.0, "Dropout in front of the adapter.")
    lora_modules: Literal["attention", "mlp", "all"] = setting("attention", "Linear maps of a layer that are adapted.")


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """How summaries are written."""

    beams: int = setting(1, "Beams of the search; 1 is greedy (the paper: 2).")
    no_repeat_ngram: int = setting(0, "Length of word pieces that may not repeat; 0 allows all (the paper: 2).")
    max_new_tokens: int = setting(150, "Longest summary, in tokens.")
    rouge_documents: int = setting(100, "Held-out documents that are summarized and scored.")


@dataclass(frozen=True, kw_only=True)
class ContestSettings:
    """Which placements of LoRA compete."""

    strategies: str = setting("all", "Strategies that compete, joined by commas; all: every one whose layers, heads or circuit are given.")
    target_circuit: str | None = setting(
        None, 'Circuit for LoRA: its heads and MLPs, e.g. "a3.h5,m3", or a circuit file (.json, MIB/EAP-IG); without, no strategy uses one.'
    )
    circuit_layers: str | None = setting(
        None, 'The circuit\'s critical layers, which get more rank than the others, e.g. "layers:2,5"; without, that strategy is left out.'
    )
    protocols: str = setting("equal_rank,equal_parameters", "Budgets: equal_rank (the paper's), equal_parameters, or both.")
    seeds: int = setting(3, "Seeds of every strategy.")


@dataclass(frozen=True, kw_only=True)
class DiffSettings(ModelSettings, DataSettings, MeasureSettings, SelectionSettings):
    """`mechscope diff`: Measure what fine-tuning changed between two models: attention, activations, weights, outputs."""

    base: str = setting(..., "The pre-trained model: hub id, directory, or adapter.")
    tuned: str = setting(..., "The fine-tuned model or adapter.")
    split: str | None = setting(None, "Split of a hub data set to measure on (default: test).")
    documents: int = setting(300, "Documents to measure on.")


@dataclass(frozen=True, kw_only=True)
class TuneSettings(ModelSettings, SplitSettings, TrainingSettings, LoraSettings):
    """`mechscope tune`: fine-tune a model to summarize."""

    base: str = setting(..., "The pre-trained model.")
    method: Literal["full", "lora"] = setting("full", "Full fine-tuning or LoRA.")
    targets: str | None = setting(None, 'Where LoRA learns, e.g. "layers:2,3,5" or "a3.h5,m3"; by default every layer.')


@dataclass(frozen=True, kw_only=True)
class BakeOffSettings(ModelSettings, SplitSettings, TrainingSettings, LoraSettings, DecodingSettings, ContestSettings):
    """`mechscope bakeoff`: Compare LoRA at chosen layers and heads with LoRA everywhere, at random places, and full fine-tuning."""

    base: str = setting(..., "The pre-trained model.")
    target_layers: str = setting(..., 'Layers for targeted LoRA, e.g. "layers:2,3,5".')
    target_heads: str | None = setting(None, 'Heads for targeted LoRA, e.g. "a4.h11,a2.h2"; without, that strategy is left out.')


@dataclass(frozen=True, kw_only=True)
class StudySettings(
    ModelSettings,
    SplitSettings,
    MeasureSettings,
    SelectionSettings,
    CausalSettings,
    CircuitStudySettings,
    ReadingStudySettings,
    TrainingSettings,
    LoraSettings,
    DecodingSettings,
    ContestSettings,
):
    """`mechscope study summarization`: What fine-tuning to summarize changed, which parts it changed most, and whether LoRA belongs there."""

    base: str = setting(..., "The pre-trained model: hub id, directory, or adapter.")
    tuned: str | None = setting(None, "The fine-tuned model or adapter; without, one is fine-tuned here (full and LoRA).")
    bakeoff: bool = setting(True, "Run the bake-off of LoRA placements.")


# do not change what is measured, only where and in what pieces: a run may be continued with others
VOLATILE = ("device", "tokens_per_batch")


def deciding(settings: Any) -> dict[str, Any]:
    """Return the settings that decide a result, for the inputs of a stage."""
    return {name: value for name, value in vars(settings).items() if name not in VOLATILE}
