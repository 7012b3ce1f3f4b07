"""`mechscope diff`: what fine-tuning changed between two models, and which layers and heads it changed most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mechscope.studies.controls import Controlled, controls_input, controls_stage
from mechscope.studies.groups import MEASURED_BY, Measuring, OneCorpus, Selecting, TwoModels
from mechscope.studies.inputs import CORPUS, MODELS, PAIR
from mechscope.studies.job import Job, Stage
from mechscope.studies.paper_2505_17073 import claims_stage
from mechscope.studies.routing import routing_stage
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.selection import check_selection, control_selection_stage, selection_stage


@dataclass(frozen=True, kw_only=True)
class DiffSettings(TwoModels, OneCorpus, Measuring, Selecting, Controlled):
    """Which models, which documents, and what is measured."""

    panel: ClassVar[str] = "Measure"


def _check(run: JobRun[Any]) -> None:
    check_selection(run.settings, run.first.anatomy)


def _difference(run: JobRun[Any]) -> Tables:
    from mechscope.studies.difference import measure_difference

    return measure_difference(run[PAIR], run[CORPUS].encoded, settings=run.settings, stage=run.stage, execution=run.execution)


DIFFERENCE = Stage(
    name="difference",
    work=_difference,
    hangs_on=MEASURED_BY,
    inputs=(PAIR, CORPUS),
)
ROUTING = routing_stage(CORPUS, where_routed=True)
SELECTION = selection_stage(DIFFERENCE)
CONTROLLED = controls_input(PAIR)
CONTROLS = controls_stage(PAIR, CORPUS, CONTROLLED, DIFFERENCE)
CONTROL_SELECTION = control_selection_stage(CONTROLS)

JOB = Job(
    name="diff",
    help="Measure what fine-tuning changed between two models: attention, activations, weights, routing, outputs.",
    panel="compare",
    example="mechscope diff gpt2 my-tuned-gpt2 --data articles.jsonl --out runs/diff",
    settings=DiffSettings,
    arguments=("base", "tuned"),
    inputs=(MODELS, PAIR, CORPUS, CONTROLLED),
    stages=(DIFFERENCE, ROUTING, SELECTION, CONTROLS, CONTROL_SELECTION, claims_stage(DIFFERENCE, SELECTION, CONTROLS)),
    sections=("claims", "controls", "heads", "layers", "weights", "routing", "outputs", "selection", "matters", "bakeoff", "samples"),
    title=lambda names: f"What fine-tuning changed in {names['base']}",
    check=_check,
)
