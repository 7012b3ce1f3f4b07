"""What edits do: to the fact, to other ways of asking it, to neighbours, to ordinary text; each alone, and one after another (Meng et al. 2022, section 3.2).

efficacy        the new target is likelier than the true one behind the prompt (`top`: every token of the new one is the likeliest)
paraphrase      the same behind other prompts for the fact: the share of them
neighbourhood   the true target is likelier than the new one behind prompts about others: the share of them
score           the harmonic mean of the three
kl              of what neighbours' prompts are followed by, before the edit to after it (nats)
loss            of ordinary text, after less before (nats per token)

Targets are compared by −log p, the mean over all their tokens. The fact is the unit: prompts of one fact are averaged first, and intervals are over facts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText
from mechscope.edit.delta import Delta, applied
from mechscope.edit.requests import Request, Requests, Spelled
from mechscope.edit.value import losses_of, precise
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import Execution, record
from mechscope.instrument.walk import run_backbone, unembed
from mechscope.stats.bootstrap import MeanInterval, mean_interval
from mechscope.stats.inference import MIN_TEXTS, share_interval, too_few
from mechscope.subject import Subject
from mechscope.subject.placement import sent

Make = Callable[[Subject, Request, Sequence[Request]], Delta]
"""Makes an edit of a model; the last are the facts that were edited before in it."""
SHARES = ("efficacy", "top", "paraphrase", "neighbourhood")
_TOKENS = 2048
_REPLICATES = 2000


def standing(subject: Subject, requests: Requests, *, execution: Execution = Execution()) -> pd.DataFrame:
    """Measure how facts stand in a model.

    Args:
        subject: The model, edited or not.
        requests: The facts.
        execution: Tokens of a batch (2,048 by default), progress.

    Returns:
        One row per fact: `id`, `efficacy`, `top`, `paraphrase`, `neighbourhood` (shares; NaN where the fact has nothing to compare), `difference` and
        `neighbour_difference` (probability of the new target less that of the true one, the geometric mean over tokens; the other way round of neighbours).

    Raises:
        DataError: The model has no tokenizer.
        RunError: Not even a single text fits into memory.
    """
    spelled, asked, pairs = _spelled(subject), [], []
    for place, request in enumerate(requests.requests):
        kinds = [("prompt", request.text), *(("paraphrase", text) for text in request.paraphrases)]
        kinds += [("neighbour", text) for text in request.neighbours] if request.true else []
        for kind, text in kinds:
            for which, target in (("new", request.new), ("true", request.true)):
                if target:
                    asked.append((place, kind, which))
                    pairs.append(spelled.asked(text, target, request.id))
    per_text = PerText(Pairs(tuple(pairs), requests.source))
    per_text.run(lambda batch: _told(subject, batch), execution, tokens=_TOKENS, label="facts")
    losses, top = per_text["loss"], per_text["top"]
    rows = []
    for place, request in enumerate(requests.requests):

        def of(kind: str, which: str, values: np.ndarray, place: int = place) -> np.ndarray:
            return np.array([value for value, at in zip(values, asked, strict=True) if at == (place, kind, which)])

        new, true = of("prompt", "new", losses), of("prompt", "true", losses)
        told_new, told_true = (of("paraphrase", which, losses) for which in ("new", "true"))
        kept_new, kept_true = (of("neighbour", which, losses) for which in ("new", "true"))
        rows.append(
            {
                "id": request.id,
                "efficacy": _mean(new < true) if len(true) else math.nan,
                "top": float(of("prompt", "new", top)[0]),
                "paraphrase": _mean(told_new < told_true) if len(told_true) else math.nan,
                "neighbourhood": _mean(kept_true < kept_new),
                "difference": _mean(np.exp(-new) - np.exp(-true)) if len(true) else math.nan,
                "neighbour_difference": _mean(np.exp(-kept_true) - np.exp(-kept_new)),
            }
        )
    return pd.DataFrame(rows)


def text_loss(subject: Subject, texts: Pairs, *, execution: Execution = Execution()) -> Float[np.ndarray, " text"]:
    """Return the loss of every text's target (nats per token); raises as `standing`."""
    per_text = PerText(texts)
    per_text.run(lambda batch: {"loss": _losses(subject, batch)}, execution, tokens=_TOKENS, label="texts")
    return per_text["loss"]


