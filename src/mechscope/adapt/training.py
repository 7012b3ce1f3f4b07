"""Fine-tuning on summaries: full or LoRA, stopped early, resumable, saved whole or not at all.

`tune` trains a copy of the subject's model and keeps the checkpoint with the best validation loss. Its result is an artifact (see
`mechscope.store.artifact`), in whose work folder the trainer keeps its checkpoints. A killed training continues there and ends with the weights
an undisturbed one has (bit-equal on a CPU), because optimizer, schedule, order of examples and random generators are all restored.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError

from mechscope import ranks
from mechscope.adapt.kept import KEPT, Keep
from mechscope.adapt.lora import attach, base_copy, leak, total_parameters
from mechscope.adapt.targets import Placement
from mechscope.adapt.trainer import Reporter, build_trainer, finished, last_checkpoint, read_state, undisturbed
from mechscope.choices import TuningMethod
from mechscope.data.prompt import Example, pad_id
from mechscope.errors import DataError, ModelError, RunError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.settings.training import TrainSettings
from mechscope.shapes import by_shape
from mechscope.stats.convergence import convergence
from mechscope.store.artifact import Artifact
from mechscope.store.files import plain, read_json, refusal, write_json, write_text
from mechscope.store.hashing import hash_json
from mechscope.store.ledger import SETTINGS

RECORD = "training.json"
# what a checkpoint holds for resuming only
_NOT_RESULT = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json")


@dataclass(frozen=True)
class Tuned:
    """A finished fine-tuning.

    Attributes:
        path: Folder with the weights: a model for `from_pretrained`, or a PEFT adapter.
        method: `"full"` or `"lora"`.
        rank: LoRA ranks as text; empty for full fine-tuning.
        curve: One row per evaluation: step, tokens (input tokens seen), train_loss (mean since the last row), validation_loss; nats per token.
            Row 0 is the model before training.
        best_loss: Lowest validation loss of a trained checkpoint; its weights are the saved ones. Of a control, the loss of the step it was matched to.
        best_step: Optimizer step of that checkpoint.
        tokens_to_best: Input tokens seen until then.
        steps: Optimizer steps done.
        tokens: Input tokens seen in all.
        stopped_early: Whether patience ran out before the steps did.
        converged: Whether the lowest validation loss arrived (`mechscope.stats.convergence`), or patience ran out.
        late_share: Fall of the lowest validation loss in the last quarter of the training, as a share of its whole fall; NaN where too few evaluations tell.
        unconverged: Why it does not count as converged; empty where it does.
        trainable_parameters: Entries that could move.
        total_parameters: Parameters of the base model, and of the adapter the entries that could move.
        seed: Seed of the order of examples, of dropout and of the adapter's start.
        control: For a control of another training its kind (`kind`: `seed` or `shuffled`) and what it was matched with (`like`); None for others.
    """

    path: Path
    method: TuningMethod
    rank: str
    curve: pd.DataFrame
    best_loss: float
    best_step: int
    tokens_to_best: int
    steps: int
    tokens: int
    stopped_early: bool
    trainable_parameters: int
    total_parameters: int
    converged: bool
    late_share: float
    unconverged: str
    seed: int | None = None
    control: dict[str, Any] | None = None

    __repr__ = by_shape

    @classmethod
    def read(cls, path: Path) -> Tuned:
        """Read a result back from its folder.

        Raises:
            RunError: The folder holds no readable `training.json`.
        """
        result = read_json(path / RECORD)
        curve = pd.DataFrame(result.pop("curve")).astype({"train_loss": float})
        late = result.pop("late_share")
        return cls(path=path, curve=curve, late_share=math.nan if late is None else late, **result)


def tune(
    subject: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    out: Path,
    *,
    method: TuningMethod = "full",
    placed: Placement | None = None,
    scaling: float = 2.0,
    dropout: float = 0.0,
    settings: TrainSettings | None = None,
    initial_loss: float | None = None,
    until: int | None = None,
    control: Mapping[str, Any] | None = None,
    keep_every: int | None = None,
    about: Mapping[str, Any] | None = None,
    replace: bool = False,
    execution: Execution = Execution(),
) -> Tuned:
    """Fine-tune a copy of a model on summaries and save the best checkpoint.

    Args:
        subject: The base `Subject`; its model is not changed. Full fine-tuning trains in float32 whatever the base's type.
        train: Examples to learn.
        validation: Examples whose loss decides which checkpoint is kept and when to stop.
        out: Folder to write; it appears when it is complete.
        method: `"full"` or `"lora"`.
        placed: For LoRA, what learns at which rank; see `place`.
        scaling: LoRA's α/r.
        dropout: LoRA's dropout.
        settings: How to train.
        initial_loss: The base's validation loss if known already (many trainings of one base); otherwise it is measured.
        until: Optimizer step at which training ends and whose weights are saved, whatever the validation loss: a control has as many steps of the same
            schedule as the training that it is matched with. The settings' patience is then not used.
        control: What is recorded of a control (`Tuned.control`).
        keep_every: Optimizer steps between checkpoints that stay, as models or adapters of their own in `out` (`checkpoint-100`); None for none.
        about: What the caller resolved, documents included; kept beside the result (`study.yaml`), for another training to take after.
        replace: Put the result in the place of a training with other settings, data or base model, which is otherwise refused.
        execution: Seed of the order of examples, of dropout and of the adapter's start; progress, called with ("training", steps done, steps at most).

    Returns:
        What was reached, with the learning curve.

    Raises:
        SettingsError: Method and placement contradict each other, or the step `until` or the first to keep lies behind the last one.
        DataError: No examples.
        RunError: The folder is taken by something else or cannot be written, or the loss is no longer a number.
    """
    settings = settings or TrainSettings()
    settings.check_ranks()
    if (method == "lora") is (placed is None):
        raise SettingsError(
            f"method {method!r} {'needs' if method == 'lora' else 'takes no'} placement: LoRA is placed, full fine-tuning changes everything"
        )
    for name, examples in (("training", train), ("validation", validation)):
        if not examples:
            raise DataError(f"there are no {name} examples: give at least one document with a summary")
    if until is not None and until > (steps := settings.steps(len(train))):
        raise SettingsError(
            f"the training that this control is matched with kept the weights of step {until}, and {len(train)} examples give but {steps} steps: "
            "shuffling left too many documents out as too long; raise max_tokens for both trainings"
        )
    if keep_every is not None and keep_every > (steps := settings.steps(len(train))):
        raise SettingsError(f"setting 'keep_every' is {keep_every}, but the training has {steps} steps: no checkpoint would be kept")
    if subject.dtype == torch.float16:
        raise ModelError(f"model {subject.source!r} is loaded in float16, in which training overflows: load it in float32 or bfloat16")
    request = {
        "base": subject.source,
        "fingerprint": subject.fingerprint,
        "method": method,
        "placement": None if placed is None else asdict(placed),
        "scaling": scaling,
        "dropout": dropout,
        "settings": asdict(settings),
        "seed": execution.seed,
        "examples": [digest(train), digest(validation)],
        # trainings that are no controls keep the request, and so the place, that they have always had
        **({} if until is None else {"until": until}),
        **({} if control is None else {"control": dict(control)}),
        **({} if keep_every is None else {"keep_every": keep_every}),
    }
    with Artifact(out.parent, request, name=out.name, replace=replace) as artifact:
        if not artifact.done:
            work = artifact.work.path("trainer")
            try:
                try:
                    facts = _train(
                        subject,
                        train,
                        validation,
                        work,
                        method,
                        placed,
                        scaling,
                        dropout,
                        settings,
                        execution,
                        initial_loss,
                        until,
                        keep_every,
                    )
                    facts |= {"seed": execution.seed, "control": None if control is None else dict(control)}
                except RunError:
                    if ranks.is_first():
                        artifact.work.discard()  # a diverged training would diverge again
                    raise
                ranks.by_first(lambda: _write_result(work, artifact.result, subject.tokenizer, facts, until, about))
            except (OSError, SafetensorError) as error:
                raise refusal(out, error if isinstance(error, OSError) else OSError(str(error))) from error
    return Tuned.read(out)


def load_tuned(subject: Any, tuned: Tuned) -> Any:
    """Return what `tune` made of a base, ready for use; an adapter is put on a view of the base's own weights, so do not merge it."""
    with undisturbed():
        if tuned.method == "lora":
            model: Any = PeftModel.from_pretrained(base_copy(subject, share_weights=True), tuned.path)
        else:
            model = type(subject.model).from_pretrained(tuned.path).to(subject.device)
    return model.eval()


