"""Explaining many units and scoring the explanations, beside the control: every unit's windows judged by the explanation of another unit.

What is finished of a unit is kept where the caller wants it, so that an endpoint that goes down loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import pandas as pd

from mechscope.choices import ExplanationScorer
from mechscope.errors import SettingsError
from mechscope.features.explain.evidence import Evidence, Explainer, Explanation
from mechscope.features.explain.scoring import CHANCE, Score, score
from mechscope.instrument import Execution
from mechscope.stats.inference import estimate
from mechscope.stats.skewness import ThirdMoments

CONTROL = "shuffled explanations"
"""The control: each unit's windows are judged by the explanation of another one."""
# tokens of a unit's largest activations that are listed
_STRONGEST = 8
# of a unit's name what kind of unit it is
_KINDS = {"n": "neurons", "h": "heads", "f": "latents"}


@dataclass(frozen=True)
class Explained:
    """Explanations and their scores.

    Attributes:
        explanations: One row per unit: `dictionary` (of a latent, where it was named), `component`, `kind` ("latents", "neurons", "heads"), `explainer`,
            `explanation`, `active` (tokens), `density`, `train` and `test` (windows in which it is active), `strongest` (a list: the tokens of its largest
            activations in the windows that explain it, each once).
        scores: One row per unit, scorer and control: `dictionary`, `component`, `kind`, `explainer`, `scorer`, `control` (empty, or "shuffled explanations"),
            `n` (answers asked for), `score` with `low`, `high`, `chance`, `unreadable` (share of the answers), `withheld`.
        summary: One row per dictionary, kind, scorer and control: `dictionary`, `kind`, `explainer`, `scorer`, `control`, `n` (units), `score` (mean over
            units) with `low` and `high`, `chance`, `unreadable`, `withheld`.
        sent: One row per question to a language model: `dictionary`, `component`, `control`, `purpose`, `text`, `answer`.
    """

    explanations: pd.DataFrame
    scores: pd.DataFrame
    summary: pd.DataFrame
    sent: pd.DataFrame


def kind_of(unit: str) -> str:
    """Return what kind of unit a text form names: latents, neurons or heads; `KeyError` where it is none."""
    return _KINDS[unit.rpartition(".")[2][0]]


def scorers_of(text: str) -> tuple[ExplanationScorer, ...]:
    """Read scorers joined by commas; `SettingsError` where one is not known or none is named."""
    named = [each.strip() for each in text.split(",") if each.strip()]
    known: tuple[ExplanationScorer, ...] = get_args(ExplanationScorer)
    for each in named:
        if each not in known:
            raise SettingsError(f"scorer {each!r} is not known: there are {', '.join(known)}")
    if not named:
        raise SettingsError(f"no scorer is named: name some of {', '.join(known)}")
    return tuple(each for each in known if each in named)


