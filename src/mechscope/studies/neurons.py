"""MLP neurons: what they do on texts, what drives them most, what they write, and what fine-tuning changed."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from mechscope.data.pairs import Pairs
from mechscope.instrument.execution import Execution
from mechscope.subject import Subject, pair
from mechscope.weights import activity_change, memories, neuron_activity, neuron_tokens

# tokens that are listed of what a neuron writes
_LISTED = 5


def neuron_tables(
    subjects: Mapping[str, Subject], texts: Pairs, *, number: int, execution: Execution = Execution()
) -> dict[str, pd.DataFrame]:
    """Watch the neurons of some models on texts, and write the most telling ones out.

    Args:
        subjects: Models by label.
        texts: What neurons are watched on.
        number: How many neurons are written out.
        execution: Tokens of a batch (2,048 by default), progress.

    Returns:
        The tables `neurons`, `neuron_contexts` and, of a base and a tuned model, `neuron_changes`.
    """
    written: dict[str, pd.DataFrame] = {}
    if "tuned" in subjects:
        both = activity_change(pair(subjects["base"], subjects["tuned"]), texts, execution=execution)
        activity = {"base": both.base, "tuned": both.tuned}
        changes = written["neuron_changes"] = both.table()
        most = changes.nsmallest(number, "rank")
        chosen = list(zip(most["layer"], most["neuron"], strict=True))
    else:
        activity = {label: neuron_activity(subject, texts, execution=execution) for label, subject in subjects.items()}
        chosen = []
    tables, contexts = [], []
    for label, subject in subjects.items():
        table = activity[label].table()
        neurons = chosen or _of_one_token(table, number)
        tables.append(_with_tokens(table, subject, neurons).assign(model=label))
        if neurons and subject.tokenizer is not None:
            contexts.append(memories(subject, activity[label], texts, neurons=neurons).assign(model=label))
    written["neurons"] = pd.concat(tables, ignore_index=True)
    if contexts:
        written["neuron_contexts"] = pd.concat(contexts, ignore_index=True)
    return written


def _of_one_token(table: pd.DataFrame, number: int) -> list[tuple[int, int]]:
    """Return neurons that one token drives, the strongest first; then the strongest of all others."""
    order = table.sort_values(["token_bound", "maximum"], ascending=False, kind="stable").head(number)
    return list(zip(order["layer"], order["neuron"], strict=True))


def _with_tokens(table: pd.DataFrame, subject: Subject, neurons: list[tuple[int, int]]) -> pd.DataFrame:
    """Add what the written-out neurons read and promote, as text: `reads`, `promotes`, `suppresses`; empty for the others."""
    listed = neuron_tokens(subject, neurons=neurons, k=_LISTED)
    for side, name in (("in", "reads"), ("promoted", "promotes"), ("suppressed", "suppresses")):
        of_side = listed[listed["side"] == side].groupby("component")["token"].agg(lambda tokens: ", ".join(map(repr, tokens)))
        table[name] = table["component"].map(of_side).fillna("")
    return table
