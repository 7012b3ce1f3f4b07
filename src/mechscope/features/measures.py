"""How well a dictionary describes a model: how sparse, how faithful to the activations, and how much of the model's predictions it keeps.

    l0                     active latents of a token
    explained variance     1 − Σ‖x − x̂‖² / Σ‖x − μ‖², μ the mean of all tokens (not of a batch, and not of coordinates together)
    cosine, norm ratio     of x̂ with x;  ‖x̂‖ / ‖x‖
    reconstruction bias    E‖x̂‖² / E⟨x, x̂⟩: below 1 where x̂ is too short, as after an L1 penalty (Rajamanoharan et al. 2024)
    loss recovered         (L_ablated − L_spliced) / (L_ablated − L), with x replaced by zero, and by its mean
    kl                     KL(model ‖ model with x̂ in place of x), nats per token; and as a share of what ablation costs
    dead                   latents that were silent in all tokens that were read: a count, without an interval

The unit is the text: every other number is a ratio of sums over texts, with Fieller's interval (`mechscope.stats.shares`). Tokens that training leaves out
(`mechscope.features.rows`) are left out here, by the norms that training had for limits where the dictionary knows them, and left as they are where the
model runs through the dictionary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.places import Place
from mechscope.features.rows import TOKENS_PER_BATCH, Models, Reader, reader_of, require_rows
from mechscope.features.spliced import splice
from mechscope.instrument import Edit, Execution, Walk, intervene, unembed
from mechscope.instrument.edits import EditSite
from mechscope.instrument.texts import over_texts
from mechscope.settings.features import TokenSettings
from mechscope.shapes import by_shape
from mechscope.stats.shares import Share, share_of
from mechscope.subject import Subject

# rows of logits held at once, for the model and for what it is compared with
_LOGITS = 256
# what is summed over the tokens of each text
_SUMS = ("tokens", "squares", "missed", "cosine", "ratio", "inner", "rebuilt")
_RUNS = ("spliced", "zero", "mean")
COLUMNS = ("measure", "place", "n", "value", "low", "high", "withheld", "note")
# what is measured of predictions
LOSSES = (
    "loss",
    *(f"loss, {run}" for run in _RUNS),
    "kl",
    *(f"{what} recovered, {run}" for run in ("zero", "mean") for what in ("loss", "kl")),
)


@dataclass(frozen=True)
class Measures:
    """What a dictionary does on some texts.

    Attributes:
        table: One row per measure and place: `measure`, `place`, `n` (texts), `value`, `low`, `high` (95 %; `dead` has none), `withheld` (why it is not
            given, or empty), `note` (what must be known to read it, or empty).
        latents: One row per latent: `latent`, `tokens` (in which it is active), `density` (as a share of all), `mean` (value where it is active).
        tokens: Tokens that were read.
    """

    table: pd.DataFrame
    latents: pd.DataFrame
    tokens: int

    __repr__ = by_shape

    def value(self, measure: str, place: Place | str | None = None) -> float:
        """Return one measure, at one of several places; NaN where it is withheld."""
        rows = self.table[self.table["measure"] == measure]
        if place is not None:
            rows = rows[rows["place"] == str(place)]
        return float(rows["value"].iloc[0])


def measure(
    models: Models,
    dictionary: Dictionary,
    texts: Pairs,
    *,
    tokens: TokenSettings | None = None,
    other_model: bool = False,
    execution: Execution = Execution(),
) -> Measures:
    """Measure a dictionary on texts; better ones that it was not trained on.

    Args:
        models: The model, or several by name. Losses are those of one model: a dictionary over several has none. They are withheld, with the reason, where
            the model cannot run through the dictionary (see `splice`).
        dictionary: The dictionary.
        texts: Any texts; their clean versions are read.
        tokens: Which tokens are left out; None for those that its training left out, or the defaults where that is not known.
        other_model: Allow a dictionary of a model with other weights.
        execution: Tokens of a batch, progress.

    Raises:
        MechscopeError: The dictionary or the texts do not fit, or no token is left.
    """
    reader = reader_of(models, dictionary, texts, tokens, other_model=other_model, execution=execution)
    # said before anything is read
    unfit = _unfit(models, dictionary, other_model) if isinstance(models, Subject) else ""
    sums = _Sums(dictionary, len(texts))
    for batch, found in over_texts(
        texts, lambda batch: _read(reader, dictionary, batch), execution, tokens=TOKENS_PER_BATCH, label="activations"
    ):
        sums.add(batch, found)
    require_rows(int(sums.l0[1].sum()), texts, reader.tokens)
    rows = sums.rows()
    if unfit:
        absent = Share(np.nan, np.nan, np.nan, len(texts), unfit)
        rows += [_row(measure, _written(dictionary), absent) for measure in LOSSES]
    elif isinstance(models, Subject):
        rows += _losses(models, dictionary, texts, sums, other_model, execution)
    return Measures(pd.DataFrame(rows, columns=list(COLUMNS)), sums.latents(), int(sums.l0[1].sum()))


def _unfit(subject: Subject, dictionary: Dictionary, other_model: bool) -> str:
    """Return why the model cannot run through a dictionary, or nothing."""
    try:
        with _spliced(subject, dictionary, None, other_model):
            return ""
    except SettingsError as error:
        return str(error)


def _spliced(subject: Subject, dictionary: Dictionary, kept: Tensor | None, other_model: bool) -> AbstractContextManager[Any]:
    return splice(subject, {dictionary.layout.outputs[0]: dictionary}, errors=False, positions=kept, other_model=other_model)


@dataclass(frozen=True)
class _Found:
    """A batch's sums: by place and text, sums of x by place and text, active latents and tokens by text, and by latent entries and values.

    `kept` says which of each text's tokens were read.
    """

    kept: list[Bool[Tensor, " token"]]
    sums: dict[Place, np.ndarray]
    means: dict[Place, np.ndarray]
    l0: np.ndarray
    active: Tensor
    values: Tensor


@torch.no_grad()
def _read(reader: Reader, dictionary: Dictionary, batch: PairBatch) -> _Found:
    streams = reader.streams(batch)
    kept, _ = reader.kept(batch, streams)
    text = torch.arange(len(batch))[:, None].expand_as(kept)[kept]
    rows = {place: value[kept.to(value.device)].to(dictionary.device) for place, value in streams.items()}
    inputs = [rows[place] for place in dictionary.layout.inputs]
    codes = dictionary.encode(inputs)
    sums, means = {}, {}
    for place, rebuilt in zip(dictionary.layout.outputs, dictionary.decode(codes, inputs), strict=True):
        x, y = rows[place].double().cpu(), rebuilt.double().cpu()
        inner, long, short = (x * y).sum(1), x.norm(dim=1), y.norm(dim=1)
        lengths, tiny = long * short, 1e-12
        columns = (
            torch.ones_like(inner),
            long**2,
            (x - y).square().sum(1),
            inner / lengths.clamp(min=tiny),
            short / long.clamp(min=tiny),
            inner,
            short**2,
        )
        sums[place] = _by_text(torch.stack(columns, dim=1), text, len(batch))
        means[place] = _by_text(x, text, len(batch))
    l0 = _by_text(torch.stack([codes.counts.cpu().double(), torch.ones(len(text), dtype=torch.float64)], dim=1), text, len(batch))
    own = [row[real] for row, real in zip(kept, batch.real, strict=True)]
    return _Found(
        own, sums, means, l0, torch.bincount(codes.latents, minlength=dictionary.latents).cpu(), codes.total(codes.values).double().cpu()
    )


def _by_text(values: Float[Tensor, "token of"], text: Tensor, texts: int) -> np.ndarray:
    return torch.zeros(values.shape[1], texts, dtype=values.dtype).index_add_(1, text, values.T).numpy()


class _Sums:
    """Sums over the tokens of every text."""

    def __init__(self, dictionary: Dictionary, texts: int) -> None:
        self.dictionary = dictionary
        layout = dictionary.layout
        self.sums = {place: np.zeros((len(_SUMS), texts)) for place in layout.outputs}
        self.x = {place: np.zeros((width, texts)) for place, width in zip(layout.outputs, layout.output_widths, strict=True)}
        self.kept: list[Tensor] = [torch.zeros(0, dtype=torch.bool)] * texts
        self.l0 = np.zeros((2, texts))
        self.active = torch.zeros(dictionary.latents, dtype=torch.int64)
        self.values = torch.zeros(dictionary.latents, dtype=torch.float64)

    def add(self, batch: PairBatch, found: _Found) -> None:
        """Put a batch's sums where its texts stand."""
        at = list(batch.indices)
        for place, sums in found.sums.items():
            self.sums[place][:, at] = sums
            self.x[place][:, at] = found.means[place]
        for index, kept in zip(at, found.kept, strict=True):
            self.kept[index] = kept
        self.l0[:, at] = found.l0
        self.active += found.active
        self.values += found.values

    def means(self) -> dict[Place, Float[Tensor, " width"]]:
        """Return the mean of x at each place."""
        return {place: torch.from_numpy(x.sum(1) / self.sums[place][0].sum()) for place, x in self.x.items()}

    def rows(self) -> list[tuple[Any, ...]]:
        """Return the measures of activations."""
        name, silent = _written(self.dictionary), int((self.active == 0).sum())
        note = f"silent in all {int(self.l0[1].sum()):,} tokens that were read"
        found = [_row("l0", name, share_of(*self.l0)), ("dead", name, self.l0.shape[1], silent, np.nan, np.nan, "", note)]
        for place, sums in self.sums.items():
            of = dict(zip(_SUMS, sums, strict=True))
            mean = self.means()[place].numpy()
            # Σ‖x − μ‖² of each text, with the mean of all of them
            spread = of["squares"] - 2 * mean @ self.x[place] + of["tokens"] * (mean @ mean)
            found += [
                _row("explained variance", place.name, _one_minus(share_of(of["missed"], spread, absent="the activations do not vary"))),
                _row("cosine", place.name, share_of(of["cosine"], of["tokens"])),
                _row("norm ratio", place.name, share_of(of["ratio"], of["tokens"])),
                _row(
                    "reconstruction bias",
                    place.name,
                    share_of(of["rebuilt"], of["inner"], absent="x̂ has nothing in common with x"),
                ),
            ]
        return found

    def latents(self) -> pd.DataFrame:
        """Return the table of latents."""
        layout = self.dictionary.layout
        names = [f"{layout.outputs[group.writes[0]].name}.f{index}" for group in layout.groups for index in range(group.latents)]
        active, tokens = self.active.numpy(), max(self.l0[1].sum(), 1)
        mean = np.divide(self.values.numpy(), active, out=np.full(len(active), np.nan), where=active > 0)
        return pd.DataFrame({"latent": names, "tokens": active, "density": active / tokens, "mean": mean})