def explain(
    evidence: Sequence[Evidence],
    explainer: Explainer,
    *,
    scorers: Sequence[ExplanationScorer] = ("detection", "fuzzing", "simulation", "intruder"),
    kept: MutableMapping[str, Any] | None = None,
    execution: Execution = Execution(),
) -> Explained:
    """Explain units and score the explanations, and each unit's windows by the explanation of another unit of its kind, a latent's of its dictionary.

    Args:
        evidence: The units' windows (`gather`).
        explainer: Who explains and judges.
        scorers: By what explanations are scored.
        kept: What was finished before, by key, JSON-able; what is finished is put into it at once.
        execution: Seed, progress.

    Raises:
        MechscopeError: The explainer cannot be asked; `kept` then holds all that was finished.
    """
    kept = {} if kept is None else kept
    total = 3 * len(evidence)
    explanations: dict[tuple[str, str], Explanation] = {}
    rows, sent = list[dict[str, Any]](), list[dict[str, Any]]()

    def asked(each: Evidence, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what was finished before, or is now."""
        name = " ".join([*filter(None, each.key), what])
        if name not in kept:
            kept[name] = work() | {"sent": _sent(explainer)}
        found: dict[str, Any] = kept[name]
        control = CONTROL if what == CONTROL else ""
        sent.extend({**_which(each), "control": control, **one} for one in found["sent"])
        return found

    def done(step: int, at: int) -> None:
        execution.told("explanations", step * len(evidence) + at + 1, total)

    for at, each in enumerate(evidence):
        explained = asked(each, "explanation", partial(_explained, explainer, each))
        explanations[each.key] = Explanation(explained["text"], {tuple(gram): value for gram, value in explained["grams"]})
        done(0, at)
    others = _others(evidence, execution.seed)
    for step, control in enumerate(("", CONTROL), start=1):
        for at, each in enumerate(evidence):
            judge = each.key if not control else others.get(each.key)
            # where no explanation is looked at another unit's would change nothing
            wanted = [one for one in scorers if one != "intruder" or not control or explainer.intrudes_by_explanation]
            if judge is not None and wanted:
                scored = asked(each, control or "scores", partial(_scored, explainer, explanations[judge], each, wanted, execution.seed))
                rows += [_row(each, explainer, control, Score(**one)) for one in scored["scores"]]
            done(step, at)
    scores = pd.DataFrame(rows)
    return Explained(
        pd.DataFrame([_told(each, explainer, explanations[each.key]) for each in evidence]),
        scores,
        _summary(scores) if len(scores) else pd.DataFrame(),
        pd.DataFrame(sent, columns=["dictionary", "component", "control", "purpose", "text", "answer"]),
    )


def _others(evidence: Sequence[Evidence], seed: int) -> dict[tuple[str, str], tuple[str, str]]:
    """Return for each unit another one of its kind and dictionary, each once; none where it is the only one."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    random = np.random.default_rng(seed)
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for each in evidence:
        # another dictionary may have the same latent again, whose explanation would be no other
        groups.setdefault((each.dictionary, kind_of(each.unit)), []).append(each.key)
    for units in groups.values():
        order = random.permutation(len(units))
        if len(units) > 1:
            found |= {units[one]: units[other] for one, other in zip(order, np.roll(order, 1), strict=True)}
    return found


def _explained(explainer: Explainer, each: Evidence) -> dict[str, Any]:
    found = explainer.explain(each)
    return {"text": found.text, "grams": [[list(gram), value] for gram, value in found.grams.items()]}


def _scored(
    explainer: Explainer, explanation: Explanation, each: Evidence, wanted: Sequence[ExplanationScorer], seed: int
) -> dict[str, Any]:
    return {"scores": [asdict(one) for one in score(explainer, explanation, each, wanted, seed=seed)]}


def _which(each: Evidence) -> dict[str, Any]:
    return {"dictionary": each.dictionary, "component": each.unit}


def _sent(explainer: Explainer) -> list[dict[str, str]]:
    return [
        {
            "purpose": each.purpose,
            "text": "\n\n".join(f"{message['role']}: {message['content']}" for message in each.messages),
            "answer": each.answer,
        }
        for each in explainer.taken()
    ]


def _told(each: Evidence, explainer: Explainer, explanation: Explanation) -> dict[str, Any]:
    return {
        **_which(each),
        "kind": kind_of(each.unit),
        "explainer": explainer.name,
        "explanation": explanation.text,
        "active": each.active,
        "density": each.active / each.tokens,
        "train": len(each.train),
        "test": len(each.test),
        "strongest": list(dict.fromkeys(window.peak for window in sorted(each.train, key=lambda window: -max(window.values))))[:_STRONGEST],
    }


def _row(each: Evidence, explainer: Explainer, control: str, scored: Score) -> dict[str, Any]:
    return {
        **_which(each),
        "kind": kind_of(each.unit),
        "explainer": explainer.name,
        "scorer": scored.scorer,
        "control": control,
        "n": scored.n,
        "score": scored.value,
        "low": scored.low,
        "high": scored.high,
        "chance": CHANCE[scored.scorer],
        "unreadable": scored.unreadable,
        "withheld": scored.withheld,
    }


def _summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Average scores over units, with intervals over units."""
    rows = []
    for (dictionary, kind, explainer, scorer, control), own in scores.groupby(
        ["dictionary", "kind", "explainer", "scorer", "control"], sort=False
    ):
        given = own["score"].dropna().to_numpy(dtype=float)
        moments = ThirdMoments(())
        moments.update_many(given)
        mean = estimate(moments)
        rows.append(
            {
                "dictionary": dictionary,
                "kind": kind,
                "explainer": explainer,
                "scorer": scorer,
                "control": control,
                "n": len(given),
                "score": float(mean.mean) if len(given) else float("nan"),
                "low": float(mean.low),
                "high": float(mean.high),
                "chance": own["chance"].iloc[0],
                "unreadable": own["unreadable"].mean(),
                "withheld": "" if len(given) else str(own["withheld"].iloc[0]),
            }
        )
    return pd.DataFrame(rows)
