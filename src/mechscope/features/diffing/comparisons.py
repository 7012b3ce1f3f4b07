"""Which dictionaries a comparison trains, the two models' own and one for every control, and what held-out texts say of all of them in one pass.

    crosscoder        base and tuned
    difference        an autoencoder of tuned − base
    same              base and base, from decoders that start apart: what training alone makes look like one model's own
    half              base and tuned, on the other half of the documents and from other first weights: what is found again there hangs on neither
    planted           base and the base with an effect of known truth: whether it would be found
    shuffled pairs    base and the tuned model's tokens in another order: what is shared when nothing belongs together
    others            base and a further training each, such as one of another seed: what is found again there is no matter of one training

All have the same budget, batches and thresholds, and but for `half` and `same` the same first weights. Decoders that start alike and are told the same stay
alike to the bit, so that base against base would be nothing by construction; its own start is the harder one: no latent begins as one that models share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.features.activations import Block
from mechscope.features.dictionary import Dictionary, decoded
from mechscope.features.diffing.scaling import ScalingSums, scaling_sums
from mechscope.features.diffing.views import BASE, DIFFERENCE, PLANTED, SAME, SHUFFLED, TUNED, Recipe, TokenIds, model_places
from mechscope.features.layout import Layout, crosscoder
from mechscope.features.places import Place
from mechscope.features.rows import TOKENS_PER_BATCH, Reader, require_rows
from mechscope.features.rules import Rule
from mechscope.instrument import Execution
from mechscope.instrument.texts import over_texts
from mechscope.shapes import by_shape

CROSSCODER = "crosscoder"
_MADE = {
    "same": (BASE, SAME),
    "half": ("halfbase", "halftuned"),
    "planted": (BASE, PLANTED),
    "shuffled pairs": (BASE, SHUFFLED),
}
"""Controls that are made of the two models alone, and what they compare."""


@dataclass(frozen=True)
class Comparison:
    """A dictionary to train, and what it compares.

    Attributes:
        name: What it is called.
        views: The two views that it reads, or the one of differences.
        control: Which control it is; empty for the two models' own.
    """

    name: str
    views: tuple[str, ...]
    control: str = ""

    def layout(self, where: Sequence[Place], widths: Sequence[int], latents: int, rule: Rule) -> Layout:
        """Return its layout.

        Args:
            where: Places, without a model's name.
            widths: Their widths.
            latents: Number of latents.
            rule: Which of them are active.
        """
        return crosscoder(model_places(where, self.views), tuple(widths) * len(self.views), latents, rule)


def comparisons(made: Sequence[str], others: Mapping[str, tuple[str, str]], *, difference: bool = True) -> tuple[Comparison, ...]:
    """Return what is trained: the crosscoder first.

    Args:
        made: Controls that are made of the two models: some of `same`, `half`, `planted`, `shuffled pairs`.
        others: Further trainings: of each view its name and kind.
        difference: Whether there is a dictionary of differences.
    """
    found = [Comparison(CROSSCODER, (BASE, TUNED))]
    found += [Comparison(DIFFERENCE, (DIFFERENCE,))] if difference else []
    found += [Comparison(name, views, name) for name, views in _MADE.items() if name in made]
    found += [Comparison(name, (BASE, view), kind) for view, (name, kind) in others.items()]
    return tuple(found)


def views_of(compared: Sequence[Comparison]) -> tuple[str, ...]:
    """Return all views that are needed, base and tuned first."""
    return tuple(dict.fromkeys((BASE, TUNED, *(view for each in compared for view in each.views))))


@dataclass(frozen=True)
class Judged:
    """What held-out texts say of a dictionary.

    Attributes:
        sums: Of its latents.
        missed: ``(model, text)``: Σ‖x − x̂‖², in the units of the tensors; one model for a dictionary of differences.
        squares: ``(model, text)``: Σ‖x‖², around the mean of what was learned from.
        active: ``(text)``: active latents, summed over tokens.
        tokens: ``(text)``: tokens that were read.
    """

    sums: ScalingSums
    missed: np.ndarray
    squares: np.ndarray
    active: np.ndarray
    tokens: np.ndarray

    __repr__ = by_shape


def judge(
    reader: Reader, dictionaries: Mapping[str, Dictionary], recipe: Recipe, texts: Pairs, *, execution: Execution = Execution()
) -> dict[str, Judged]:
    """Read texts once and sum up what every dictionary says of them; nothing of size tokens × latents is held.

    Args:
        reader: Reads the models at their places, with the limits that training had.
        dictionaries: By the name of their comparison.
        recipe: How views are made.
        texts: Held-out texts.
        execution: Tokens of a batch, progress.

    Raises:
        MechscopeError: The texts do not fit the models, or no token is left.
    """
    reader.check(texts)
    ids = TokenIds(texts)
    found: dict[str, list[Judged]] = {name: [] for name in dictionaries}

    def work(batch: PairBatch) -> dict[str, Judged]:
        rows = reader.rows(batch)
        views = recipe.made(rows, ids(rows))
        return {name: _judged(dictionary, views, rows.text, len(texts)) for name, dictionary in dictionaries.items()}

    for _, parts in over_texts(texts, work, execution, tokens=TOKENS_PER_BATCH, label="judging latents"):
        for name, part in parts.items():
            found[name] = [part if not found[name] else _added(found[name][0], part)]
    whole = {name: parts[0] for name, parts in found.items()}
    require_rows(min(each.sums.tokens for each in whole.values()), texts, reader.tokens)
    return whole


def _judged(dictionary: Dictionary, views: Block, text: Tensor, texts: int) -> Judged:
    inputs = [views[place].to(dictionary.device, dictionary.dtype) for place in dictionary.layout.inputs]
    sums, counts, fit = scaling_sums(dictionary, inputs) if reads_two_models(dictionary) else _sums(dictionary, inputs)
    per_token = torch.cat([fit.flatten(0, 1), counts[None].double(), torch.ones(1, len(text), dtype=torch.float64)])
    by_text = torch.zeros(len(per_token), texts, dtype=torch.float64).index_add_(1, text, per_token).numpy()
    models = len(fit)
    pairs = by_text[: 2 * models].reshape(models, 2, texts)
    return Judged(sums, pairs[:, 0], pairs[:, 1], by_text[-2], by_text[-1])


def reads_two_models(dictionary: Dictionary) -> bool:
    """Tell whether a dictionary reads two models."""
    return len({place.model for place in dictionary.layout.inputs}) > 1


@torch.no_grad()
def _sums(dictionary: Dictionary, inputs: Sequence[Tensor]) -> tuple[ScalingSums, Tensor, Tensor]:
    """Return the sums of a dictionary of one view."""
    aim, codes = dictionary.aim(inputs), dictionary.encode(inputs)
    rebuilt = decoded(dictionary.layout, dictionary.tensors, codes)
    fit = torch.stack([(aim - rebuilt).double().square().sum(1), aim.double().square().sum(1)])[None].cpu()
    active = torch.bincount(codes.latents, minlength=dictionary.latents).cpu()
    none = torch.zeros(0, dictionary.latents, dtype=torch.float64)
    return ScalingSums(len(aim), active, codes.total(codes.values.double().square()).cpu(), none, none), codes.counts.cpu(), fit


def _added(one: Judged, two: Judged) -> Judged:
    return Judged(one.sums + two.sums, *(getattr(one, name) + getattr(two, name) for name in ("missed", "squares", "active", "tokens")))
