"""The bake-off: is LoRA placed where fine-tuning changed most as good as LoRA everywhere?

Every arm is trained with early stopping, its best checkpoint summarizes the same held-out documents, and the tables compare arms pair by
pair. An arm that is finished leaves an artifact named by the hash of all that determines it; a killed bake-off skips those, continues the arm
it was in at its last checkpoint, and ends with the tables of an undisturbed one. Arms that two protocols share are trained once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechscope import ranks
from mechscope.adapt.arms import Arm, BakeOffSettings, plan
from mechscope.adapt.comparison import Outcome, arms_table, curves_table, rouge_table, summaries_table, summary_table
from mechscope.adapt.generate import encode_prompts, end_tokens, summarize
from mechscope.adapt.lora import total_parameters
from mechscope.adapt.loss import Collator, mean_loss
from mechscope.adapt.training import load_tuned, tune
from mechscope.data.documents import Document
from mechscope.data.prompt import Example, pad_id
from mechscope.data.rouge import rouge
from mechscope.data.template import Template
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.shapes import by_shape
from mechscope.store.artifact import Artifact
from mechscope.store.files import read_json, write_json
from mechscope.store.hashing import hash_json
from mechscope.store.tables import read_table, write_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BakeOff:
    """The tables of a finished bake-off; see `mechscope.adapt.comparison` for their rows.

    Attributes:
        arms: One row per arm (`bakeoff.parquet`).
        rouge: One row per arm and held-out document (`bakeoff_rouge.parquet`).
        summary: Means, intervals and paired differences (`bakeoff_summary.parquet`).
        curves: Learning curves (`learning_curves.parquet`).
        summaries: What each strategy's first seed wrote (`summaries.parquet`).
    """

    arms: pd.DataFrame
    rouge: pd.DataFrame
    summary: pd.DataFrame
    curves: pd.DataFrame
    summaries: pd.DataFrame

    __repr__ = by_shape


@dataclass(frozen=True)
class _Contest:
    """What all arms have in common."""

    subject: Any
    train: Sequence[Example]
    validation: Sequence[Example]
    documents: Sequence[Document]
    prompts: Sequence[tuple[int, ...]]
    ends: Sequence[int]
    settings: BakeOffSettings
    common: str  # hash of what all arms' results depend on
    base_loss: float
    execution: Execution


def bake_off(
    subject: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    documents: Sequence[Document],
    work: Path,
    *,
    settings: BakeOffSettings,
    template: Template | None = None,
    max_tokens: int | None = None,
    execution: Execution = Execution(),
) -> BakeOff:
    """Train, score and compare all arms.

    Args:
        subject: The base `Subject`, with a tokenizer; its model is not changed.
        train: Examples every arm learns.
        validation: Examples whose loss stops every arm and picks its checkpoint.
        documents: Held-out documents to summarize, in neither set of examples.
        work: Folder of the finished arms. Adapters stay there (`arms/*/model`), fully tuned weights do not.
        settings: What to compare and how.
        template: The text around article and summary, paper 1's by default; the one the examples were encoded with.
        max_tokens: Most tokens of prompt and summary together; the model's positions by default.
        execution: Progress, called with ("bake-off", arms done, arms), and within an arm as `tune` and `summarize` do.

    Raises:
        SettingsError: A placement does not fit the model or the parameter budget; raised before anything is trained.
        DataError: No documents.
        RunError: A folder cannot be written, or a training diverged.
    """
    if subject.tokenizer is None:
        raise ModelError(f"model {subject.source!r} has no tokenizer, so it cannot write summaries: pass one to load(…, tokenizer=…)")
    if not documents:
        raise DataError("there are no held-out documents to summarize: give at least one")
    positions = subject.anatomy.max_positions
    if max_tokens is not None and max_tokens > positions:
        raise SettingsError(
            f"prompt and summary may have {max_tokens} tokens together, but the model has {positions} positions: allow at most those"
        )
    arms = plan(subject, settings)
    tokenizer = subject.tokenizer
    texts = [document.document for document in documents]
    prompts = encode_prompts(texts, tokenizer, decoding=settings.decoding, max_tokens=max_tokens or positions, template=template)
    examples = [[[example.input_ids, example.summary] for example in group] for group in (train, validation)]
    held_out = [[document.id, document.summary] for document in documents]
    training = settings.training
    collator = Collator(pad_id(tokenizer), training.loss_on)
    batch = Execution(tokens_per_batch=training.batch_size * max(map(len, validation)))
    with torch.autocast(subject.device.type, torch.bfloat16, enabled=training.bf16):
        base_loss = mean_loss(subject.model, validation, collator=collator, execution=batch)
    lora = [settings.lora.lora_scaling, settings.lora.lora_dropout]
    common = hash_json([subject.fingerprint, examples, held_out, prompts, asdict(training), asdict(settings.decoding), *lora])
    contest = _Contest(
        subject, train, validation, documents, prompts, end_tokens(tokenizer, template), settings, common, base_loss, execution
    )
    outcomes = []
    for done, arm in enumerate(arms):
        execution.told("bake-off", done, len(arms))
        outcomes.append(_outcome(contest, arm, work))
    execution.told("bake-off", len(arms), len(arms))
    return BakeOff(
        arms=arms_table(outcomes),
        rouge=rouge_table(outcomes),
        summary=summary_table(outcomes),
        curves=curves_table(outcomes),
        summaries=summaries_table(outcomes, documents),
    )


def _outcome(contest: _Contest, arm: Arm, work: Path) -> Outcome:
    """Read what an arm left, after running it if it has not left everything."""
    request = {
        "common": contest.common,
        "method": "lora" if arm.placed is not None else arm.strategy,
        "seed": arm.seed,
        "placed": None if arm.placed is None else asdict(arm.placed),
    }
    with Artifact(work / "arms", request, replace=True) as artifact:
        if not artifact.done:
            started = time.monotonic()
            _run(contest, arm, artifact)
            log.info("bake-off arm %s, %s, seed %d: %.1f s", arm.protocol, arm.strategy, arm.seed, time.monotonic() - started)
    scores = read_table(artifact.path / "rouge.parquet")
    return Outcome(
        arm=arm,
        facts=read_json(artifact.path / "arm.json"),
        curve=read_table(artifact.path / "curve.parquet"),
        rouge=scores.drop(columns="summary"),
        summaries=tuple(scores["summary"]),
    )


def _run(contest: _Contest, arm: Arm, artifact: Artifact) -> None:
    """Train one arm, let it summarize, and write the result."""
    subject, settings = contest.subject, contest.settings
    if arm.trained:
        tuned = tune(
            subject,
            contest.train,
            contest.validation,
            # a copy of the whole model per seed is not worth its place: it goes with the work folder
            (artifact.result if arm.placed is not None else artifact.work.folder) / "model",
            method="full" if arm.placed is None else "lora",
            placed=arm.placed,
            scaling=settings.lora.lora_scaling,
            dropout=settings.lora.lora_dropout,
            settings=settings.training,
            initial_loss=contest.base_loss,
            replace=True,
            execution=replace(contest.execution, seed=arm.seed),
        )
        model, curve = load_tuned(subject, tuned), tuned.curve
        facts: dict[str, Any] = {
            "rank": tuned.rank or "full",
            "trainable_parameters": tuned.trainable_parameters,
            "trainable_share": tuned.trainable_parameters / tuned.total_parameters,
            "best_loss": tuned.best_loss,
            "best_step": tuned.best_step,
            "tokens_to_best": tuned.tokens_to_best,
            "stopped_early": tuned.stopped_early,
            "converged": tuned.converged,
            "unconverged": tuned.unconverged,
            "total_parameters": tuned.total_parameters,
        }
    else:
        model = subject.model
        curve = pd.DataFrame({"step": [0], "tokens": [0], "train_loss": [float("nan")], "validation_loss": [contest.base_loss]})
        facts = {"rank": "none", "trainable_parameters": 0, "trainable_share": 0.0, "best_loss": contest.base_loss, "best_step": 0}
        facts |= {
            "tokens_to_best": 0,
            "stopped_early": False,
            "converged": True,
            "unconverged": "",
            "total_parameters": total_parameters(subject.model),
        }
    written = summarize(
        model, subject.tokenizer, contest.prompts, decoding=settings.decoding, ends=contest.ends, execution=contest.execution
    )
    scores = rouge(written, [document.summary for document in contest.documents])
    scores.insert(0, "id", [document.id for document in contest.documents])

    def write() -> None:
        write_table(curve, artifact.result / "curve.parquet")
        write_table(scores.assign(summary=written), artifact.result / "rouge.parquet")
        write_json(facts, artifact.result / "arm.json")

    ranks.by_first(write)
