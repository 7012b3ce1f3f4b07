"""What layers say of the next token, as stages of a run: lens by layer, some texts token by token, and direct logit attribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from mechscope.data.pairs import Pairs
from mechscope.lens import compare, read
from mechscope.lens.attribution import attribute_logits, compare_attributions
from mechscope.lens.training import LensSettings, train_tuned_lens
from mechscope.lens.translators import Translators
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.studies.settings import deciding
from mechscope.subject import Subject


@dataclass(frozen=True)
class Asked:
    """What is read, and how.

    Attributes:
        texts: The texts; their next tokens are what is predicted, those of the target span where they have one.
        sites: Where in the model.
        norm: The final norm: `applied` or `frozen`.
        top: Tokens kept per place.
        grid_texts: Texts kept token by token.
        attribution: Metric of the direct logit attribution; None to leave it out.
        tokens_per_batch: Tokens of a batch.
    """

    texts: Pairs
    sites: tuple[str, ...] = ("residual",)
    norm: Literal["applied", "frozen"] = "applied"
    top: int = 5
    grid_texts: int = 1
    attribution: str | None = None
    tokens_per_batch: int = 2048

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the result, for a stage."""
        return {**deciding(self), "sites": list(self.sites), "texts": self.texts.hash}


def translators_stage(
    run: RunFolder, subjects: Mapping[str, Subject], training: Pairs, *, steps: int, seed: int, progress: Progress | None
) -> dict[str, Translators]:
    """Train a tuned lens for every model, into `lenses/<label>.safetensors` of the run, with the table `lens_training`.

    Args:
        run: The run.
        subjects: Models by label.
        training: Texts to learn from.
        steps: Training steps.
        seed: Seed of the training.
        progress: Called with what is being done.
    """
    inputs = {
        "models": {label: subject.fingerprint for label, subject in subjects.items()},
        "texts": training.hash,
        "steps": steps,
        "seed": seed,
    }
    files = {label: run.path / "lenses" / f"{label}.safetensors" for label in subjects}
    with run.stage("tuned-lens", inputs) as stage:
        if not stage.done:
            curves = []
            for label, subject in subjects.items():
                trained = train_tuned_lens(subject, training, settings=LensSettings(steps=steps, seed=seed), progress=progress)
                trained.translators.save(files[label])
                stage.add(files[label])
                curves.append(trained.curve.assign(model=label))
            stage.write_table("lens_training", pd.concat(curves, ignore_index=True))
    return {label: Translators.load(files[label], subject) for label, subject in subjects.items()}


def lens_stage(
    run: RunFolder,
    subjects: Mapping[str, Subject],
    asked: Asked,
    *,
    translators: Mapping[str, Translators] | None = None,
    progress: Progress | None,
) -> None:
    """Write the tables `lens_summary`, `lens_grid`, `lens_tokens`, of two models `lens_change`, and the logit attribution.

    Args:
        run: The run.
        subjects: Models by label.
        asked: What is read.
        translators: A tuned lens by label, which is read with too.
        progress: Called with what is being done.
    """
    inputs = {
        "models": {label: [subject.fingerprint, str(subject.dtype)] for label, subject in subjects.items()},
        "translators": None if translators is None else run.manifest["stages"]["tuned-lens"]["outputs"],
        **asked.inputs,
    }
    with run.stage("lens", inputs) as stage:
        if stage.done:
            return
        parts = [_through(subjects, asked, "logit", None, progress)]
        if translators is not None:
            parts.append(_through(subjects, replace(asked, sites=("residual",)), "tuned", translators, progress))
        for name in ("lens_summary", "lens_grid", "lens_change"):
            found = [part[name] for part in parts if name in part]
            if found:
                stage.write_table(name, pd.concat(found, ignore_index=True))
        stage.write_table("lens_tokens", _tokens(next(iter(subjects.values())), asked.texts.first(asked.grid_texts)))
        for name, table in _attributed(subjects, asked, progress).items():
            stage.write_table(name, table)


def _through(
    subjects: Mapping[str, Subject], asked: Asked, lens: str, translators: Mapping[str, Translators] | None, progress: Progress | None
) -> dict[str, pd.DataFrame]:
    """Read all models through one kind of lens: tables by name."""
    options: dict[str, Any] = {"norm": asked.norm, "tokens_per_batch": asked.tokens_per_batch, "progress": progress}
    readings, summaries, grids = {}, [], []
    for label, subject in subjects.items():
        own = None if translators is None else translators[label]
        readings[label] = read(subject, asked.texts, sites=asked.sites, k=1, translators=own, **options)
        # the grid is of a few texts and shows more tokens
        shown = read(subject, asked.texts.first(asked.grid_texts), k=asked.top, translators=own, **options)
        summaries.append(readings[label].summary(rows="target").assign(model=label, lens=lens))
        grids.append(shown.table().assign(model=label, lens=lens))
    found = {"lens_summary": pd.concat(summaries, ignore_index=True), "lens_grid": pd.concat(grids, ignore_index=True)}
    if {"base", "tuned"} <= readings.keys():
        found["lens_change"] = compare(readings["base"], readings["tuned"], rows="target").assign(lens=lens)
    return found


def _attributed(subjects: Mapping[str, Subject], asked: Asked, progress: Progress | None) -> dict[str, pd.DataFrame]:
    """Attribute the answer, or the summary, to the parts of all models: tables by name."""
    if asked.attribution is None:
        return {}
    options: dict[str, Any] = {"metric": asked.attribution, "tokens_per_batch": asked.tokens_per_batch, "progress": progress}
    by_model = {label: attribute_logits(subject, asked.texts, **options) for label, subject in subjects.items()}
    tables = [one.table().assign(model=label) for label, one in by_model.items()]
    found = {"logit_attribution": pd.concat(tables, ignore_index=True)}
    if {"base", "tuned"} <= by_model.keys():
        found["logit_attribution_change"] = compare_attributions(by_model["base"], by_model["tuned"])
    return found


def _tokens(subject: Subject, texts: Pairs) -> pd.DataFrame:
    """Return the texts' tokens: `text`, `position`, `token`, `target` (the next token) and `segment`."""
    tables = []
    for pair in texts:
        tokens = subject.spelling.tokens(pair.clean)
        spans = {name: where for name, where in pair.segments.items() if name in ("document", "summary")}
        segments = [
            next((name for name, where in spans.items() if any(start <= at < stop for start, stop in where)), "text")
            for at in range(len(tokens))
        ]
        tables.append(
            pd.DataFrame(
                {"text": pair.id, "position": range(len(tokens)), "token": tokens, "target": [*tokens[1:], ""], "segment": segments}
            )
        )
    return pd.concat(tables, ignore_index=True)