def _train(
    subject: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    work: Path,
    method: TuningMethod,
    placed: Placement | None,
    scaling: float,
    dropout: float,
    settings: TrainSettings,
    execution: Execution,
    initial_loss: float | None,
    until: int | None,
    keep_every: int | None,
) -> dict[str, Any]:
    """Train up to the last checkpoint in `work`, from the one that is there if there is one, and count parameters."""
    base = total_parameters(subject.model)
    trainable = base if placed is None else placed.trainable_parameters
    facts = {
        "method": method,
        "rank": "" if placed is None else placed.rank_text,
        "trainable_parameters": trainable,
        "total_parameters": base if placed is None else base + trainable,
    }
    checkpoint = ranks.by_first(lambda: last_checkpoint(work))
    state = None if checkpoint is None else read_state(checkpoint)
    if state is not None and finished(state, settings, until):
        return facts
    kept = [] if keep_every is None else [Keep(keep_every, work / KEPT, subject.tokenizer)]
    with undisturbed():
        if placed is None:
            model: Any = base_copy(subject).float().requires_grad_(True)
        else:
            model = attach(subject, placed, scaling=scaling, dropout=dropout, seed=execution.seed, share_weights=True)
        trainer = build_trainer(
            model,
            train,
            validation,
            work,
            settings=settings,
            method=method,
            seed=execution.seed,
            pad_id=0 if subject.tokenizer is None else pad_id(subject.tokenizer),
            first_time=checkpoint is None,
            until=until,
            callbacks=[Reporter(execution, "training"), *kept],
        )
        trainer.initial_loss = initial_loss
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if placed is not None and leak(model, placed) != 0.0:
            raise RunError("the adapter moved outside the slices it was placed in: this is a defect of mechscope, please report it")
    return facts