def edit_alone(
    subject: Subject, requests: Requests, make: Make, *, texts: Pairs, execution: Execution = Execution()
) -> tuple[pd.DataFrame, list[Delta]]:
    """Make every edit by itself, measure it, and undo it.

    Args:
        subject: The model, which is left as it was.
        requests: The facts.
        make: Makes an edit.
        texts: Ordinary texts that no statistics were taken from.
        execution: Tokens of a batch, progress.

    Returns:
        One row per fact: what `standing` gives, the same before the edit as `…_before`, `kl`, `loss`, `size` (‖Δ‖ / ‖W‖), `search` (nats: what was left of
        the loss that was searched) and `edited` (the new target is likelier than the true one, or where that is not known the likeliest); and the edits.

    Raises:
        MechscopeError: As making and measuring do.
    """
    inner = Execution(tokens_per_batch=execution.tokens_per_batch, seed=execution.seed)
    before = standing(subject, requests, execution=inner)
    ordinary = text_loss(subject, texts, execution=inner)
    rows: list[dict[str, Any]] = []
    deltas: list[Delta] = []
    for place, request in enumerate(requests.requests):
        one = Requests((request,), requests.source)
        said = _next_words(subject, request)
        delta = make(subject, request, ())
        with applied(subject, delta) as edited:
            now = standing(edited, one, execution=inner).iloc[0]
            loss = float((text_loss(edited, texts, execution=inner) - ordinary).mean())
            after = _next_words(edited, request)
        kl = math.nan if said is None or after is None else float((said.exp() * (said - after)).sum(-1).mean())
        old = {f"{name}_before": value for name, value in before.iloc[place].items() if name != "id"}
        reached = bool(now["efficacy"] == 1 if request.true else now["top"] == 1)
        extra = {"kl": kl, "loss": loss, "size": delta.size(subject), "search": float(delta.about["loss"]), "edited": reached}
        rows.append({**dict(now), **old, **extra})
        deltas.append(delta)
        execution.told("edits", place + 1, len(requests))
    return pd.DataFrame(rows), deltas


def edit_in_sequence(
    subject: Subject, requests: Requests, make: Make, *, counts: Iterable[int], texts: Pairs, execution: Execution = Execution()
) -> tuple[pd.DataFrame, list[Delta]]:
    """Make edits one upon the other, and measure after some of them what became of the first and of all so far.

    Args:
        subject: The model, which is left as it was.
        requests: The facts, in order.
        make: Makes an edit of the model with those before it.
        counts: After how many edits to measure; those beyond the number of facts are left out.
        texts: Ordinary texts.
        execution: Tokens of a batch, progress.

    Returns:
        One row per count: `edits`, `first` (efficacy of the first edit), `efficacy`, `paraphrase` and `neighbourhood` of all so far with their intervals
        over facts, `loss` (of ordinary text, after less before); and the edits.

    Raises:
        SettingsError: There is no such count.
        MechscopeError: As making and measuring do.
    """
    wanted = sorted({count for count in counts if 1 <= count <= len(requests)})
    if not wanted:
        raise SettingsError(f"edits in sequence are to be measured after none of 1 to {len(requests)} edits: name such a number")
    inner = Execution(tokens_per_batch=execution.tokens_per_batch, seed=execution.seed)
    ordinary = text_loss(subject, texts, execution=inner)
    rows: list[dict[str, Any]] = []
    deltas: list[Delta] = []
    for made, request in enumerate(requests.requests[: wanted[-1]], start=1):
        with applied(subject, *deltas) as edited:
            deltas.append(make(edited, request, requests.requests[: made - 1]))
        execution.told("sequence", made, wanted[-1])
        if made not in wanted:
            continue
        with applied(subject, *deltas) as edited:
            now = standing(edited, Requests(requests.requests[:made], requests.source), execution=inner)
            loss = float((text_loss(edited, texts, execution=inner) - ordinary).mean())
        row: dict[str, Any] = {"edits": made, "first": float(now["efficacy" if requests.requests[0].true else "top"].iloc[0])}
        for name in ("efficacy", "paraphrase", "neighbourhood"):
            row |= _with_interval(name, now[name].dropna().to_numpy(), execution.seed)
        rows.append({**row, "loss": loss})
    return pd.DataFrame(rows), deltas


