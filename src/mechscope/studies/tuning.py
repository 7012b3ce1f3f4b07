"""Fine-tuning alone: `mechscope tune`, a model or an adapter out, with the learning curve beside it."""

from __future__ import annotations

from pathlib import Path

from mechscope.adapt.targets import place
from mechscope.adapt.training import Tuned, tune
from mechscope.errors import SettingsError
from mechscope.instrument import load
from mechscope.progress import Progress
from mechscope.studies.corpora import load_splits
from mechscope.studies.settings import TuneSettings
from mechscope.studies.stages import train_settings
from mechscope.subject import Components


def tune_run(settings: TuneSettings, out: str | Path, *, progress: Progress | None = None) -> Tuned:
    """Fine-tune a model to summarize and save it to a folder; a killed training continues with the same call.

    Args:
        settings: What to train on, where and how.
        out: Folder of the result: a model for `from_pretrained`, or a PEFT adapter.
        progress: Called with a label, what is done and how much there is.

    Raises:
        MechscopeError: Model, documents or settings cannot be used, or the folder is taken.
    """
    if settings.targets is not None and settings.method == "full":
        raise SettingsError(f"targets {settings.targets!r} are for LoRA, but the method is full: pass --lora or leave --targets out")
    subject = load(settings.base, dtype=settings.dtype, device=settings.device, unsafe=settings.unsafe)
    if subject.is_adapter:
        raise SettingsError(f"base {settings.base!r} is an adapter: merge it into a model first, or name its base")
    splits = load_splits(settings, subject)
    placed = None
    if settings.method == "lora":
        everywhere = Components.of_layers(range(subject.anatomy.n_layers))
        components = everywhere if settings.targets is None else Components.parse(settings.targets).validate(subject.anatomy)
        placed = place(subject, components, rank=settings.rank, modules=settings.lora_modules)
    return tune(
        subject,
        splits.encoded["train"].examples,
        splits.encoded["validation"].examples,
        Path(out),
        method=settings.method,
        placed=placed,
        scaling=settings.lora_scaling,
        dropout=settings.lora_dropout,
        settings=train_settings(settings, settings.seed),
        progress=progress,
    )
