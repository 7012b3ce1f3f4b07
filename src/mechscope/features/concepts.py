"""What latents stand for, on texts of which something is known: sparse probing, SCR, TPP (`mechscope.features.probes`) and absorption, in one pass.

Dictionaries measured together, such as one and its controls, see the same texts and tokens (`mechscope.features.gathered`), and probes of activations are
fitted once for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd

from mechscope.data.labels import Labelled
from mechscope.data.splits import judged_on
from mechscope.errors import DataError, SettingsError
from mechscope.features.absorption import Tokens, absorption
from mechscope.features.dictionary import Dictionary
from mechscope.features.gathered import gather
from mechscope.features.probes import (
    Fit,
    Pooled,
    Probes,
    Writes,
    balanced,
    balanced_of,
    dense_probing,
    mean_of,
    sparse_probing,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from mechscope.features.rows import Models, reader_of
from mechscope.instrument import Execution
from mechscope.settings.features import ConceptSettings, TokenSettings
from mechscope.stats.shares import Share, share_of

COLUMNS = ("score", "concept", "count", "n", "value", "low", "high", "withheld", "note")
# texts of a class that is learned from, and that is judged on; tokens likewise
_TEXTS, _JUDGED, _TOKENS = 10, 6, 40
# classes of an attribute, and concepts of tokens, at most
_CLASSES, _CONCEPTS = 8, 12


def concept_scores(
    models: Models,
    dictionaries: Mapping[str, Dictionary],
    labelled: Labelled,
    *,
    settings: ConceptSettings | None = None,
    tokens: TokenSettings | None = None,
    other_model: bool = False,
    execution: Execution = Execution(),
) -> dict[str, pd.DataFrame]:
    """Score what the latents of dictionaries of the same places stand for.

    Args:
        models: The model, or several by name.
        dictionaries: By name, such as one and its controls; the tokens left out are those of the first.
        labelled: Texts and what is known of them.
        settings: How many latents probes read and lose, and which share of the texts is judged on.
        tokens: Which tokens are left out; None for those that training left out, or the defaults where that is not known.
        other_model: Allow dictionaries of a model with other weights.
        execution: Tokens of a batch, seed (of the texts that are judged on and the tokens that are held), progress.

    Returns:
        By dictionary, one row per score and concept: `score`, `concept` (`kind=fire`; an attribute for the mean over its classes; `kind despite day` for SCR),
        `count` (latents read or taken out), `n` (held-out texts), `value`, `low`, `high` (95 %), `withheld`, `note`.

    Raises:
        SettingsError: Dictionaries read or write different places.
        DataError: The texts do not suffice for any score.
        MechscopeError: A dictionary or the texts do not fit.
    """
    given: dict[str, Any] = {"settings": settings, "tokens": tokens, "other_model": other_model, "execution": execution}
    return concept_scores_of_sets(models, {"": dictionaries}, labelled, **given)[""]


def concept_scores_of_sets(
    models: Models,
    sets: Mapping[str, Mapping[str, Dictionary]],
    labelled: Labelled,
    *,
    settings: ConceptSettings | None = None,
    tokens: TokenSettings | None = None,
    other_model: bool = False,
    execution: Execution = Execution(),
) -> dict[str, dict[str, pd.DataFrame]]:
    """Score sets of dictionaries, each of the same places, as `concept_scores` does each alone: the models are read once for all sets.

    Args:
        models: The model, or several by name.
        sets: By name, dictionaries by name.
        labelled: As of `concept_scores`, like all that follows.
        settings: How many latents probes read and lose, and which share of the texts is judged on.
        tokens: Which tokens are left out.
        other_model: Allow dictionaries of a model with other weights.
        execution: Tokens of a batch, seed, progress.

    Returns:
        By set, what `concept_scores` returns.

    Raises:
        MechscopeError: As of `concept_scores`.
    """
    settings = settings or ConceptSettings()
    readers = {}
    for name, dictionaries in sets.items():
        first = next(iter(dictionaries.values()))
        if any((each.layout.inputs, each.layout.outputs) != (first.layout.inputs, first.layout.outputs) for each in dictionaries.values()):
            raise SettingsError("dictionaries that are scored together must read and write the same places: score them one by one")
        for each in dictionaries.values():
            each.check(models, other_model=other_model)
        readers[name] = reader_of(models, first, labelled.texts, tokens, other_model=other_model, execution=execution)
    split, fit = _Split.of(labelled, settings, execution.seed), Probes().fit
    gathered = gather(readers, sets, labelled.texts, held=settings.tokens_held, execution=execution)
    found = {}
    for name, of_set in gathered.items():
        made = {each: _scores(pooled, held, labelled, split, settings, fit) for each, (pooled, held) in of_set.items()}
        if not any(map(len, made.values())):
            raise DataError(
                f"{len(labelled.texts)} texts of {labelled.texts.source} do not suffice for any score: of each class {_TEXTS} texts to learn from and "
                f"{_JUDGED} to judge on are needed"
            )
        found[name] = {each: pd.DataFrame(rows, columns=list(COLUMNS)) for each, rows in made.items()}
    return found


@dataclass(frozen=True)
class _Split:
    """Places of the texts that are learned from, and of those that are judged on."""

    learned: np.ndarray
    judged: np.ndarray

    @classmethod
    def of(cls, labelled: Labelled, settings: ConceptSettings, seed: int) -> _Split:
        judged = judged_on([pair.clean for pair in labelled.texts], settings.judged_share, seed, source=labelled.texts.source)
        return cls(np.flatnonzero(~judged), np.flatnonzero(judged))


def _scores(pooled: Pooled, held: Tokens, labelled: Labelled, split: _Split, settings: ConceptSettings, fit: Fit) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    train, test = pooled.rows(split.learned), pooled.rows(split.judged)
    classes = {name: _classes_of(np.array(values), split) for name, values in labelled.attributes.items()}
    for name, found in classes.items():
        rows += _probed(name, found, np.array(labelled.attributes[name]), train, test, split, settings, fit)
    for wanted, other in permutations([name for name, found in classes.items() if len(found) > 1], 2):
        rows += _removed(wanted, other, classes, labelled, train, test, split, settings, fit)
    return rows + _absorbed(held, pooled.writes, labelled, split, fit)


def _classes_of(values: np.ndarray, split: _Split) -> list[str]:
    """Return the most frequent values of an attribute that are frequent enough."""
    names, counts = np.unique(values, return_counts=True)
    enough = [
        (count, str(name))
        for name, count in zip(names, counts, strict=True)
        if min((values[split.learned] == name).sum(), (values[split.learned] != name).sum()) >= _TEXTS
        and min((values[split.judged] == name).sum(), (values[split.judged] != name).sum()) >= _JUDGED
    ]
    return [name for _, name in sorted(enough, key=lambda pair: (-pair[0], pair[1]))[:_CLASSES]]


def _probed(
    name: str, classes: Sequence[str], values: np.ndarray, train: Pooled, test: Pooled, split: _Split, settings: ConceptSettings, fit: Fit
) -> list[tuple[Any, ...]]:
    # of two classes the second is the first's absence
    told = classes[:1] if len(classes) == 2 and len(np.unique(values)) == 2 else classes
    if not told:
        return []
    y, y_test = (np.stack([values[at] == each for each in told], axis=1) for at in (split.learned, split.judged))
    rows = []
    for k in (*settings.probe_latents, 0):
        every = [
            sparse_probing(train, test, own, judged, k) if k else dense_probing(train, test, own, judged, fit=fit)
            for own, judged in zip(y.T, y_test.T, strict=True)
        ]
        score = "sparse probing" if k else "probe of the activations"
        rows += [
            _row(score, f"{name}={each}", k or np.nan, balanced_of(of, own)) for each, of, own in zip(told, every, y_test.T, strict=True)
        ]
        if len(told) > 1:
            mean = mean_of(np.mean([balanced(of, own) for of, own in zip(every, y_test.T, strict=True)], axis=0))
            rows.append(_row(score, name, k or np.nan, mean, note=f"mean over {len(told)} classes"))
    if len(told) > 2:
        found = targeted_probe_perturbation(train, test, y, y_test, settings.removed_latents, fit=fit)
        rows += [_row("TPP", name, count, share, note=f"mean over {len(told)} classes") for count, share in found.items()]
    return rows


def _removed(
    wanted: str,
    other: str,
    classes: Mapping[str, list[str]],
    labelled: Labelled,
    train: Pooled,
    test: Pooled,
    split: _Split,
    settings: ConceptSettings,
    fit: Fit,
) -> list[tuple[Any, ...]]:
    pairs = {name: classes[name][:2] for name in (wanted, other)}
    values = {name: np.array(labelled.attributes[name]) for name in pairs}
    inside = np.all([np.isin(values[name], pair) for name, pair in pairs.items()], axis=0)
    learned, judged = (np.flatnonzero(inside[at]) for at in (split.learned, split.judged))
    flags = [
        [values[name][at][rows] == pairs[name][0] for name in (wanted, other)]
        for at, rows in ((split.learned, learned), (split.judged, judged))
    ]
    for (one, two), fewest in zip(flags, (_TEXTS, _JUDGED), strict=True):
        if min(int((a & b).sum()) for a in (one, ~one) for b in (two, ~two)) < fewest // 2:
            return []
    (one, two), (one_test, two_test) = flags
    flags_of = (one, two, one_test, two_test)
    found = spurious_correlation_removal(train.rows(learned), test.rows(judged), *flags_of, settings.removed_latents, fit=fit)
    note = f"{pairs[wanted][0]} or {pairs[wanted][1]}, where {pairs[other][0]} or {pairs[other][1]} went with it"
    return [_row("SCR", f"{wanted} despite {other}", count, share, note=note) for count, share in found.items()]


def _absorbed(held: Tokens, writes: Writes, labelled: Labelled, split: _Split, fit: Fit) -> list[tuple[Any, ...]]:
    longest = max(len(pair.clean) for pair in labelled.texts)
    at, text = held.text, held.text // longest
    own = Tokens(held.x, held.codes, text)
    learned, judged = np.isin(text, split.learned), np.isin(text, split.judged)
    candidates = []
    for concept, positions in labelled.tokens.items():
        places = [number * longest + position for number, row in enumerate(positions) for position in row]
        y = np.isin(at, places)
        fewest = min(int((y & part).sum()) for part in (learned, judged))
        if fewest >= _TOKENS and int((~y & learned).sum()) >= _TOKENS:
            candidates.append((concept, y, fewest))
    # facts first, then the most frequent letters
    candidates.sort(key=lambda each: (each[0].startswith("first letter"), -each[2], each[0]))
    rows: list[tuple[Any, ...]] = []
    train, test = own.rows(learned), own.rows(judged)
    for concept, y, _ in candidates[:_CONCEPTS]:
        found = absorption(train, test, y[learned], y[judged], writes, fit=fit)
        full, fraction = (_by_text(found.text, values) for values in (found.full, found.fraction))
        note = f"{len(found.text):,} tokens; main latents {', '.join(map(str, found.main))}"
        rows += [_row("absorption, full", concept, len(found.main), full, note=note)]
        rows += [_row("absorption, fraction", concept, len(found.main), fraction, note=note)]
    return rows


def _by_text(text: np.ndarray, values: np.ndarray) -> Share:
    """Return the mean over tokens, with the text as unit."""
    names, back = np.unique(text, return_inverse=True)
    sums = np.bincount(back, weights=values.astype(float), minlength=len(names))
    counts = np.bincount(back, minlength=len(names)).astype(float)
    return share_of(sums, counts, absent="no token has the concept")


def _row(score: str, concept: str, count: float, share: Share, *, note: str = "") -> tuple[Any, ...]:
    low, high = share.low, share.high
    if score not in ("SCR", "TPP"):
        # accuracies and shares of tokens lie between none and all
        low, high = (float(end) for end in np.clip([low, high], 0.0, 1.0))
    return (score, concept, count, share.n, share.value, low, high, share.withheld, note)