def summary(edits: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return the means over facts with their intervals.

    Args:
        edits: From `edit_alone`.
        seed: Of the resampling.

    Returns:
        One row per measure: `measure`, `n` (facts), `before`, `value`, `low`, `high`, `withheld` (why there is no interval, or nothing).
    """
    rows = []
    for name in (*SHARES, "difference", "neighbour_difference", "kl", "loss", "size"):
        values = edits[name].dropna().to_numpy(dtype=float)
        old = edits[f"{name}_before"].dropna().mean() if f"{name}_before" in edits else math.nan
        found = _bounded(name, values, seed)
        reason = found.withheld.replace("documents", "edits") if len(values) else "no edit has what this compares"
        rows.append(
            {
                "measure": name,
                "n": len(values),
                "before": old,
                "value": found.value,
                "low": found.low,
                "high": found.high,
                "withheld": reason,
            }
        )
    rows.append(_score(edits, seed))
    return pd.DataFrame(rows)


def _score(edits: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Return the harmonic mean of the three shares; its interval is of resampled facts, by percentiles."""
    names = ["efficacy", "paraphrase", "neighbourhood"]
    values = edits[names].to_numpy(dtype=float)
    row = {"measure": "score", "n": len(edits), "before": math.nan, "value": math.nan, "low": math.nan, "high": math.nan, "withheld": ""}
    if np.isnan(values).all(0).any():
        return {**row, "withheld": "no edit has paraphrases and neighbours with targets to compare"}
    row |= {"value": _harmonic(np.nanmean(values, 0)), "before": _harmonic(edits[[f"{name}_before" for name in names]].mean().to_numpy())}
    if len(values) < MIN_TEXTS or np.isnan(values).any():
        return {
            **row,
            "withheld": too_few(len(values), "edits") if len(values) < MIN_TEXTS else "some edits lack paraphrases or neighbours",
        }
    counts = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), size=_REPLICATES) / len(values)
    drawn = [_harmonic(means) for means in counts @ values]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {**row, "low": float(low), "high": float(high)}


def _harmonic(values: np.ndarray) -> float:
    return 0.0 if (values <= 0).any() else float(len(values) / (1 / values).sum())


def _with_interval(name: str, values: np.ndarray, seed: int) -> dict[str, float]:
    found = _bounded(name, values, seed)
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _bounded(name: str, values: np.ndarray, seed: int) -> MeanInterval:
    """Return a mean with its interval, cut to what the measure can be; of hits and misses it is Wilson's, which has a width where all are alike."""
    found = mean_interval(values, seed=seed)
    if name in ("efficacy", "top") and len(values) >= MIN_TEXTS:
        low, high = share_interval(int(values.sum()), len(values))
        return MeanInterval(found.value, low, high, "")
    least, most = {"loss": (-math.inf, math.inf), "kl": (0.0, math.inf), "size": (0.0, math.inf)}.get(
        name, (0.0 if name in SHARES else -1.0, 1.0)
    )
    low, high = (float(np.clip(end, least, most)) for end in (found.low, found.high))
    return MeanInterval(found.value, low, high, found.withheld)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _spelled(subject: Subject) -> Spelled:
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which prompts need: load it with one")
    return Spelled(subject.tokenizer)


@torch.no_grad()
def _losses(subject: Subject, batch: PairBatch) -> np.ndarray:
    return losses_of(subject, batch).double().cpu().numpy()


@torch.no_grad()
def _told(subject: Subject, batch: PairBatch) -> dict[str, np.ndarray]:
    """Return the loss of each text's target, and whether each of its tokens is the likeliest."""
    last = subject.anatomy.n_layers - 1
    with record(subject, "residual", layers=[last]) as recording:
        run_backbone(subject, batch.clean, None if bool(batch.real.all()) else batch.real)
    hidden = recording["residual", last]
    rows, tokens = batch.positions("target")[:, 1:].nonzero(as_tuple=True)
    logits = precise(unembed(subject, hidden[sent(rows, hidden.device), sent(tokens, hidden.device)])).cpu()
    own = batch.clean[rows, tokens + 1]
    each = -logits.log_softmax(-1).gather(1, own[:, None])[:, 0].double()
    missed = torch.zeros(len(batch), dtype=torch.int64).index_add(0, rows, (logits.argmax(-1) != own).long())
    counts = torch.zeros(len(batch), dtype=torch.int64).index_add(0, rows, torch.ones_like(rows))
    loss = torch.zeros(len(batch), dtype=torch.float64).index_add(0, rows, each) / counts
    return {"loss": loss.numpy(), "top": (missed == 0).double().numpy()}


@torch.no_grad()
def _next_words(subject: Subject, request: Request) -> Tensor | None:
    """Return the log probabilities of what follows each neighbour's prompt; None where there are none."""
    spelled, rows, last = _spelled(subject), [], subject.anatomy.n_layers - 1
    for text in request.neighbours:
        pair = spelled.asked(text, request.new, request.id)
        ids = torch.tensor([pair.clean[: len(pair.clean) - len(spelled.target(request.new))]])
        with record(subject, "residual", layers=[last]) as recording:
            run_backbone(subject, ids, None)
        rows.append(precise(unembed(subject, recording["residual", last][0, -1])).double().log_softmax(-1).cpu())
    return torch.stack(rows) if rows else None
