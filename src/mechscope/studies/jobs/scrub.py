"""`mechscope scrub`: is a hypothesis about what components read enough to explain what the model does?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from mechscope.choices import MetricName
from mechscope.errors import SettingsError
from mechscope.settings import Number, setting
from mechscope.studies.declared import read_mapping
from mechscope.studies.groups import OneModel, PromptPairs
from mechscope.studies.inputs import MODELS, PAIRS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs, PromptPair

Labels = str | list[str] | None
Declared = dict[str, Labels]


@dataclass(frozen=True, kw_only=True)
class ScrubSettings(OneModel, PromptPairs):
    """The hypothesis, and how often it is tried."""

    panel: ClassVar[str] = "Scrubbing"

    hypothesis: str = setting(
        ...,
        "JSON or YAML file: by components, what their values may depend on: null (nothing: any text's value will do), answers, wrong_answers, the name "
        "of a segment (its tokens), or a list with one label per pair. Values are exchanged between texts with equal labels. "
        'For example {"m4,m5": null, "a3.h1": "answers"}.',
    )
    samples: Number = setting(5, "How often the exchanged texts are drawn.")
    metric: MetricName = setting("logit-diff", "What should stay as it is.")
    commonest_length: bool = setting(
        False, "Keep only the pairs of the commonest length; all must be equally long, as values are exchanged token by token."
    )


def _read_hypothesis(run: JobRun[ScrubSettings]) -> Declared:
    from mechscope.subject import Components

    file = run.settings.hypothesis
    declared: Declared = {}
    for components, labels in read_mapping(file, "the hypothesis").items():
        Components.parse(components)
        if isinstance(labels, list):
            labels = [str(label) for label in labels]
        elif labels is not None and not isinstance(labels, str):
            raise SettingsError(
                f"{file} says of {components} {labels!r}: write null, answers, wrong_answers, a segment, or a list of labels"
            )
        declared[components] = labels
    return declared


HYPOTHESIS: Input[Declared] = Input("hypothesis", _read_hypothesis, lambda declared: declared, lambda declared: {"hypothesis": declared})
"""The hypothesis: by components, what their values may depend on."""


def _label(pair: PromptPair, labels: str, file: str) -> str:
    """Return the label of a pair by its name: its answers, or the tokens of a segment."""
    if labels in ("answers", "wrong_answers"):
        return str(pair.answers if labels == "answers" else pair.wrong_answers)
    if labels not in pair.segments:
        known = ", ".join(["answers", "wrong_answers", *pair.segments])
        raise SettingsError(f"{file} names {labels!r}, which pair {pair.id!r} does not have: use {known}, null, or a list of labels")
    return str([pair.clean[first:end] for first, end in pair.segments[labels]])


def _scrubbed_pairs(run: JobRun[ScrubSettings]) -> tuple[Pairs, dict[str, list[str] | None]]:
    """Return the pairs and what each may be exchanged by, by components."""
    pairs, file = run[PAIRS], run.settings.hypothesis
    labelled: dict[str, list[str] | None] = {}
    for components, labels in run[HYPOTHESIS].items():
        if isinstance(labels, list) and len(labels) != len(pairs):
            raise SettingsError(f"{file} has {len(labels)} labels for {components}, there are {len(pairs)} pairs: give one per pair")
        labelled[components] = [_label(pair, labels, file) for pair in pairs] if isinstance(labels, str) else labels
    if not run.settings.commonest_length:
        return pairs, labelled
    length = Counter(len(pair.clean) for pair in pairs).most_common(1)[0][0]
    kept = [at for at, pair in enumerate(pairs) if len(pair.clean) == length]
    chosen = replace(pairs, pairs=tuple(pairs.pairs[at] for at in kept))
    return chosen, {components: None if labels is None else [labels[at] for at in kept] for components, labels in labelled.items()}


def _check(run: JobRun[ScrubSettings]) -> None:
    pairs, _ = _scrubbed_pairs(run)
    check_pairs(run.first, pairs, metric=run.settings.metric)


def _scrubbed(run: JobRun[ScrubSettings]) -> Tables:
    import pandas as pd

    from mechscope.causal import scrub

    pairs, labelled = _scrubbed_pairs(run)
    result = scrub(run.first, pairs, labelled, metric=run.settings.metric, samples=run.settings.samples, execution=run.execution)
    run.folder.record("notes", {"pairs": len(pairs), "left out by length": len(run[PAIRS]) - len(pairs)})
    depends = {
        components: "nothing" if labels is None else labels if isinstance(labels, str) else "labels given"
        for components, labels in run[HYPOTHESIS].items()
    }
    parts = [
        {
            "component": components,
            "depends_on": depends[components],
            "labels": 1 if labels is None else len(set(labels)),
            "alone": 0 if labels is None else sum(labels.count(label) == 1 for label in labels),
            "n": len(pairs),
        }
        for components, labels in labelled.items()
    ]
    return {"scrub": result.summary, "scrub_samples": result.table, "scrub_hypothesis": pd.DataFrame(parts)}


def _title(names: Mapping[str, str]) -> str:
    return f"A hypothesis about {names['model']}, scrubbed"


JOB = Job(
    name="scrub",
    help="Causal scrubbing: exchange what a hypothesis says does not matter, and see how much of the behaviour is left (Chan et al. 2022).",
    panel="intervene",
    example="mechscope scrub gpt2 --pairs induction --hypothesis hypothesis.yaml --commonest-length --out runs/scrub",
    settings=ScrubSettings,
    arguments=("model",),
    inputs=(HYPOTHESIS, MODELS, PAIRS),
    stages=(
        Stage(
            name="scrub",
            work=_scrubbed,
            hangs_on=("samples", "metric", "commonest_length", "seed"),
            inputs=(HYPOTHESIS, MODELS, PAIRS),
        ),
    ),
    sections=("scrub",),
    title=_title,
    check=_check,
)
