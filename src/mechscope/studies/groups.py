"""Groups of settings that jobs share: which models, which texts, how they are run.

A job's settings inherit the groups they need and nest the settings of techniques. `panel` names the group in the help of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mechscope.choices import Dtype, HeadRule, LayerRule, Rows
from mechscope.settings import Count, Number, Settings, nested, setting
from mechscope.settings.smallest import SmallestSettings

DEFAULT_TEMPLATE = "Article: {document}\nSummary: {summary}"
# what a source of prompt pairs may be, for help
PAIRS = (
    "Prompt pairs: a JSONL file (clean, corrupt, answers, wrong_answers), a generated task (ioi, greater_than, docstring, induction, repeated), "
    "newsroom:ROLE (who, what, where, when, count), facts:FILE (prompt, subject, answer; no corrupt text), or salience:DOCUMENTS (with "
    "summaries; the corrupt text lacks the salient sentence)."
)


@dataclass(frozen=True, kw_only=True)
class Running(Settings):
    """How work is run; results do not hang on it but for the seed."""

    panel: ClassVar[str] = "Run"

    seed: Count = setting(0, "Seed of every random choice: sampling, splitting, initialisation, resampling.")
    tokens_per_batch: Number | None = setting(
        None,
        "Most tokens of a batch, padding included; decides the memory. A batch that does not fit is halved. By default what suits the job.",
    )


@dataclass(frozen=True, kw_only=True)
class Loading(Running):
    """How models are loaded."""

    panel: ClassVar[str] = "Models"

    dtype: Dtype = setting("float32", "Type of the weights; auto for the stored one.")
    device: str = setting("auto", "Where to run: auto, cpu, cuda, cuda:N, or spread (over all devices, for models too large for one).")
    unsafe: bool = setting(False, "Also accept pickled checkpoints (.bin), read with weights_only.")
    tokenizer: str | None = setting(
        None, "Tokenizer: hub id or directory, for a model that has none beside it or is to be read with another."
    )


@dataclass(frozen=True, kw_only=True)
class OneModel(Loading):
    """The model that is studied."""

    panel: ClassVar[str] = "Models"

    model: str = setting(..., "The model: hub id, directory, or adapter.")


@dataclass(frozen=True, kw_only=True)
class ModelAndTuned(OneModel):
    """The model that is read, and which second one it is compared with."""

    panel: ClassVar[str] = "Models"

    tuned: str | None = setting(None, "A fine-tuned version of it: everything is then read in both, and compared.")


@dataclass(frozen=True, kw_only=True)
class TwoModels(Loading):
    """A pre-trained and a fine-tuned model."""

    panel: ClassVar[str] = "Models"

    base: str = setting(..., "The pre-trained model: hub id, directory, or adapter.")
    tuned: str = setting(..., "The fine-tuned model or adapter.")
    resize: Literal["refuse", "truncate"] = setting("refuse", "Vocabularies of different size: refuse, or compare the shared tokens.")


@dataclass(frozen=True, kw_only=True)
class DocumentFormat(Running):
    """How documents with summaries become tokens."""

    panel: ClassVar[str] = "Data"

    document_column: str = setting("document", "Column that holds the document.")
    summary_column: str = setting("summary", "Column that holds the reference summary.")
    on_problem: Literal["skip", "error"] = setting("skip", "Unusable rows: skip and count them, or stop with an error.")
    template: str = setting(DEFAULT_TEMPLATE, "Prompt around the document and the summary; only the document is ever truncated.")
    chat: bool = setting(
        False,
        "Put prompt and summary into the tokenizer's chat template: what --template has before {summary} is the user's message, the rest the assistant's.",
    )
    max_tokens: Number = setting(1024, "Most tokens of a prompt with its summary; lowered to what the model can read.")


@dataclass(frozen=True, kw_only=True)
class OneCorpus(DocumentFormat):
    """The documents that are read."""

    panel: ClassVar[str] = "Data"

    data: str = setting(
        ..., "Documents: a JSONL, CSV or Parquet file, a hub data set such as cnn_dailymail:3.0.0, or newsroom (the generated corpus)."
    )
    split: str | None = setting(None, "Split of a hub data set to measure on (default: test).")
    documents: Number = setting(300, "Documents to measure on.")


@dataclass(frozen=True, kw_only=True)
class MaybeCorpus(DocumentFormat):
    """Documents that a job can do without."""

    panel: ClassVar[str] = "Data"

    data: str | None = setting(None, "Documents with summaries: a file, a hub data set, or newsroom.")
    documents: Number = setting(48, "Documents to read.")
    max_tokens: Number = setting(512, "Most tokens of a document with its summary; lowered to what the model can read.")


@dataclass(frozen=True, kw_only=True)
class SplitCorpus(DocumentFormat):
    """Documents to train, validate and test on."""

    panel: ClassVar[str] = "Data"

    data: str = setting(
        ..., "Documents: a JSONL, CSV or Parquet file, a hub data set such as cnn_dailymail:3.0.0, or newsroom (the generated corpus)."
    )
    validation_data: str | None = setting(None, "Validation documents; by default a part of --data, disjoint from the others.")
    test_data: str | None = setting(None, "Held-out documents for the difference and for ROUGE; by default a part of --data.")
    train_split: str = setting("train", "Split of a hub data set to train on.")
    validation_split: str = setting("validation", "Split of a hub data set to validate on.")
    test_split: str = setting("test", "Split of a hub data set to test on.")
    train_documents: Number = setting(2000, "Documents to train on; fewer if there are not that many.")
    validation_documents: Number = setting(200, "Documents whose loss stops the training.")
    test_documents: Number = setting(300, "Held-out documents to measure on.")


@dataclass(frozen=True, kw_only=True)
class PairFormat(Running):
    """How prompt pairs are read or made."""

    panel: ClassVar[str] = "Pairs"

    limit: Number | None = setting(None, "Pairs at most; generated tasks make 100 by default.")
    max_tokens: Number = setting(512, "Most tokens of a text that is made from a document and its summary.")
    on_problem: Literal["skip", "error"] = setting("error", "Pairs that cannot be used: skip and count them, or stop with an error.")
    chat: bool = setting(
        False, "Make each prompt a user's message in the tokenizer's chat template, so that answers are what the assistant begins with."
    )


@dataclass(frozen=True, kw_only=True)
class PromptPairs(PairFormat):
    """The prompt pairs that an intervention runs on."""

    panel: ClassVar[str] = "Pairs"

    pairs: str = setting(..., PAIRS)


@dataclass(frozen=True, kw_only=True)
class Measuring(Running):
    """How the difference is measured."""

    panel: ClassVar[str] = "Measure"

    gini: bool = setting(False, "Also measure the Gini sparsity of attention (several times slower on long documents).")
    replicates: Number = setting(200, "Bootstrap replicates for the stability of selections.")
    geometry_documents: Number = setting(300, "Most documents whose pooled states are kept for CKA and RSA.")
    same_input_documents: Number = setting(
        32, "Most documents on which tuned blocks also run on the base's residual stream (write_change)."
    )
    pattern_documents: Count = setting(0, "Documents whose whole attention patterns are kept (tensors/patterns.safetensors).")
    rows: Rows = setting("all", "Which query rows selections and claims read.")
    smallest: SmallestSettings = nested(SmallestSettings, prefix="smallest_")


MEASURED_BY = ("gini", "replicates", "geometry_documents", "same_input_documents", "pattern_documents", "smallest", "seed")
"""Settings of `Measuring` that decide what a difference is; the rest decides how it is read."""


@dataclass(frozen=True, kw_only=True)
class Selecting(Settings):
    """Which layers and heads are called most changed."""

    panel: ClassVar[str] = "Selection"

    layer_rule: LayerRule = setting("layers_by_kl", "Rule that chooses layers; layers_by_kl is the paper's.")
    head_rule: HeadRule = setting(
        "heads_by_write",
        "Rule that chooses heads; heads_by_write sees every change of a head's own weights, heads_by_kl only where it attends.",
    )
    selected_layers: Number | None = setting(None, "How many layers; by default a quarter of them.")
    selected_heads: Number | None = setting(None, "How many heads; by default as many as the selected layers hold.")
