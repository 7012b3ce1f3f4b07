"""A bake-off as part of a job: its settings, where LoRA is placed, and the stages that train, compare and summarize.

Light at import, so that jobs can name the stages: what is heavy is imported where it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mechscope.settings import nested
from mechscope.settings.contest import ContestSettings
from mechscope.settings.decoding import Decoding, Scoring
from mechscope.settings.lora import LoraSettings
from mechscope.settings.training import TrainSettings
from mechscope.studies.groups import SplitCorpus
from mechscope.studies.inputs import HELD_OUT, TRAINING
from mechscope.studies.job import Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.adapt.arms import BakeOffSettings
    from mechscope.subject import Components, Subject

log = logging.getLogger(__name__)

_OF_CIRCUITS = ("circuit", "random_circuit")
# what decides how summaries are written
_WRITING = ("decoding", "rouge_documents", "template", "chat", "max_tokens", "seed")


@dataclass(frozen=True, kw_only=True)
class Contested(SplitCorpus, Scoring):
    """What a job that holds a bake-off needs to know."""

    training: TrainSettings = nested(TrainSettings)
    lora: LoraSettings = nested(LoraSettings)
    decoding: Decoding = nested(Decoding)
    contest: ContestSettings = nested(ContestSettings)


@dataclass(frozen=True)
class Places:
    """Where LoRA is placed.

    Attributes:
        layers: The targeted layers, whole.
        heads: The targeted heads.
        circuit: The circuit's heads and MLPs; empty where there is none.
        circuit_layers: The circuit's critical layers, whole; empty where they are not known.
        searched: Whether the circuit was searched for: where none was found, strategies that need one are left out, because hours of other
            results should not be lost for it.
    """

    layers: Components
    heads: Components
    circuit: Components
    circuit_layers: Components
    searched: bool = False

    @property
    def fingerprint(self) -> dict[str, str]:
        """The places as text."""
        return {name: str(value) for name, value in vars(self).items()}

    def competition(self, settings: Contested) -> BakeOffSettings:
        """Return what a bake-off of these places compares.

        Raises:
            SettingsError: A strategy is named whose place is not given, or a setting does not fit another.
        """
        from mechscope.adapt.arms import BakeOffSettings

        contest = settings.contest
        strategies = contest.named_strategies
        kept = tuple(name for name in strategies if self.circuit or name not in _OF_CIRCUITS)
        if self.searched and kept and kept != strategies:
            log.warning(
                "no circuit was found, so the strategies circuit and random_circuit are left out of the bake-off",
                extra={"weakens": "bakeoff_summary", "withheld": "whether LoRA in the circuit pays"},
            )
            strategies = kept
        return BakeOffSettings(
            layers=self.layers,
            heads=self.heads,
            circuit=self.circuit,
            circuit_layers=self.circuit_layers,
            strategies=strategies,
            protocols=contest.named_protocols,
            seeds=tuple(range(settings.seed, settings.seed + contest.seeds)),
            lora=settings.lora,
            training=settings.training,
            decoding=settings.decoding,
        )


def circuit_places(subject: Subject, contest: ContestSettings) -> tuple[Components, Components]:
    """Return the named circuit's heads and MLPs, and its critical layers; each is empty where it is not named.

    Raises:
        SettingsError: A text is not understood, or names what the model lacks.
        DataError: The circuit's file cannot be used.
    """
    from mechscope.adapt.places import read_circuit
    from mechscope.subject import Components

    circuit = read_circuit(contest.target_circuit or "none", subject)
    return circuit, Components.parse(contest.circuit_layers or "none").validate(subject.anatomy)


def bakeoff_stage(base: Input[Subject], places: Input[Places], **options: Any) -> Stage:
    """Return the stage that trains, scores and compares all placements.

    Args:
        base: The model they start from, without an adapter.
        places: Where LoRA is placed.
        options: Further attributes of the stage.
    """

    def work(run: JobRun[Any]) -> Tables:
        from mechscope.adapt.bakeoff import bake_off
        from mechscope.studies.summaries import summarized

        settings, subject, splits = run.settings, run[base], run[TRAINING]
        result = bake_off(
            subject,
            splits.encoded["train"].examples,
            splits.encoded["validation"].examples,
            summarized(run[HELD_OUT], settings.rouge_documents),
            run.stage.path("bakeoff"),
            settings=run[places].competition(settings),
            template=run[HELD_OUT].template,
            max_tokens=min(settings.max_tokens, subject.anatomy.max_positions),
            execution=run.execution,
        )
        return {
            "bakeoff": result.arms,
            "bakeoff_rouge": result.rouge,
            "bakeoff_summary": result.summary,
            "learning_curves": result.curves,
            "bakeoff_summaries": result.summaries,
        }

    hangs_on = ("training", "lora", "strategies", "protocols", "seeds", *_WRITING)
    return Stage(name="bakeoff", work=work, hangs_on=hangs_on, inputs=(base, TRAINING, HELD_OUT, places), **options)


def summaries_stage(models: Input[Mapping[str, Subject]], bakeoff: Stage) -> Stage:
    """Return the stage that lets models summarize held-out documents; a bake-off's summaries are put beside.

    Args:
        models: The models by the name of their column.
        bakeoff: The bake-off.
    """

    def work(run: JobRun[Any]) -> Tables:
        from mechscope.studies.summaries import summarized, write_summaries

        settings = run.settings
        return write_summaries(
            run[models],
            summarized(run[HELD_OUT], settings.rouge_documents),
            decoding=settings.decoding,
            template=run[HELD_OUT].template,
            max_tokens=settings.max_tokens,
            others=run.table("bakeoff_summaries") if bakeoff.when(settings) else None,
            execution=run.execution,
        )

    return Stage(name="summaries", work=work, hangs_on=_WRITING, inputs=(models, HELD_OUT), after=(bakeoff,))
