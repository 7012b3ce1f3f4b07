"""The stages studies are made of: each reads what came before, writes its tables to the run folder, and is skipped when it was done already.

A stage's inputs are fingerprints of weights and documents and the settings that decide its result; nothing else makes it run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechscope.adapt.generate import Decoding, encode_prompts, summarize
from mechscope.adapt.settings import TrainSettings
from mechscope.adapt.targets import place
from mechscope.adapt.training import Tuned, tune
from mechscope.data.documents import Document
from mechscope.data.prompt import Encoded
from mechscope.data.rouge import rouge
from mechscope.data.template import Template
from mechscope.difference import attention_patterns, differences
from mechscope.errors import SettingsError
from mechscope.progress import Progress
from mechscope.report.page import render
from mechscope.selection import RULES, selection_table
from mechscope.stats.bootstrap import bootstrap_interval
from mechscope.store.run import RunFolder
from mechscope.studies.corpora import Splits
from mechscope.studies.settings import (
    DecodingSettings,
    LoraSettings,
    MeasureSettings,
    SelectionSettings,
    TrainingSettings,
)
from mechscope.subject import Components, Pair, Subject

RESAMPLED = ("kl_base_tuned", "entropy_change")


def fields_of(settings: Any, kind: type, *left_out: str) -> dict[str, Any]:
    """Return the part of some settings that one settings class declares."""
    return {item.name: getattr(settings, item.name) for item in dataclasses.fields(kind) if item.name not in left_out}


def difference_stage(
    run: RunFolder,
    pair: Pair,
    encoded: Encoded,
    settings: MeasureSettings,
    *,
    seed: int,
    progress: Progress | None,
    further: Mapping[str, Pair] | None = None,
    checkpoint_seconds: float = 30.0,
) -> None:
    """Write the tables `heads`, `layers`, `weights`, `outputs` and the bootstrap replicates of the heads.

    Of further pairs of models, such as tuned–LoRA and base–LoRA in paper 1, their layers go into the table `pairs`. Models that pairs share are run once.
    """
    pairs = {"": pair, **(further or {})}
    inputs = {**_of_pair(pair, encoded), **fields_of(settings, MeasureSettings, "rows", "tokens_per_batch"), "seed": seed}
    if further:
        inputs["further"] = {name: _of_pair(other, encoded) for name, other in further.items()}
    with run.stage("difference", inputs) as stage:
        if stage.done:
            return
        all_found = differences(
            pairs,
            encoded,
            in_full=[""],  # of the others only the layers are kept
            tokens_per_batch=settings.tokens_per_batch,
            gini=settings.gini,
            replicates=settings.replicates,
            geometry_documents=settings.geometry_documents,
            seed=seed,
            stage=stage,
            checkpoint_seconds=checkpoint_seconds,
            progress=progress,
        )
        found = all_found.pop("")
        if all_found:
            stage.write_table("pairs", pd.concat([other.layers.assign(pair=name) for name, other in all_found.items()], ignore_index=True))
        for name in ("heads", "layers", "weights", "outputs"):
            stage.write_table(name, getattr(found, name))
        replicates = {
            f"{name}.{rows}": torch.from_numpy(found.replicates(name, rows))
            for name in RESAMPLED
            for rows in ("all", "document", "summary")
        }
        stage.write_tensors("replicates", replicates)
        if settings.pattern_documents:
            shown = encoded.examples[: settings.pattern_documents]
            maps = {
                f"{index}.{side}": tensor
                for index, example in enumerate(shown)
                for side, tensor in attention_patterns(pair, example).items()
            }
            stage.write_tensors("patterns", maps, meta={"ids": [example.id for example in shown]})


def _of_pair(pair: Pair, encoded: Encoded) -> dict[str, Any]:
    return {
        "base": pair.base.fingerprint,
        "tuned": pair.tuned.fingerprint,
        "dtype": str(pair.base.dtype),
        "vocab_size": pair.vocab_size,
        "documents": encoded.hash,
    }


def selection_stage(run: RunFolder, settings: Any, *, seed: int) -> tuple[Components, Components]:
    """Write the table `selection` and return the layers and heads that the study's own rules choose.

    Args:
        run: A run whose difference is done.
        settings: `MeasureSettings` and `SelectionSettings` together.
        seed: Seed of the random rules.
    """
    for kind in ("layer", "head"):
        rule = getattr(settings, f"{kind}_rule")
        known = [name for name in RULES if f"{kind}s" in name]
        if rule not in known:
            raise SettingsError(f"setting '{kind}_rule' is {rule!r}: the rules of {kind}s are {', '.join(known)}")
    heads, layers = run.table("heads"), run.table("layers")
    inputs = {
        **fields_of(settings, SelectionSettings),
        "rows": settings.rows,
        "seed": seed,
        "difference": run.manifest["stages"]["difference"]["outputs"],
    }
    with run.stage("selection", inputs, alone=True) as stage:
        if not stage.done:
            tensors, _ = run.tensors("replicates")
            replicates = {name: tensors[f"{name}.{settings.rows}"].numpy() for name in RESAMPLED}
            table = selection_table(
                heads,
                layers,
                replicates,
                n_selected_layers=settings.selected_layers,
                n_selected_heads=settings.selected_heads,
                seed=seed,
                rows=settings.rows,
            )
            stage.write_table("selection", table)
    table = run.table("selection")
    return chosen(table, settings.layer_rule), chosen(table, settings.head_rule)


def chosen(selection: pd.DataFrame, rule: str) -> Components:
    """Return what a rule chose, from the table `selection`."""
    table = selection[(selection["rule"] == rule) & selection["chosen"]]
    if (table["kind"] == "layer").all():
        return Components.of_layers(table["layer"])
    return Components.of_heads(zip(table["layer"], table["head"], strict=True))


def train_settings(settings: TrainingSettings, seed: int) -> TrainSettings:
    """Turn flags into the settings of one training."""
    return TrainSettings(**fields_of(settings, TrainingSettings), seed=seed)


def tune_stage(
    run: RunFolder, name: str, subject: Subject, splits: Splits, settings: Any, *, method: str, seed: int, progress: Progress | None
) -> Tuned:
    """Fine-tune the base into `models/<name>` of the run: fully, or by LoRA in every layer.

    Args:
        run: The run.
        name: Folder of the result.
        subject: The base model.
        splits: Documents to train and validate on.
        settings: `TrainingSettings` and `LoraSettings` together.
        method: `"full"` or `"lora"`.
        seed: Seed of the training.
        progress: Called with what is being done.
    """
    inputs = {
        "base": subject.fingerprint,
        "method": method,
        "train": splits.encoded["train"].hash,
        "validation": splits.encoded["validation"].hash,
        **fields_of(settings, TrainingSettings),
        **(fields_of(settings, LoraSettings) if method == "lora" else {}),
        "seed": seed,
    }
    folder = run.path / "models" / name
    with run.stage(f"tune_{name}", inputs) as stage:
        if not stage.done:
            everywhere = Components.of_layers(range(subject.anatomy.n_layers))
            tune(
                subject,
                splits.encoded["train"].examples,
                splits.encoded["validation"].examples,
                folder,
                method="full" if method == "full" else "lora",
                placed=None if method == "full" else place(subject, everywhere, rank=settings.rank, modules=settings.lora_modules),
                scaling=settings.lora_scaling,
                dropout=settings.lora_dropout,
                settings=train_settings(settings, seed),
                progress=progress,
            )
            stage.add(folder)
    return Tuned.read(folder)


def decoding(settings: DecodingSettings) -> Decoding:
    """Turn flags into a way of decoding."""
    return Decoding(beams=settings.beams, no_repeat_ngram=settings.no_repeat_ngram, max_new_tokens=settings.max_new_tokens)


def held_out(splits: Splits, settings: DecodingSettings) -> tuple[Document, ...]:
    """Return the test documents that are summarized: the first of those that could be encoded."""
    kept = {example.id for example in splits.encoded["test"].examples}
    return tuple(document for document in splits.corpora["test"].documents if document.id in kept)[: settings.rouge_documents]


def summaries_stage(run: RunFolder, models: Mapping[str, Subject], splits: Splits, settings: Any, *, progress: Progress | None) -> None:
    """Write the tables `summaries` (what each model writes, side by side) and `rouge` (its score, with an interval over documents).

    Args:
        run: The run; the bake-off's summaries are put beside where it has them.
        models: Models by the name of their column, for example base and tuned.
        splits: The documents.
        settings: `DecodingSettings`, with the prompt's template and length.
        progress: Called with what is being done.
    """
    documents = held_out(splits, settings)
    inputs = {
        "models": {name: subject.fingerprint for name, subject in models.items()},
        "documents": splits.encoded["test"].hash,
        **fields_of(settings, DecodingSettings),
        "template": settings.template,
        "max_tokens": settings.max_tokens,
        "bakeoff": run.manifest["stages"].get("bakeoff", {}).get("outputs"),
    }
    with run.stage("summaries", inputs) as stage:
        if stage.done:
            return
        references = [document.summary for document in documents]
        table = pd.DataFrame({"id": [d.id for d in documents], "document": [d.document for d in documents], "reference": references})
        scores = []
        for name, subject in models.items():
            prompts = encode_prompts(
                [document.document for document in documents],
                subject.tokenizer,
                decoding=decoding(settings),
                max_tokens=min(settings.max_tokens, subject.anatomy.max_positions),
                template=Template(settings.template),
            )
            with subject.active():
                table[name] = summarize(subject.model, subject.tokenizer, prompts, decoding=decoding(settings), progress=progress)
            scores.append(_score(name, table[name].tolist(), references, seed=settings.seed))
        if run.has_table("bakeoff_summaries"):
            others = run.table("bakeoff_summaries").drop(columns=["document", "reference", *table.columns[3:]], errors="ignore")
            table = table.merge(others, on="id", how="left")
        stage.write_table("summaries", table)
        stage.write_table("rouge", pd.concat(scores, ignore_index=True))


def _score(model: str, written: list[str], references: list[str], *, seed: int) -> pd.DataFrame:
    scores = rouge(written, references)
    rows = []
    for metric in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        found = bootstrap_interval(scores[metric].to_numpy(), seed=seed)
        rows.append(
            {
                "model": model,
                "metric": metric,
                "mean": float(found.value),
                "low": float(found.low),
                "high": float(found.high),
                "n": len(scores),
            }
        )
    return pd.DataFrame(rows)


def report_stage(run: RunFolder) -> Path:
    """Write `report.html` and the figures, and return the page's path."""
    inputs = {name: record["outputs"] for name, record in run.manifest["stages"].items() if name != "report"}
    with run.stage("report", inputs, alone=True) as stage:
        if not stage.done:
            page = render(run.path)
            stage.add(page)
            stage.add(run.path / "figures")
    return run.path / "report.html"
