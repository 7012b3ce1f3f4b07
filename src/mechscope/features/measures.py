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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope import ranks
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.places import Place
from mechscope.features.predictions import LOSSES, Ratio, by_text, predictions, unfit
from mechscope.features.rows import TOKENS_PER_BATCH, Models, Reader, reader_of, require_rows
from mechscope.instrument import Execution
from mechscope.instrument.texts import over_texts
from mechscope.settings.features import TokenSettings
from mechscope.shapes import by_shape
from mechscope.stats.shares import Share
from mechscope.subject import Subject

# what is summed over the tokens of each text
_SUMS = ("tokens", "squares", "missed", "cosine", "ratio", "inner", "rebuilt")
COLUMNS = ("measure", "place", "n", "value", "low", "high", "withheld", "note")


@dataclass(frozen=True)
class Measures:
    """What a dictionary does on some texts.

    Attributes:
        table: One row per measure and place: `measure`, `place`, `n` (texts), `value`, `low`, `high` (95 %; `dead` has none), `withheld` (why it is not
            given, or empty), `note` (what must be known to read it, or empty).
        latents: One row per latent: `latent`, `tokens` (in which it is active), `density` (as a share of all), `mean` (value where it is active).
        tokens: Tokens that were read.
        ratios: What is behind the numbers: by measure and place, of every text a part and a whole.
    """

    table: pd.DataFrame
    latents: pd.DataFrame
    tokens: int
    ratios: Mapping[tuple[str, str], Ratio]

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
    return measure_together(models, {"": dictionary}, texts, tokens=tokens, other_model=other_model, execution=execution)[""]


def measure_together(
    models: Models,
    dictionaries: Mapping[str, Dictionary],
    texts: Pairs,
    *,
    tokens: TokenSettings | None = None,
    other_model: bool = False,
    execution: Execution = Execution(),
) -> dict[str, Measures]:
    """Measure dictionaries of the same places, such as one and its controls: activations are read, and the model's own and ablated runs made, once for all.

    Args:
        models: As for `measure`.
        dictionaries: By name; the tokens left out are those of the first.
        texts: As for `measure`, as are the others.
        tokens: Which tokens are left out.
        other_model: Allow dictionaries of a model with other weights.
        execution: Tokens of a batch, progress.

    Raises:
        SettingsError: They read or write different places, or there is none.
        MechscopeError: As for `measure`.
    """
    if not dictionaries:
        raise SettingsError("there is no dictionary to measure: give at least one")
    first = next(iter(dictionaries.values()))
    for name, each in dictionaries.items():
        if (each.layout.inputs, each.layout.outputs) != (first.layout.inputs, first.layout.outputs):
            raise SettingsError(
                f"dictionary {name!r} reads {_joined(each.layout.inputs)} and writes {_joined(each.layout.outputs)}, the first of those measured together "
                f"{_joined(first.layout.inputs)} and {_joined(first.layout.outputs)}: measure them one by one"
            )
        each.check(models, other_model=other_model)
    reader = reader_of(models, first, texts, tokens, other_model=other_model, execution=execution)
    # said before anything is read
    reasons = {name: unfit(models, each, other_model) for name, each in dictionaries.items()} if isinstance(models, Subject) else {}
    sums = {name: _Sums(each, len(texts)) for name, each in dictionaries.items()}

    def work(batch: PairBatch) -> dict[str, _Found]:
        return _read(reader, dictionaries, batch)

    for batch, found in over_texts(texts, work, execution, tokens=TOKENS_PER_BATCH, label="activations", dealt=True):
        for name, own in found.items():
            sums[name].add(batch, own)
    for of in sums.values():
        of.bring_together()
    whole = next(iter(sums.values()))
    require_rows(whole.read, texts, reader.tokens)
    fitting = {name: each for name, each in dictionaries.items() if not reasons.get(name, "several models")}
    predicted: dict[str, dict[str, Ratio]] = {}
    if isinstance(models, Subject) and fitting:
        predicted = predictions(models, fitting, texts, whole.means(), whole.kept, other_model=other_model, execution=execution)
    written = _joined(first.layout.outputs)
    made = {}
    for name, of in sums.items():
        ratios = of.ratios() | {(measure, written): ratio for measure, ratio in predicted.get(name, {}).items()}
        rows = [_row(*key, ratio.share()) for key, ratio in ratios.items() if key[0] not in LOSSES]
        rows.insert(1, of.dead())
        if name in reasons:
            absent = Share(np.nan, np.nan, np.nan, len(texts), reasons[name])
            rows += [
                _row(measure, written, ratios[measure, written].share() if (measure, written) in ratios else absent) for measure in LOSSES
            ]
        made[name] = Measures(pd.DataFrame(rows, columns=list(COLUMNS)), of.latents(), of.read, ratios)
    return made


