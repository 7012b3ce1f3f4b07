"""MLP neurons as a stage of a run: what they do on texts, what drives them most, what they write, and what fine-tuning changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechscope.data.pairs import Pairs
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.studies.reading_settings import WeightsSettings
from mechscope.subject import Subject, pair
from mechscope.weights import activity_change, memories, neuron_activity, neuron_tokens

# tokens that are listed of what a neuron writes
_LISTED = 5


def neurons_stage(
    run: RunFolder, subjects: Mapping[str, Subject], texts: Pairs | None, settings: WeightsSettings, *, progress: Progress | None
) -> None:
    """Write the tables `neurons`, `neuron_contexts` and, of two models, `neuron_changes`.

    Args:
        run: The run.
        subjects: Models by label.
        texts: What neurons are watched on; None to leave the stage out.
        settings: How many neurons are written out.
        progress: Called with what is being done.
    """
    if texts is None:
        return
    inputs = {
        "models": {label: subject.fingerprint for label, subject in subjects.items()},
        "texts": texts.hash,
        "neurons": settings.neurons,
        "top": settings.top,
    }
    with run.stage("neurons", inputs) as stage:
        if stage.done:
            return
        options: dict[str, Any] = {"tokens_per_batch": settings.tokens_per_batch, "progress": progress}
        if "tuned" in subjects:
            both = activity_change(pair(subjects["base"], subjects["tuned"]), texts, **options)
            activity = {"base": both.base, "tuned": both.tuned}
            changes = both.table()
            stage.write_table("neuron_changes", changes)
            most = changes.nsmallest(settings.neurons, "rank")
            chosen = list(zip(most["layer"], most["neuron"], strict=True))
        else:
            activity = {label: neuron_activity(subject, texts, **options) for label, subject in subjects.items()}
            chosen = []
        tables, contexts = [], []
        for label, subject in subjects.items():
            table = activity[label].table()
            neurons = chosen or _of_one_token(table, settings.neurons)
            tables.append(_with_words(table, subject, neurons).assign(model=label))
            if neurons and subject.tokenizer is not None:
                contexts.append(memories(subject, activity[label], texts, neurons=neurons).assign(model=label))
        stage.write_table("neurons", pd.concat(tables, ignore_index=True))
        if contexts:
            stage.write_table("neuron_contexts", pd.concat(contexts, ignore_index=True))


def _of_one_token(table: pd.DataFrame, number: int) -> list[tuple[int, int]]:
    """Return neurons that one token drives, the strongest first; then the strongest of all others."""
    order = table.sort_values(["token_bound", "maximum"], ascending=False, kind="stable").head(number)
    return list(zip(order["layer"], order["neuron"], strict=True))


def _with_words(table: pd.DataFrame, subject: Subject, neurons: list[tuple[int, int]]) -> pd.DataFrame:
    """Add what the written-out neurons read and promote, as text: `reads`, `promotes`, `suppresses`; empty for the others."""
    found = neuron_tokens(subject, neurons=neurons, k=_LISTED)
    for side, name in (("in", "reads"), ("promoted", "promotes"), ("suppressed", "suppresses")):
        of_side = found[found["side"] == side].groupby("component")["token"].agg(lambda tokens: ", ".join(map(repr, tokens)))
        table[name] = table["component"].map(of_side).fillna("")
    return table
