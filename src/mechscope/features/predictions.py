"""What a model predicts through dictionaries: of its own run, with the reconstruction in the place of what it holds there, and with zero or the mean.

The model's own run and the ablated ones are made once for all dictionaries of the same places that are measured together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText
from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.places import Place
from mechscope.features.rows import TOKENS_PER_BATCH
from mechscope.features.spliced import splice
from mechscope.instrument import Edit, Execution, Walk, intervene, unembed
from mechscope.instrument.edits import EditSite
from mechscope.stats.shares import Share, difference_of_shares, share_of
from mechscope.subject import Subject

# rows of logits held at once, for the model and for what it is compared with
_LOGITS = 256
_ABLATED = ("zero", "mean")
# what is measured of predictions
LOSSES = (
    "loss",
    *(f"loss, {run}" for run in ("spliced", *_ABLATED)),
    "kl",
    *(f"{what} recovered, {run}" for run in _ABLATED for what in ("loss", "kl")),
)


def unfit(subject: Subject, dictionary: Dictionary, other_model: bool) -> str:
    """Return why the model cannot run through a dictionary, or nothing."""
    try:
        with _spliced(subject, dictionary, None, other_model):
            return ""
    except SettingsError as error:
        return str(error)


def _spliced(subject: Subject, dictionary: Dictionary, kept: Tensor | None, other_model: bool) -> AbstractContextManager[Any]:
    return splice(subject, {dictionary.layout.outputs[0]: dictionary}, errors=False, positions=kept, other_model=other_model)


def predictions(
    subject: Subject,
    dictionaries: Mapping[str, Dictionary],
    texts: Pairs,
    means: Mapping[Place, Float[Tensor, " width"]],
    kept: Sequence[Bool[Tensor, " token"]],
    *,
    other_model: bool,
    execution: Execution,
) -> dict[str, dict[str, Ratio]]:
    """Return, by dictionary, the measures of what the model predicts (`LOSSES`).

    Args:
        subject: The model.
        dictionaries: Dictionaries that write the same places, through which it can run.
        texts: The texts.
        means: Mean of what stands at each of these places.
        kept: ``(token)`` of each text: which are replaced.
        other_model: Allow dictionaries of a model with other weights.
        execution: Tokens of a batch, progress.
    """

    def ablated(run: str, where: Tensor) -> AbstractContextManager[Any]:
        values = {place: torch.zeros_like(mean) for place, mean in means.items()} if run == "zero" else means
        return intervene(subject, *(_replaced(place, value, where) for place, value in values.items()))

    @torch.no_grad()
    def work(batch: PairBatch) -> dict[str, np.ndarray]:
        where = torch.zeros_like(batch.real)
        for row, real, index in zip(where, batch.real, batch.indices, strict=True):
            row[real] = kept[index]
        own = _last(subject, batch, nullcontext())
        others = {run: _last(subject, batch, ablated(run, where)) for run in _ABLATED}
        for name, dictionary in dictionaries.items():
            others[f"spliced {name}"] = _last(subject, batch, _spliced(subject, dictionary, where, other_model))
        return _compared(subject, batch, own, others)

    found = PerText(texts)
    found.run(work, execution, tokens=TOKENS_PER_BATCH, label="losses")
    own, ablations = found["own"], {run: (found[run], found[f"kl {run}"]) for run in _ABLATED}
    ones = np.where(np.isnan(own), np.nan, 1.0)
    return {name: _ratios(own, found[f"spliced {name}"], found[f"kl spliced {name}"], ablations, ones) for name in dictionaries}


def _ratios(
    own: np.ndarray, spliced: np.ndarray, kl: np.ndarray, ablations: Mapping[str, tuple[np.ndarray, np.ndarray]], ones: np.ndarray
) -> dict[str, Ratio]:
    found = {"loss": Ratio(own, ones), "loss, spliced": Ratio(spliced, ones), "kl": Ratio(kl, ones)}
    found |= {f"loss, {run}": Ratio(loss, ones) for run, (loss, _) in ablations.items()}
    for run, (loss, divergence) in ablations.items():
        absent = f"{'leaving it out' if run == 'zero' else 'its mean in its place'} does not raise the loss"
        found[f"loss recovered, {run}"] = Ratio(loss - spliced, loss - own, absent, True)
        found[f"kl recovered, {run}"] = Ratio(divergence - kl, divergence, absent)
    return found


class Ratio(NamedTuple):
    """A measure of texts: mean(part) / mean(whole), each one value per text; what is said where there is no whole; whether a whole below zero is none."""

    part: np.ndarray
    whole: np.ndarray
    absent: str = "the whole does not differ from zero"
    positive: bool = False

    def share(self) -> Share:
        """Return it with its interval."""
        return share_of(self.part, self.whole, absent=self.absent, positive=self.positive)

    def minus(self, other: Ratio) -> Share:
        """Return how much it is more than another measured on the same texts."""
        return difference_of_shares((self.part, self.whole), (other.part, other.whole), absent=self.absent, positive=self.positive)


def _replaced(place: Place, value: Float[Tensor, " width"], kept: Tensor) -> Edit:
    def put(current: Tensor) -> Tensor:
        return value.to(current).view(current.shape[2:]).expand_as(current)

    return Edit(cast(EditSite, place.site), place.layer, put, positions=kept)


def _last(subject: Subject, batch: PairBatch, within: AbstractContextManager[Any]) -> Float[Tensor, "batch token d_model"]:
    with within, subject.active():
        return Walk(subject, batch.clean, None if bool(batch.real.all()) else batch.real).run()


def _compared(subject: Subject, batch: PairBatch, own: Tensor, others: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return by text: mean loss of the model's own run (`own`) and of others, and KL of these from it, over the tokens that predict another."""
    predicts = batch.real[:, :-1] & batch.real[:, 1:]
    targets = batch.clean[:, 1:][predicts]
    text = torch.arange(len(batch))[:, None].expand_as(predicts)[predicts]
    rows, *changed = (hidden[:, :-1][predicts.to(hidden.device)] for hidden in (own, *others.values()))
    values = []
    for start in range(0, len(targets), _LOGITS):
        part = slice(start, start + _LOGITS)
        first = unembed(subject, rows[part]).float().log_softmax(-1)
        at = targets[part].to(first.device)[:, None]
        columns = [-first.gather(1, at)[:, 0]]
        for other in changed:
            second = unembed(subject, other[part]).float().log_softmax(-1)
            columns += [-second.gather(1, at)[:, 0], (first.exp() * (first - second)).sum(-1)]
        values.append(torch.stack(columns, dim=1).double().cpu())
    sums = by_text(torch.cat(values), text, len(batch))
    counts = np.bincount(text.numpy(), minlength=len(batch))
    # a text of one token predicts nothing
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return dict(zip(("own", *(name for run in others for name in (run, f"kl {run}"))), means, strict=True))


def by_text(values: Float[Tensor, "token of"], text: Tensor, texts: int) -> np.ndarray:
    """Return the sums over the tokens of each text, ``(of, text)``."""
    return torch.zeros(values.shape[1], texts, dtype=values.dtype).index_add_(1, text, values.T).numpy()