def difference_of(one: Measures, other: Measures) -> pd.DataFrame:
    """Return how much more a dictionary has of each measure than another, both measured on the same texts.

    Returns:
        Rows like those of `Measures.table`, for the measures that both have; the interval is that of the difference, which may be sure where each is not.

    Raises:
        SettingsError: They were measured on different texts.
    """
    if len(next(iter(one.ratios.values())).part) != len(next(iter(other.ratios.values())).part):
        raise SettingsError("measures of different texts cannot be subtracted: measure both on the same")
    rows = [_row(*key, ratio.minus(other.ratios[key])) for key, ratio in one.ratios.items() if key in other.ratios]
    return pd.DataFrame(rows, columns=list(COLUMNS))


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
def _read(reader: Reader, dictionaries: Mapping[str, Dictionary], batch: PairBatch) -> dict[str, _Found]:
    streams = reader.streams(batch)
    kept, _ = reader.kept(batch, streams)
    text = torch.arange(len(batch))[:, None].expand_as(kept)[kept]
    rows = {place: value[kept.to(value.device)] for place, value in streams.items()}
    own = [row[real] for row, real in zip(kept, batch.real, strict=True)]
    return {
        name: _sums_of(each, {place: value.to(each.device) for place, value in rows.items()}, text, own)
        for name, each in dictionaries.items()
    }


def _sums_of(dictionary: Dictionary, rows: Mapping[Place, Tensor], text: Tensor, kept: list[Tensor]) -> _Found:
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
        sums[place] = by_text(torch.stack(columns, dim=1), text, len(kept))
        means[place] = by_text(x, text, len(kept))
    l0 = by_text(torch.stack([codes.counts.cpu().double(), torch.ones(len(text), dtype=torch.float64)], dim=1), text, len(kept))
    return _Found(
        kept, sums, means, l0, torch.bincount(codes.latents, minlength=dictionary.latents).cpu(), codes.total(codes.values).double().cpu()
    )


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

    @property
    def read(self) -> int:
        """Tokens that were read."""
        return int(self.l0[1].sum())

    def bring_together(self) -> None:
        """Add what other ranks found of their texts."""
        own, *others = ranks.exchange((self.sums, self.x, self.kept, self.l0, self.active, self.values))
        self.sums, self.x, self.kept, self.l0, self.active, self.values = own
        for sums, x, kept, l0, active, values in others:
            for place in self.sums:
                self.sums[place] = self.sums[place] + sums[place]
                self.x[place] = self.x[place] + x[place]
            self.kept = [one if len(one) else two for one, two in zip(self.kept, kept, strict=True)]
            self.l0, self.active, self.values = self.l0 + l0, self.active + active, self.values + values

    def means(self) -> dict[Place, Float[Tensor, " width"]]:
        """Return the mean of x at each place."""
        return {place: torch.from_numpy(x.sum(1) / self.sums[place][0].sum()) for place, x in self.x.items()}

    def ratios(self) -> dict[tuple[str, str], Ratio]:
        """Return the measures of activations, by measure and place."""
        found = {("l0", _joined(self.dictionary.layout.outputs)): Ratio(*self.l0)}
        for place, sums in self.sums.items():
            of = dict(zip(_SUMS, sums, strict=True))
            mean = self.means()[place].numpy()
            # Σ‖x − μ‖² of each text, with the mean of all of them
            spread = of["squares"] - 2 * mean @ self.x[place] + of["tokens"] * (mean @ mean)
            found |= {
                ("explained variance", place.name): Ratio(spread - of["missed"], spread, "the activations do not vary"),
                ("cosine", place.name): Ratio(of["cosine"], of["tokens"]),
                ("norm ratio", place.name): Ratio(of["ratio"], of["tokens"]),
                ("reconstruction bias", place.name): Ratio(of["rebuilt"], of["inner"], "x̂ has nothing in common with x"),
            }
        return found

    def dead(self) -> tuple[Any, ...]:
        """Return the row of latents that were silent."""
        note = f"silent in all {self.read:,} tokens that were read"
        silent = int((self.active == 0).sum())
        return ("dead", _joined(self.dictionary.layout.outputs), self.l0.shape[1], silent, np.nan, np.nan, "", note)

    def latents(self) -> pd.DataFrame:
        """Return the table of latents."""
        layout = self.dictionary.layout
        names = [f"{layout.outputs[group.writes[0]].name}.f{index}" for group in layout.groups for index in range(group.latents)]
        active, tokens = self.active.numpy(), max(self.l0[1].sum(), 1)
        mean = np.divide(self.values.numpy(), active, out=np.full(len(active), np.nan), where=active > 0)
        return pd.DataFrame({"latent": names, "tokens": active, "density": active / tokens, "mean": mean})


def _row(measure: str, place: str, share: Share) -> tuple[Any, ...]:
    return (measure, place, share.n, share.value, share.low, share.high, share.withheld, "")


def _joined(places: tuple[Place, ...]) -> str:
    return ",".join(map(str, places))
