"""The bake-off as a stage: flags in, tables out."""

from __future__ import annotations

from typing import Any

from mechscope.adapt.arms import BakeOffSettings, Protocol, Strategy
from mechscope.adapt.bakeoff import BakeOff, bake_off
from mechscope.adapt.places import read_circuit
from mechscope.data.template import Template
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.studies.corpora import Splits
from mechscope.studies.settings import (
    ContestSettings,
    DecodingSettings,
    LoraSettings,
    TrainingSettings,
)
from mechscope.studies.stages import decoding, fields_of, held_out, train_settings
from mechscope.subject import Components, Subject


def circuit_places(subject: Subject, settings: ContestSettings) -> tuple[Components, Components]:
    """Return the circuit's heads and MLPs, and its critical layers, for the bake-off; each is empty where it is not given.

    Raises:
        SettingsError: A text is not understood, or names what the model lacks.
        DataError: The circuit's file cannot be used.
    """
    circuit = read_circuit(settings.target_circuit or "none", subject)
    return circuit, Components.parse(settings.circuit_layers or "none").validate(subject.anatomy)


def bakeoff_settings(
    settings: Any, layers: Components, heads: Components, circuit: Components, circuit_layers: Components
) -> BakeOffSettings:
    """Turn flags (`ContestSettings`, `LoraSettings`, `TrainingSettings`, `DecodingSettings`) into a bake-off's settings."""
    named = () if settings.strategies == "all" else settings.strategies.split(",")
    strategies: tuple[Strategy, ...] = tuple(part.strip() for part in named)
    protocols: tuple[Protocol, ...] = tuple(part.strip() for part in settings.protocols.split(","))
    return BakeOffSettings(
        layers=layers,
        heads=heads,
        circuit=circuit,
        circuit_layers=circuit_layers,
        strategies=strategies,
        protocols=protocols,
        seeds=tuple(range(settings.seed, settings.seed + settings.seeds)),
        rank=settings.rank,
        modules=settings.lora_modules,
        scaling=settings.lora_scaling,
        dropout=settings.lora_dropout,
        training=train_settings(settings, settings.seed),
        decoding=decoding(settings),
    )


def bakeoff_stage(
    run: RunFolder,
    subject: Subject,
    splits: Splits,
    settings: Any,
    layers: Components,
    heads: Components,
    circuit: Components,
    circuit_layers: Components,
    *,
    progress: Progress | None,
) -> None:
    """Write the tables `bakeoff`, `bakeoff_rouge`, `bakeoff_summary`, `learning_curves` and `bakeoff_summaries`."""
    inputs = {
        "base": subject.fingerprint,
        "documents": {name: encoded.hash for name, encoded in splits.encoded.items()},
        "layers": str(layers),
        "heads": str(heads),
        "circuit": str(circuit),
        "circuit_layers": str(circuit_layers),
        **fields_of(settings, TrainingSettings),
        **fields_of(settings, LoraSettings),
        **fields_of(settings, DecodingSettings),
        **fields_of(settings, ContestSettings, "target_circuit", "circuit_layers"),
        "template": settings.template,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
    }
    with run.stage("bakeoff", inputs) as stage:
        if stage.done:
            return
        found: BakeOff = bake_off(
            subject,
            splits.encoded["train"].examples,
            splits.encoded["validation"].examples,
            held_out(splits, settings),
            stage.path("bakeoff"),
            settings=bakeoff_settings(settings, layers, heads, circuit, circuit_layers),
            template=Template(settings.template),
            max_tokens=min(settings.max_tokens, subject.anatomy.max_positions),
            progress=progress,
        )
        stage.write_table("bakeoff", found.arms)
        stage.write_table("bakeoff_rouge", found.rouge)
        stage.write_table("bakeoff_summary", found.summary)
        stage.write_table("learning_curves", found.curves)
        stage.write_table("bakeoff_summaries", found.summaries)
