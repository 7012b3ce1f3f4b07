"""Weights in a model's own vocabulary into a run folder: `mechscope weights`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from mechscope.data.pairs import from_examples
from mechscope.errors import ModelError
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.store.stage import Stage
from mechscope.studies import stages
from mechscope.studies.heads import read_documents, read_models, record_reading
from mechscope.studies.neuron_stage import neurons_stage
from mechscope.studies.reading_settings import WeightsSettings
from mechscope.studies.settings import VOLATILE, deciding
from mechscope.studies.summarization import Study, record_command
from mechscope.subject import Components, Pair, Subject, pair
from mechscope.weights import composition, head_changes, ov_tokens, qk_tokens, singular_tokens, weight_heads

log = logging.getLogger(__name__)

# singular vectors written out per head, and tokens at each end of each
_VECTORS, _ENDS = 3, 8
Model = Subject | Pair


def weights_run(
    settings: WeightsSettings, out: str | Path, *, command: Sequence[str] | None = None, progress: Progress | None = None
) -> Study:
    """Write out what heads and neurons attend to, copy and write, of one model, or of a base, a tuned model and their difference.

    Args:
        settings: Which models and heads.
        out: The run folder.
        command: The command line that asked for it, for the report.
        progress: Called with a label, what is done and how much there is.

    Raises:
        MechscopeError: Models, documents or settings cannot be used, or the folder belongs to another run.
    """
    with RunFolder.open(out, asdict(settings), kind="weights", volatile=VOLATILE) as run:
        record_command(run, command)
        subjects = read_models(settings)
        first = next(iter(subjects.values()))
        read = None if settings.data is None else read_documents(settings, settings.data, settings.documents, first)
        record_reading(run, subjects, settings, read)
        models: dict[str, Model] = dict(subjects)
        if settings.tuned is not None:
            models["change"] = pair(subjects["base"], subjects["tuned"])
        inputs = {"models": {label: subject.fingerprint for label, subject in subjects.items()}, **deciding(settings)}
        with run.stage("weights", inputs) as stage:
            if not stage.done:
                _write(stage, models, settings, progress)
        texts = None if read is None else from_examples(read.encoded, read.corpus.source)
        neurons_stage(run, subjects, texts, settings, progress=progress)
        return Study.of(run, stages.report_stage(run))


def _write(stage: Stage, models: dict[str, Model], settings: WeightsSettings, progress: Progress | None) -> None:
    """Write the tables `weight_heads`, `weight_changes`, `weight_tokens`, `weight_singular` and `composition`."""
    subjects = {label: model for label, model in models.items() if isinstance(model, Subject)}
    described = [weight_heads(one, seed=settings.seed, progress=progress).assign(model=label) for label, one in subjects.items()]
    stage.write_table("weight_heads", pd.concat(described, ignore_index=True))
    changed = None
    if isinstance(both := models.get("change"), Pair):
        changed = head_changes(both, offset=settings.offset)
        stage.write_table("weight_changes", changed)
    heads = _chosen(settings, described[-1], changed)
    k = settings.top
    tokens = [ov_tokens(one, heads=heads, k=k, progress=progress).assign(model=label, matrix="ov") for label, one in models.items()]
    singular = [singular_tokens(one, matrix="ov", heads=heads, n=_VECTORS, k=_ENDS).assign(model=label) for label, one in models.items()]
    kinds: tuple[Any, ...] = ("q", "k", "v")
    try:
        for label, one in models.items():
            attended = qk_tokens(one, heads=heads, k=k, offset=settings.offset, progress=progress)
            tokens.append(attended.rename(columns={"query": "source", "key": "target"}).assign(model=label, matrix="qk"))
            vectors = singular_tokens(one, matrix="qk", heads=heads, n=_VECTORS, k=_ENDS, offset=settings.offset)
            singular.append(vectors.assign(model=label))
    except ModelError as error:
        log.warning("what heads attend to is left out: %s", error)
        kinds = ("v",)
    columns = ["model", "matrix", "component", "layer", "head", "sign", "place", "source", "target", "value"]
    stage.write_table("weight_tokens", pd.concat(tokens, ignore_index=True)[columns])
    stage.write_table("weight_singular", pd.concat(singular, ignore_index=True))
    composed = [
        composition(one, kinds=kinds, offset=settings.offset, progress=progress)
        .rename(columns={"from": "source", "to": "target"})
        .assign(model=label)
        for label, one in subjects.items()
    ]
    stage.write_table("composition", pd.concat(composed, ignore_index=True))


def _chosen(settings: WeightsSettings, described: pd.DataFrame, changed: pd.DataFrame | None) -> Components:
    """Return the heads to write out: those named, else those whose OV changed most, or that copy or suppress most."""
    if settings.components:
        return Components.parse(settings.components)
    if changed is not None:
        names = changed.head(settings.heads)["component"]
    else:
        most = described.assign(size=described[["copied", "suppressed"]].max(axis=1)).sort_values("size", ascending=False, kind="stable")
        names = most.head(settings.heads)["component"]
    return Components.parse(",".join(names))
