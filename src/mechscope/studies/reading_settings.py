"""What the commands that read a model without changing it are asked to do: lens, heads, weights.

As in `mechscope.studies.settings`, every field is a flag and a key of `study.yaml`, and nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mechscope.studies.settings import DocumentSettings, ModelSettings, setting


@dataclass(frozen=True, kw_only=True)
class ReadModelsSettings(ModelSettings):
    """Which model is read, and which second one it is compared with."""

    model: str = setting(..., "The model: hub id, directory, or adapter.")
    tuned: str | None = setting(None, "A fine-tuned version of it: everything is then read in both, and compared.")


@dataclass(frozen=True, kw_only=True)
class LensSettings(ReadModelsSettings, DocumentSettings):
    """`mechscope lens`: What each layer already says of the next token, and which parts put the answer there."""

    text: str | None = setting(None, "A text to read. Give one of --text, --data, --pairs.")
    data: str | None = setting(None, "Documents with summaries to read: a file, a hub data set, or newsroom.")
    pairs: str | None = setting(None, "Prompts with answers to read: a JSONL file or a generated task, as for `mechscope patch`.")
    documents: int = setting(32, "Documents or prompts to read.")
    max_tokens: int = setting(512, "Most tokens of a text; lowered to what the model can read.")
    sites: str = setting("residual", "Where to read, joined by commas: residual, attention_output, mlp_output, head_output.")
    norm: Literal["applied", "frozen"] = setting("applied", "The final norm: applied to what is read, or with the final stream's scale.")
    top: int = setting(5, "Tokens kept per place.")
    grid_texts: int = setting(3, "Texts that are kept token by token.")
    attribution: bool = setting(True, "Direct logit attribution: what every head and MLP adds to the answer, or to the summary.")
    lens_data: str | None = setting(None, "Documents to train a tuned lens on, for each model, and to read with it too.")
    lens_documents: int = setting(200, "Documents to train the tuned lens on.")
    lens_steps: int = setting(250, "Training steps of the tuned lens.")
    tokens_per_batch: int = setting(2048, "Tokens of a batch of texts, padding included; decides the memory.")


@dataclass(frozen=True, kw_only=True)
class HeadsSettings(ReadModelsSettings, DocumentSettings):
    """`mechscope heads`: Which head does what: score the roles of all heads, and how fine-tuning changed them."""

    data: str | None = setting(None, "Documents with summaries, for the roles that are about documents; without, these are left out.")
    documents: int = setting(48, "Documents to measure on.")
    max_tokens: int = setting(512, "Most tokens of a document with its summary; lowered to what the model can read.")
    probes: int = setting(32, "Generated texts per role: repeated random tokens, sentences about two names, news articles.")
    show: str | None = setting(None, 'Heads whose attention is shown token by token, e.g. "a3.h5,a4.h1"; by default those that stand out.')
    show_texts: int = setting(2, "Texts it is shown on.")


@dataclass(frozen=True, kw_only=True)
class WeightsSettings(ReadModelsSettings, DocumentSettings):
    """`mechscope weights`: What heads and neurons attend to, copy and write, read off their weights in the model's vocabulary."""

    components: str | None = setting(None, 'Heads that are written out, e.g. "a3.h5,a4.h1"; by default those that changed or copy most.')
    heads: int = setting(8, "How many heads, where none are named.")
    top: int = setting(10, "Tokens kept per list.")
    offset: int = setting(1, "Distance from query to key at which the attention of rotary models is written out, in tokens.")
    data: str | None = setting(None, "Documents with summaries to watch neurons on; without, only weights are read.")
    documents: int = setting(60, "Documents to watch neurons on.")
    max_tokens: int = setting(512, "Most tokens of a document with its summary; lowered to what the model can read.")
    neurons: int = setting(40, "How many neurons are written out.")
    tokens_per_batch: int = setting(2048, "Tokens of a batch of texts, padding included; decides the memory.")
