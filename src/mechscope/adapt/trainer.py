"""The Hugging Face Trainer, bent where summarization needs it.

Three things differ from the stock Trainer. The loss is computed on the rows that predict a summary token, so no other row meets the
vocabulary. Validation is weighted by token instead of averaging batch means. And nothing is printed, or exchanged with a model hub: progress
goes to a callback. Checkpoints, resuming, early stopping, mixed precision and the schedule are the Trainer's own.

Several ranks share every batch, so that `batch_size` means the same however many there are; gradients are averaged by the Trainer (DDP, or what
accelerate is configured to do). An epoch's last batch is filled up with nothing, so that all get as many rows: see `Order`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from mechscope import ranks
from mechscope.adapt.kept import save_weights
from mechscope.adapt.loss import NOTHING, Collator, mean_loss, summed_loss
from mechscope.choices import TuningMethod
from mechscope.data.prompt import Example
from mechscope.errors import RunError
from mechscope.instrument.execution import Execution
from mechscope.settings.training import TrainSettings

# the trainer names a checkpoint's state so, and writes it last: a checkpoint that has it whole is whole
STATE = "trainer_state.json"
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class Order(Sampler[int]):
    """The order of the examples in an epoch, the same for any number of ranks.

    Several ranks need as many rows each, so the last batch is filled up with an example of which nothing is learned or counted, the one behind the last.
    accelerate would fill it with other examples, learned once more, so that the result would depend on the number of ranks.
    """

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        self.shuffled = SeedableRandomSampler(range(n_examples), data_seed=seed)
        self.filling = [n_examples] * (-n_examples % batch_size if ranks.size() > 1 else 0)

    def __len__(self) -> int:
        return len(self.shuffled) + len(self.filling)

    def __iter__(self) -> Iterator[int]:
        yield from self.shuffled
        yield from self.filling

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which decides the order."""
        self.shuffled.set_epoch(epoch)


class SummaryTrainer(Trainer):
    """A Trainer that learns summaries; see the module's text for what differs from the stock one."""

    control: Any  # the stock class sets it, under a library without types

    def __init__(
        self, model: nn.Module, *, collator: Collator, validation: Sequence[Example], tokens_per_batch: int, **options: Any
    ) -> None:
        super().__init__(model=model, data_collator=collator, **options)
        self.collator = collator
        self.validation = validation
        self.tokens_per_batch = tokens_per_batch
        self.initial_loss: float | None = None
        # our loss divides by the number of counted tokens of the whole optimizer step, so accumulation changes nothing
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the batch's share of the mean loss over the tokens of an optimizer step."""
        loss, tokens = summed_loss(model, inputs)
        # the number of all ranks' tokens; the average over ranks that follows would divide once more
        loss = loss / tokens if num_items_in_batch is None else loss * (ranks.size() / num_items_in_batch)
        if not torch.isfinite(loss):
            raise RunError(diverged(f"the training loss became {float(loss.detach())} at step {self.state.global_step + 1}"))
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the token-weighted validation loss as `eval_loss`."""
        if self.state.global_step == 0 and self.initial_loss is not None:
            loss = self.initial_loss
        else:
            with self.compute_loss_context_manager():
                loss = mean_loss(
                    self.model, self.validation, collator=self.collator, execution=Execution(tokens_per_batch=self.tokens_per_batch)
                )
        if not math.isfinite(loss):
            raise RunError(diverged(f"the validation loss became {loss} at step {self.state.global_step}"))
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Sized | None = None) -> Order:
        assert self.train_dataset is not None
        examples = len(self.train_dataset) - 1  # the last is nothing
        return Order(examples, self.args.per_device_train_batch_size * ranks.size(), self.args.data_seed)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: nobody reads the count, and walking the parameters at every step costs more than a small model's step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_weights(self.model, Path(output_dir or str(self.args.output_dir)))


class Reporter(TrainerCallback):
    """Reports the steps done, and logs the last step's training loss even between two evaluations."""

    def __init__(self, execution: Execution, label: str) -> None:
        self.execution = execution
        self.label = label

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report where the training starts, which is not zero when it continues."""
        self._report(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report one more step."""
        self._report(state)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def _report(self, state: Any) -> None:
        self.execution.told(self.label, state.global_step, state.max_steps)


class EndAt(TrainerCallback):
    """Ends the training at a step, and evaluates and saves there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End it, where the step is reached."""
        if state.global_step >= self.step:
            control.should_log = control.should_evaluate = control.should_save = control.should_training_stop = True