def _write_result(
    work: Path, folder: Path, tokenizer: Any, facts: dict[str, Any], until: int | None, about: Mapping[str, Any] | None
) -> None:
    """Write the best checkpoint, or that of the step `until`, and what was reached into the result's folder."""
    last = last_checkpoint(work)
    state = None if last is None else read_state(last)
    if state is None:
        raise RunError(f"training in {work} left no checkpoint")
    curve = _curve(state["log_history"])
    step = state["best_global_step"] if until is None else until
    best = curve[curve["step"] == step].iloc[0]
    stopped = until is None and state["global_step"] < state["max_steps"]
    # the best checkpoint is what is kept, so a loss that rises again is no change of the result
    arrived = convergence(curve["validation_loss"].cummin(), pace=_rates(state["log_history"], curve["step"]))
    result = {
        **facts,
        "best_loss": float(best["validation_loss"]),
        "best_step": int(best["step"]),
        "tokens_to_best": int(best["tokens"]),
        "steps": int(state["global_step"]),
        "tokens": int(state["num_input_tokens_seen"]),
        "stopped_early": stopped,
        "converged": stopped or arrived.converged,
        "late_share": None if math.isnan(arrived.late_share) else arrived.late_share,
        "unconverged": "" if stopped else arrived.reason,
        "curve": [{key: None if math.isnan(value) else value for key, value in row.items()} for row in curve.to_dict("records")],
    }
    shutil.rmtree(folder)  # what a kill left half copied
    shutil.copytree(work / f"checkpoint-{step}", folder, ignore=shutil.ignore_patterns(*_NOT_RESULT))
    if (work / KEPT).is_dir():
        shutil.copytree(work / KEPT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_json(result, folder / RECORD)
    if about is not None:
        write_text(yaml.safe_dump(plain(dict(about)), sort_keys=False), folder / SETTINGS)


def _curve(history: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Gather the trainer's log into one row per evaluation."""
    train = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    rows = [
        {
            "step": int(entry["step"]),
            "tokens": int(entry["num_input_tokens_seen"]),
            "train_loss": float(train.get(entry["step"], math.nan)),
            "validation_loss": float(entry["eval_loss"]),
        }
        for entry in history
        if "eval_loss" in entry
    ]
    return pd.DataFrame(rows)


def _rates(history: Sequence[dict[str, Any]], steps: pd.Series) -> list[float]:
    """Return the learning rate at each evaluation: the last that was logged, and the first one before any was."""
    logged = [(int(entry["step"]), float(entry["learning_rate"])) for entry in history if "learning_rate" in entry]
    return [next((rate for at, rate in reversed(logged) if at <= step), logged[0][1] if logged else 1.0) for step in steps]


def digest(examples: Sequence[Example]) -> str:
    """Return the fingerprint of examples as a training sees them, order included."""
    return hash_json([[example.input_ids, example.summary] for example in examples])
