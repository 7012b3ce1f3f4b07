"""`mechscope tune`: fine-tune a model to summarize; a model or an adapter comes out, with the learning curve beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.choices import TuningMethod
from mechscope.errors import SettingsError
from mechscope.settings import nested, setting
from mechscope.settings.lora import LoraSettings
from mechscope.settings.training import TrainSettings
from mechscope.studies.groups import Loading, SplitCorpus
from mechscope.studies.job import Job

if TYPE_CHECKING:
    from mechscope.adapt.training import Tuned
    from mechscope.instrument import Progress


@dataclass(frozen=True, kw_only=True)
class TuneSettings(Loading, SplitCorpus):
    """What is trained, on what, and how."""

    panel: ClassVar[str] = "Training"

    base: str = setting(..., "The pre-trained model.")
    method: TuningMethod | None = setting(None, "Full fine-tuning or LoRA; by default full, or lora where --targets says where.")
    targets: str | None = setting(None, 'Where LoRA learns, e.g. "layers:2,3,5" or "a3.h5,m3"; by default every layer.')
    training: TrainSettings = nested(TrainSettings)
    lora: LoraSettings = nested(LoraSettings)

    def __post_init__(self) -> None:
        """Fill in the method, and refuse targets that full fine-tuning cannot have.

        Raises:
            SettingsError: Targets are given with the method full, or batches cannot be shared by the ranks.
        """
        super().__post_init__()
        if self.method is None:
            object.__setattr__(self, "method", "full" if self.targets is None else "lora")
        if self.targets is not None and self.method == "full":
            raise SettingsError(f"targets {self.targets!r} are for LoRA, but the method is full: use method lora, or leave the targets out")
        self.training.check_ranks()


def _tune(
    job: Job[TuneSettings],
    settings: TuneSettings,
    out: str | Path | None,
    *,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
    given: Mapping[str, Any] | None = None,
) -> Tuned:
    """Fine-tune a model and save it to a folder; a killed training continues with the same call."""
    from mechscope.adapt.targets import place
    from mechscope.adapt.training import tune
    from mechscope.instrument import Execution, load
    from mechscope.studies.corpora import load_splits
    from mechscope.studies.inputs import loading
    from mechscope.subject import Components, Subject

    if out is None:
        raise SettingsError("a fine-tuned model needs a folder: give out=, a folder that is not there yet")
    base = (given or {}).get("base", settings.base)
    subject = base if isinstance(base, Subject) else load(base, **loading(settings), tokenizer=(given or {}).get("tokenizer"))
    if subject.is_adapter:
        raise SettingsError(f"base {settings.base!r} is an adapter: merge it into a model first, or name its base")
    placed = None
    if settings.method == "lora":
        everywhere = Components.of_layers(range(subject.anatomy.n_layers))
        components = everywhere if settings.targets is None else Components.parse(settings.targets).validate(subject.anatomy)
        placed = place(subject, components, rank=settings.lora.rank, modules=settings.lora.lora_modules)
    splits = load_splits(settings, subject)
    return tune(
        subject,
        splits.encoded["train"].examples,
        splits.encoded["validation"].examples,
        Path(out),
        method="full" if placed is None else "lora",
        placed=placed,
        scaling=settings.lora.lora_scaling,
        dropout=settings.lora.lora_dropout,
        settings=settings.training,
        execution=Execution(seed=settings.seed, progress=progress),
    )


def _show(tuned: Tuned) -> None:
    from rich.markup import escape

    from mechscope.studies.console import out

    share = tuned.trainable_parameters / tuned.total_parameters
    out.print(
        f"best validation loss {tuned.best_loss:.4f} nats per token at step {tuned.best_step:,} of {tuned.steps:,}; "
        f"{tuned.trainable_parameters:,} trainable parameters ({share:.2%})",
        highlight=False,
    )
    out.print(f"model   [bold]{escape(str(tuned.path))}[/bold]", highlight=False, soft_wrap=True)


JOB = Job(
    name="tune",
    help="Fine-tune a model to summarize: fully, or by LoRA at chosen layers and heads.",
    panel="tune",
    example='mechscope tune gpt2 --data articles.jsonl --targets "layers:2,3,5" --out runs/tuned',
    settings=TuneSettings,
    arguments=("base",),
    execute=_tune,
    show=_show,
)
