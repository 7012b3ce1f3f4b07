"""`mechscope probe`: what can be read off a model's activations, layer by layer, beside controls; and what fine-tuning changed of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from mechscope.errors import DataError
from mechscope.settings import Number, setting
from mechscope.studies.groups import ModelAndTuned
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.probing import Task


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(ModelAndTuned):
    """Which texts, what is told of them, and by which probe."""

    panel: ClassVar[str] = "Probe"

    data: str = setting(
        "newsroom",
        "Labelled texts: newsroom, or files (JSONL, JSON, CSV, Parquet) joined by commas, with a column text or document and a column of labels.",
    )
    labels: str = setting(
        ...,
        "What is told: a column of the files; of the newsroom kind or day, or fact (which fact a token states); of any texts first letter a (of a token).",
    )
    texts: Number = setting(400, "Texts at most.")
    max_tokens: Number = setting(256, "Most tokens of a text; lowered to what the model can read.")
    reading: Literal["mean", "last"] = setting(
        "mean", "What stands for a text: the mean over its tokens, or its last token. Labels of tokens are told of each token."
    )
    site: Literal["residual", "attention_output", "mlp_output", "head"] = setting("residual", "What is read of every layer.")
    method: Literal["lda", "ridge", "means", "logistic", "mlp"] = setting(
        "lda",
        "The probe: linear discriminant analysis, least squares, the difference in means, logistic regression, or an MLP of one hidden layer, which is not "
        "linear. All but the third are shrunk as suits other texts; the last two take longer.",
    )
    folds: Annotated[int, Ge(3)] = setting(5, "Parts of the texts, each judged by probes that were fitted to the others.")
    shuffles: Annotated[int, Ge(5)] = setting(20, "How often labels are shuffled, for what accuracies are where there is nothing to tell.")
    erase: str = setting(
        "",
        "A component such as resid3, of the site that is read, where the labels are erased (LEACE) to see what the model does without them, beside as many "
        "random directions; empty for none.",
    )
    untrained: bool = setting(
        True, "Also probe a model of the same architecture with random weights: the control for what any model tells that sees the words."
    )


def _task(run: JobRun[ProbeSettings]) -> Task:
    from mechscope.data.labels import NEWSROOM, read_labelled
    from mechscope.probing import task_of

    settings, subject = run.settings, run.first
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which labelled texts need: load it with one")
    longest = min(settings.max_tokens, subject.anatomy.max_positions)
    # what is known of tokens is no column
    columns = None if settings.data == NEWSROOM or settings.labels.startswith("first letter") else [settings.labels]
    labelled = read_labelled(
        settings.data, subject.tokenizer, limit=settings.texts, max_tokens=longest, seed=settings.seed, columns=columns
    )
    return task_of(labelled, settings.labels, reading=settings.reading)


TASK: Input[Task] = Input(
    "labelled",
    _task,
    lambda task: [task.texts.hash, task.reading, list(task.classes), [own.tolist() for own in task.labels]],
    lambda task: {"data": {"source": task.texts.source, "texts": len(task.texts), "hash": task.texts.hash, "classes": list(task.classes)}},
)
"""Texts and what is to be told of them."""


def _check(run: JobRun[ProbeSettings]) -> None:
    settings = run.settings
    if settings.erase:
        from mechscope.probing import component_of

        component_of(run.first, settings.site, settings.erase)
    run[TASK].check(settings.folds)


def _probed(run: JobRun[ProbeSettings]) -> Tables:
    from mechscope.probing import probe, untrained
    from mechscope.probing.probe import UNTRAINED

    settings, loaded = run.settings, run[MODELS]
    models = dict(loaded)
    if settings.untrained:
        models[UNTRAINED] = untrained(run.first, seed=settings.seed)
    found = probe(
        models,
        run[TASK],
        site=settings.site,
        method=settings.method,
        folds=settings.folds,
        shuffles=settings.shuffles,
        execution=run.execution,
    )
    tables = {"probe_accuracy": found.accuracy, "probe_contrasts": found.contrasts}
    if found.directions is not None:
        tables["probe_directions"] = found.directions
    # a page says what was told of what
    unit = "tokens" if run[TASK].reading == "tokens" else "texts"
    said = {"task": settings.labels, "unit": unit, "method": settings.method}
    return {name: table.assign(**said)[[*said, *table]] for name, table in tables.items()}


def _erased(run: JobRun[ProbeSettings]) -> Tables:
    import pandas as pd

    from mechscope.probing import erasing

    settings, task = run.settings, run[TASK]
    if not settings.erase:
        return {}
    tables = [
        erasing(
            subject, task, settings.erase, site=settings.site, folds=settings.folds, draws=settings.shuffles, execution=run.execution
        ).assign(model=name)
        for name, subject in run[MODELS].items()
    ]
    table = pd.concat(tables, ignore_index=True).assign(task=settings.labels)
    return {"probe_erased": table[["task", "model", *(name for name in table if name not in ("task", "model"))]]}


ERASED = Stage(name="erase", work=_erased, hangs_on=("site", "folds", "shuffles", "erase", "seed"), inputs=(MODELS, TASK))


PROBED = Stage(name="probe", work=_probed, hangs_on=("site", "method", "folds", "shuffles", "untrained", "seed"), inputs=(MODELS, TASK))


def _title(names: Mapping[str, str]) -> str:
    if "tuned" in names:
        return f"What can be read off {names['base']}, before and after fine-tuning"
    return f"What can be read off {names['model']}"


JOB = Job(
    name="probe",
    help="What a probe reads off the activations of every layer, beside shuffled labels, a control task and random weights; before and after tuning.",
    panel="read",
    example="mechscope probe gpt2 --data labelled.jsonl --labels topic --out runs/probe",
    settings=ProbeSettings,
    arguments=("model", "tuned"),
    inputs=(MODELS, TASK),
    stages=(PROBED, ERASED),
    sections=("probe",),
    title=_title,
    check=_check,
)