def build_trainer(
    model: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    work: Path,
    *,
    settings: TrainSettings,
    method: TuningMethod,
    seed: int,
    pad_id: int,
    first_time: bool,
    until: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> SummaryTrainer:
    """Set up the trainer of one fine-tuning.

    Args:
        model: The model to train, on its device; what requires a gradient learns.
        train: Examples to learn.
        validation: Examples whose loss picks the best checkpoint.
        work: Folder of the checkpoints.
        settings: How to train.
        method: Which learning rate applies.
        seed: Seed of the order of examples and of dropout.
        pad_id: Token id of the padding.
        first_time: Whether the training starts at step 0, so that the untrained loss is still to be measured.
        until: Step at which it ends, whatever patience says; the schedule stays that of all steps.
        callbacks: The trainer's own kind of callbacks.
    """
    every = settings.eval_every or settings.steps_per_epoch(len(train))
    patience: list[TrainerCallback] = []
    if until is not None:
        patience = [EndAt(until)]
    elif settings.patience is not None:
        patience = [EarlyStoppingCallback(early_stopping_patience=settings.patience)]
    arguments = TrainingArguments(
        output_dir=str(work.absolute()),
        max_steps=settings.steps(len(train)),
        per_device_train_batch_size=settings.batch_size // ranks.size(),
        ddp_find_unused_parameters=False,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate(method),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup,
        bf16=settings.bf16,
        seed=seed,
        data_seed=seed,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=first_time,
        logging_strategy="steps",
        logging_steps=every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,  # the last and the best; with 1 the trainer deletes the last one at its end
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        # the best checkpoint's files become the result as they are, so nothing needs to be loaded back; see `tune`
        load_best_model_at_end=False,
        restore_callback_states_from_checkpoint=True,  # or patience starts anew after a kill
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        use_cache=model.config.use_cache,  # the trainer writes this into the model's configuration
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no data parallelism over all visible devices
    widest = max(len(example) for example in (*train, *validation))
    return SummaryTrainer(
        model,
        collator=Collator(pad_id, settings.loss_on),
        validation=validation,
        tokens_per_batch=settings.batch_size * widest,
        args=arguments,
        train_dataset=[*train, NOTHING],
        eval_dataset=list(validation),
        callbacks=[*callbacks, *patience],
    )


def last_checkpoint(work: Path) -> Path | None:
    """Return the newest whole checkpoint, and delete newer ones that a kill left half-written.

    The state's path of the best checkpoint is made to point into this folder, in case the folder was moved.
    """
    numbered = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in numbered:
        state = read_state(checkpoint)
        best = None if state is None else work / f"checkpoint-{state['best_global_step']}"
        if state is None or best is None or read_state(best) is None:
            shutil.rmtree(checkpoint)
            continue
        if state["best_model_checkpoint"] != str(best.absolute()):
            state["best_model_checkpoint"] = str(best.absolute())
            temporary = checkpoint / f"{STATE}.new"
            temporary.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(temporary, checkpoint / STATE)
        return checkpoint
    return None


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """Return a checkpoint's trainer state, or None if it is not whole."""
    try:
        return dict(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def finished(state: dict[str, Any], settings: TrainSettings, until: int | None = None) -> bool:
    """Tell whether a checkpoint's training has nothing left to do: all steps done (those up to `until`, where it ends there), or patience lost."""
    if until is not None or state["global_step"] >= state["max_steps"]:
        return bool(state["global_step"] >= (state["max_steps"] if until is None else until))
    stopper = state["stateful_callbacks"].get("EarlyStoppingCallback")
    return (
        settings.patience is not None
        and stopper is not None
        and stopper["attributes"]["early_stopping_patience_counter"] >= settings.patience
    )


def diverged(what: str) -> str:
    """Word the error of a training that diverged."""
    return f"{what}: lower the learning rate, add warm-up, or check the documents; nothing was saved"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Silence transformers for a while, and restore the global random generators afterwards, which the Trainer seeds for the whole process."""
    python, array = random.getstate(), np.random.get_state()
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # the Trainer collects garbage as it starts; walking all the imported libraries' objects takes longer than a small model's evaluation
    gc.freeze()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a renamed attribute
            yield
    finally:
        gc.unfreeze()
        random.setstate(python)
        np.random.set_state(array)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
