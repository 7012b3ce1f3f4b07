"""What layers say of the next token: lens by layer, some texts token by token, and direct logit attribution; of one model or of two, compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from mechscope.choices import LensNorm, LensSite, LogitMetric
from mechscope.data.pairs import Pairs
from mechscope.instrument.execution import Execution
from mechscope.lens import compare_lenses, logit_lens
from mechscope.lens.attribution import attribute_logits, compare_attributions
from mechscope.lens.translators import Translators
from mechscope.subject import Subject


@dataclass(frozen=True)
class LensRequest:
    """What is read, and how.

    Attributes:
        texts: The texts; their next tokens are what is predicted, those of the target span where they have one.
        sites: Where in the model.
        norm: The final norm: `applied` or `frozen`.
        top: Tokens kept per place.
        grid_texts: Texts kept token by token.
        attribution: Metric of the direct logit attribution; None to leave it out.
    """

    texts: Pairs
    sites: tuple[LensSite, ...] = ("residual",)
    norm: LensNorm = "applied"
    top: int = 5
    grid_texts: int = 1
    attribution: LogitMetric | None = None


def lens_tables(
    subjects: Mapping[str, Subject],
    request: LensRequest,
    *,
    translators: Mapping[str, Translators] | None = None,
    execution: Execution = Execution(),
) -> dict[str, pd.DataFrame]:
    """Read every layer of some models as if it were the last.

    Args:
        subjects: Models by label.
        request: Texts and places.
        translators: A tuned lens by label, which is read with too.
        execution: Tokens of a batch (2,048 by default), progress.

    Returns:
        The tables `lens_summary`, `lens_grid`, `lens_tokens`, `logit_attribution`, and of a base and a tuned model `lens_change` and
        `logit_attribution_change`.
    """
    execution = replace(execution, tokens_per_batch=execution.tokens(2048))
    parts = [_through(subjects, request, "logit", None, execution)]
    if translators is not None:
        parts.append(_through(subjects, replace(request, sites=("residual",)), "tuned", translators, execution))
    tables = {name: pd.concat([part[name] for part in parts], ignore_index=True) for name in parts[0]}
    tables["lens_tokens"] = _tokens(next(iter(subjects.values())), request.texts.first(request.grid_texts))
    return {**tables, **_attributed(subjects, request, execution)}


def _through(
    subjects: Mapping[str, Subject], request: LensRequest, lens: str, translators: Mapping[str, Translators] | None, execution: Execution
) -> dict[str, pd.DataFrame]:
    """Read all models through one kind of lens: tables by name."""
    options: dict[str, Any] = {"norm": request.norm, "execution": execution}
    readings, summaries, grids = {}, [], []
    for label, subject in subjects.items():
        own = None if translators is None else translators[label]
        readings[label] = logit_lens(subject, request.texts, sites=request.sites, k=1, translators=own, **options)
        # the grid is of a few texts and shows more tokens
        shown = logit_lens(subject, request.texts.first(request.grid_texts), k=request.top, translators=own, **options)
        summaries.append(readings[label].summary(rows="target").assign(model=label, lens=lens))
        grids.append(shown.table().assign(model=label, lens=lens))
    tables = {"lens_summary": pd.concat(summaries, ignore_index=True), "lens_grid": pd.concat(grids, ignore_index=True)}
    if {"base", "tuned"} <= readings.keys():
        tables["lens_change"] = compare_lenses(readings["base"], readings["tuned"], rows="target").assign(lens=lens)
    return tables


def _attributed(subjects: Mapping[str, Subject], request: LensRequest, execution: Execution) -> dict[str, pd.DataFrame]:
    """Attribute the answer, or the summary, to the parts of all models: tables by name."""
    if request.attribution is None:
        return {}
    by_model = {
        label: attribute_logits(subject, request.texts, metric=request.attribution, execution=execution)
        for label, subject in subjects.items()
    }
    tables = {"logit_attribution": pd.concat([one.table().assign(model=label) for label, one in by_model.items()], ignore_index=True)}
    if {"base", "tuned"} <= by_model.keys():
        tables["logit_attribution_change"] = compare_attributions(by_model["base"], by_model["tuned"])
    return tables


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
