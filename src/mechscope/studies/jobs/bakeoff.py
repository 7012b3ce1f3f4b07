"""`mechscope bakeoff`: is LoRA at chosen layers and heads as good as LoRA everywhere, at random places, and as full fine-tuning?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.errors import SettingsError
from mechscope.settings import setting
from mechscope.studies.contest import Contested, Places, bakeoff_stage, circuit_places, summaries_stage
from mechscope.studies.groups import Loading
from mechscope.studies.inputs import MODELS, SPLITS, fingerprints
from mechscope.studies.job import Job
from mechscope.studies.run import Input, JobRun

if TYPE_CHECKING:
    from mechscope.subject import Subject


@dataclass(frozen=True, kw_only=True)
class BakeOffJobSettings(Loading, Contested):
    """Which model, which places, and how arms are trained and scored."""

    panel: ClassVar[str] = "Contest"

    base: str = setting(..., "The pre-trained model.")
    target_layers: str | None = setting(
        None, 'Layers for targeted LoRA, e.g. "layers:2,3,5"; give these, --target-heads or --target-circuit.'
    )
    target_heads: str | None = setting(None, 'Heads for targeted LoRA, e.g. "a4.h11,a2.h2"; without, that strategy is left out.')

    def __post_init__(self) -> None:
        """Refuse a bake-off without a place, and batches that the ranks cannot share.

        Raises:
            SettingsError: No place is named, the number of ranks does not divide the batch size, or a setting is out of bounds.
        """
        super().__post_init__()
        if self.target_layers is None and self.target_heads is None and self.contest.target_circuit is None:
            raise SettingsError("no place for LoRA is named: give target_layers, target_heads or target_circuit")
        self.training.check_ranks()


def _places(run: JobRun[BakeOffJobSettings]) -> Places:
    from mechscope.subject import Components

    settings = run.settings
    subject = run[BASE]
    layers, heads = (Components.parse(text or "none").validate(subject.anatomy) for text in (settings.target_layers, settings.target_heads))
    return Places(layers, heads, *circuit_places(subject, settings.contest))


BASE: Input[Subject] = Input("base", lambda run: run[MODELS]["base"], lambda subject: fingerprints({"base": subject}))
PLACES: Input[Places] = Input("places", _places, lambda places: places.fingerprint)
BAKEOFF = bakeoff_stage(BASE, PLACES)


def _check(run: JobRun[Any]) -> None:
    from mechscope.adapt.arms import plan

    if run[BASE].is_adapter:
        raise SettingsError(f"base {run.settings.base!r} is an adapter: merge it into a model first, or name its base")
    plan(run[BASE], run[PLACES].competition(run.settings))


JOB = Job(
    name="bakeoff",
    help="Compare LoRA at chosen layers and heads with LoRA everywhere, at random places, and full fine-tuning.",
    panel="tune",
    example='mechscope bakeoff gpt2 --data articles.jsonl --target-layers "layers:2,3,5" --out runs/bakeoff',
    settings=BakeOffJobSettings,
    arguments=("base",),
    inputs=(MODELS, PLACES, SPLITS),
    stages=(BAKEOFF, summaries_stage(MODELS, BAKEOFF)),
    sections=("bakeoff", "samples"),
    title=lambda names: f"Where LoRA learns best in {names['base']}",
    check=_check,
)