def _row(measure: str, place: str, share: Share) -> tuple[Any, ...]:
    return (measure, place, share.n, share.value, share.low, share.high, share.withheld, "")


def _written(dictionary: Dictionary) -> str:
    return ",".join(map(str, dictionary.layout.outputs))


def _one_minus(share: Share) -> Share:
    return Share(1 - share.value, 1 - share.high, 1 - share.low, share.n, share.withheld)


def _losses(
    subject: Subject, dictionary: Dictionary, texts: Pairs, sums: _Sums, other_model: bool, execution: Execution
) -> list[tuple[Any, ...]]:
    """Return the measures of what the model predicts: of its own run, through the dictionary, and with the places ablated."""
    found = {name: np.zeros(len(texts)) for name in ("own", *_RUNS, *(f"kl {run}" for run in _RUNS))}
    means = sums.means()

    def changed(run: str, kept: Bool[Tensor, "batch token"]) -> AbstractContextManager[Any]:
        if run == "spliced":
            return _spliced(subject, dictionary, kept, other_model)
        zero = {place: torch.zeros_like(mean) for place, mean in means.items()}
        return intervene(subject, *(_replaced(place, value, kept) for place, value in (means if run == "mean" else zero).items()))

    @torch.no_grad()
    def work(batch: PairBatch) -> dict[str, np.ndarray]:
        kept = torch.zeros_like(batch.real)
        for row, real, index in zip(kept, batch.real, batch.indices, strict=True):
            row[real] = sums.kept[index]
        own = _last(subject, batch, nullcontext())
        return _compared(subject, batch, own, {run: _last(subject, batch, changed(run, kept)) for run in _RUNS})

    for batch, values in over_texts(texts, work, execution, tokens=TOKENS_PER_BATCH, label="losses"):
        for name, value in values.items():
            found[name][list(batch.indices)] = value
    ones = np.where(np.isnan(found["own"]), np.nan, 1.0)
    shares = {f"loss{said}": share_of(found[run], ones) for run, said in (("own", ""), *((run, f", {run}") for run in _RUNS))}
    shares["kl"] = share_of(found["kl spliced"], ones)
    for run in ("zero", "mean"):
        absent = f"{'leaving it out' if run == 'zero' else 'its mean in its place'} does not raise the loss"
        saved, cost = found[run] - found["spliced"], found[run] - found["own"]
        shares[f"loss recovered, {run}"] = share_of(saved, cost, absent=absent, positive=True)
        shares[f"kl recovered, {run}"] = _one_minus(share_of(found["kl spliced"], found[f"kl {run}"], absent=absent))
    return [_row(measure, _written(dictionary), shares[measure]) for measure in LOSSES]


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
    sums = _by_text(torch.cat(values), text, len(batch))
    counts = np.bincount(text.numpy(), minlength=len(batch))
    # a text of one token predicts nothing
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return dict(zip(("own", *(name for run in others for name in (run, f"kl {run}"))), means, strict=True))
