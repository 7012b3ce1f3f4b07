"""`mechscope tune`: fine-tune a model to summarize, or train a control of a fine-tuning; a model or an adapter comes out, with the learning curve beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.choices import TrainedControl, TuningMethod
from mechscope.errors import SettingsError
from mechscope.settings import Count, Number, nested, setting
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
    targets: str | None = setting(
        None,
        'Where LoRA learns, e.g. "layers:2,3,5" or "a3.h5,m3", or the heads and MLPs of a circuit file that mechscope circuit wrote '
        "(RUN/circuits/model.json); by default every layer.",
    )
    training: TrainSettings = nested(TrainSettings)
    lora: LoraSettings = nested(LoraSettings)
    keep_every: Number | None = setting(
        None,
        "Optimizer steps between checkpoints that stay in the folder as models of their own, a series for mechscope dynamics; by default none.",
    )
    control: TrainedControl | None = setting(
        None,
        "Train a control of the training in --like, with as many steps of the same schedule: shuffled (every document with another one's summary) or "
        "seed (the same with another seed).",
    )
    like: str | None = setting(
        None, "Folder of the finished training that the control is matched with; what is not given is taken from there."
    )
    control_seed: Count | None = setting(
        None,
        "Seed of the control's training and of the shuffling, where --seed remains that of the documents; by default --seed, or one more for seed.",
    )

    def __post_init__(self) -> None:
        """Fill in the method and the control's seed, and refuse what does not go together.

        Raises:
            SettingsError: Targets are given with the method full, a control without what it is matched with, or batches that the ranks cannot share.
        """
        super().__post_init__()
        if self.method is None:
            object.__setattr__(self, "method", "full" if self.targets is None else "lora")
        if self.targets is not None and self.method == "full":
            raise SettingsError(f"targets {self.targets!r} are for LoRA, but the method is full: use method lora, or leave the targets out")
        if (self.control is None) is not (self.like is None):
            given, missing = ("control", "like") if self.like is None else ("like", "control")
            raise SettingsError(
                f"setting {given!r} needs setting {missing!r}: a control is of a kind, and matched with a finished training"
            )
        if self.control_seed is not None and self.control is None:
            raise SettingsError("setting 'control_seed' is for controls: give control and like, or use seed")
        if self.control is not None and self.control_seed is None:
            object.__setattr__(self, "control_seed", self.seed + (self.control == "seed"))
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
    from mechscope.adapt.places import read_circuit
    from mechscope.adapt.targets import place
    from mechscope.adapt.training import tune
    from mechscope.instrument import Execution, load
    from mechscope.studies.corpora import load_splits
    from mechscope.studies.inputs import loading
    from mechscope.subject import Components, Subject

    if out is None:
        raise SettingsError("a fine-tuned model needs a folder: give out=, a folder that is not there yet")
    base = (given or {}).get("base", settings.base)
    subject = (
        base
        if isinstance(base, Subject)
        else load(base, **loading(settings), tokenizer=(given or {}).get("tokenizer") or settings.tokenizer)
    )
    if subject.is_adapter:
        raise SettingsError(f"base {settings.base!r} is an adapter: merge it into a model first, or name its base")
    placed = None
    if settings.method == "lora":
        everywhere = Components.of_layers(range(subject.anatomy.n_layers))
        components = everywhere if settings.targets is None else read_circuit(settings.targets, subject)
        placed = place(subject, components, rank=settings.lora.rank, modules=settings.lora.lora_modules)
    splits = load_splits(settings, subject)
    train, validation = (splits.encoded[name].examples for name in ("train", "validation"))
    how: dict[str, Any] = {
        "method": "full" if placed is None else "lora",
        "placed": placed,
        "scaling": settings.lora.lora_scaling,
        "dropout": settings.lora.lora_dropout,
        "keep_every": settings.keep_every,
        "about": asdict(settings),
    }
    if settings.control is None:
        execution = Execution(seed=settings.seed, progress=progress)
        return tune(subject, train, validation, Path(out), **how, settings=settings.training, execution=execution)
    from mechscope.adapt.controls import matched, shuffled_summaries
    from mechscope.studies.corpora import encode_for

    seed = settings.control_seed or 0
    alike = {name: value for name, value in how.items() if name not in ("about", "keep_every")}
    match = matched(Path(settings.like or ""), subject, train, validation, **alike, settings=settings.training)
    if settings.control == "seed" and seed == match.seed:
        raise SettingsError(f"setting 'control_seed' is {seed}, the seed of the training in {settings.like}: choose another")
    if settings.control == "shuffled":
        train = encode_for(settings, shuffled_summaries(splits.corpora["train"], seed=seed), subject).examples
    return tune(
        subject,
        train,
        validation,
        Path(out),
        **how,
        settings=match.settings,
        until=match.step,
        control={"kind": settings.control, "like": match.name},
        execution=Execution(seed=seed, progress=progress),
    )


def _show(tuned: Tuned) -> None:
    from rich.markup import escape

    from mechscope.studies.console import out

    share = tuned.trainable_parameters / tuned.total_parameters
    reached = "best validation loss" if tuned.control is None else f"control ({tuned.control['kind']}): validation loss"
    out.print(
        f"{reached} {tuned.best_loss:.4f} nats per token at step {tuned.best_step:,} of {tuned.steps:,}; "
        f"{tuned.trainable_parameters:,} trainable parameters ({share:.2%})",
        highlight=False,
    )
    if not tuned.converged:
        out.print(f"not converged: {escape(tuned.unconverged)}; give it more steps", highlight=False)
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
    like="like",
)
