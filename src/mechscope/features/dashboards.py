"""What a person looks at to say what a latent stands for: examples of all strengths, how often, what it writes, and what goes with it. One pass over the texts.

examples       the largest activations, one of a text, and random ones of every tenth of its activations (deciles of up to `drawn` random ones): the largest
               alone show an illusion where weaker activations mean something else (Bolukbasi et al. 2021)
histogram      tokens by the activation, four bars for each doubling
correlations   Pearson's, over a random sample of tokens, all of them, also where it is silent: with other latents' activations, and with the norm of what each
               head writes, ‖z W_O‖, of the blocks up to where the latent is read. Beside the largest of a latent's stands the largest with the tokens shuffled
               between it and the others: what as many candidates give by chance
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from mechscope.data.pairs import Pairs
from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.examples import promoted_tokens, writes_residual
from mechscope.features.observed import Latents
from mechscope.features.places import subject_of
from mechscope.features.reservoirs import Kept, Span
from mechscope.features.rows import Models
from mechscope.features.windows import Watched, apart, deciles, watch
from mechscope.instrument import Execution
from mechscope.settings.features import DashboardSettings, TokenSettings
from mechscope.shapes import by_shape

# tokens of the sample in which a latent must be active, or nothing is said of what goes with it: a correlation over fewer hangs on single tokens
_FEWEST_ACTIVE = 10
# rows of correlations with all latents that are held at once
_BLOCK = 128


@dataclass(frozen=True)
class Dashboard:
    """What is shown of a dictionary's latents.

    Attributes:
        latents: One row per latent, those that carry most of what the dictionary writes first: `component`, `active` (tokens), `density`, `share` (of Σ f²),
            `largest`, `bar` (the first of its histogram, `mechscope.features.windows`), `counts` (a list: tokens of each bar from there on), `promotes` and
            `suppresses` (lists of tokens, by its decoder at the place where that is longest), `sampled` (tokens of the sample in which it is active).
        examples: One row per example: `component`, `decile` (0 for the largest activations, 1 for the strongest tenth of random ones, 10 for the weakest),
            `place` (from 1), `value`, `text` (its place among the texts), `position`, `start` (of the tokens shown), `ids` (a list), `values` (a list).
        correlations: One row per latent and what goes with it: `component`, `other` (a latent or a head), `kind` ("latent", "head"), `correlation`.
        chance: One row per latent and kind: `component`, `kind`, `largest`, `shuffled` (the largest with the tokens shuffled).
        tokens: Tokens that were read.
        sample: Tokens of the sample.
    """

    latents: pd.DataFrame
    examples: pd.DataFrame
    correlations: pd.DataFrame
    chance: pd.DataFrame
    tokens: int
    sample: int

    __repr__ = by_shape


def dashboard(
    models: Models,
    dictionary: Dictionary,
    texts: Pairs,
    *,
    settings: DashboardSettings | None = None,
    tokens: TokenSettings | None = None,
    other_model: bool = False,
    execution: Execution = Execution(),
) -> Dashboard:
    """Read texts once and gather what is shown of each latent; memory does not hang on how many texts there are.

    Args:
        models: The model, or several by name.
        dictionary: The dictionary.
        texts: Any texts; their clean versions are read.
        settings: How many latents and examples; the defaults for None.
        tokens: Which tokens are left out; None for those that its training left out, or the defaults where that is not known.
        other_model: Allow a dictionary of a model with other weights.
        execution: Tokens of a batch, seed of the random examples, progress.

    Raises:
        MechscopeError: The dictionary or the texts do not fit, or no token is left.
    """
    settings = settings or DashboardSettings()
    if settings.before + settings.after < 1:
        raise SettingsError("settings 'before' and 'after' are both 0: show at least one token around an example")
    latents = Latents(models, dictionary, texts, heads=True, tokens=tokens, other_model=other_model, execution=execution)
    span = Span(settings.before, settings.after)
    seen = watch(
        latents,
        texts,
        top=settings.examples,
        drawn=settings.drawn,
        span=span,
        sample=settings.sample,
        execution=execution,
        label="dashboard",
    )
    shown = seen.strongest(settings.latents)
    promoted = _promoted(models, dictionary, shown)
    correlations, chance, active = _correlations(seen, shown, latents.head_names, settings.related, execution.seed)
    return Dashboard(
        _listed(seen, shown, promoted, active),
        _examples(seen, shown, texts, settings.of_decile),
        correlations,
        chance,
        seen.tokens,
        len(seen.sample),
    )


def _promoted(models: Models, dictionary: Dictionary, shown: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the tokens that latents promote and suppress where their decoders are longest; none where nothing is written into a residual stream."""
    found: list[tuple[list[int], list[int]]] = [([], [])] * len(shown)
    places = [place for place in dictionary.layout.outputs if writes_residual(place)]
    if not places or not shown:
        return found
    # of a crosscoder of two models: in the one that holds it
    sizes = torch.stack([torch.linalg.vector_norm(dictionary.directions(shown, place).float(), dim=1) for place in places])
    longest = sizes.argmax(0).tolist()
    for number, place in enumerate(places):
        own = [at for at, where in enumerate(longest) if where == number]
        listed = promoted_tokens(subject_of(models, place), dictionary, [shown[at] for at in own], place=place) if own else []
        for at, tokens in zip(own, listed, strict=True):
            found[at] = tokens
    return found


def _listed(seen: Watched, shown: Sequence[int], promoted: Sequence[tuple[list[int], list[int]]], active: Sequence[int]) -> pd.DataFrame:
    rows = []
    whole = seen.energy.sum()
    for unit, (up, down), sampled in zip(shown, promoted, active, strict=True):
        filled = seen.bars[unit].nonzero()[0]
        rows.append(
            {
                "component": seen.names[unit],
                "active": int(seen.active[unit]),
                "density": seen.active[unit] / seen.tokens,
                "share": seen.energy[unit] / whole,
                "largest": float(seen.top.of(unit).value[0]),
                "bar": int(filled[0]),
                "counts": seen.bars[unit][filled[0] : filled[-1] + 1].tolist(),
                "promotes": up,
                "suppresses": down,
                "sampled": sampled,
            }
        )
    return pd.DataFrame(rows)


def _examples(seen: Watched, shown: Sequence[int], texts: Pairs, of_decile: int) -> pd.DataFrame:
    rows = []
    for unit in shown:
        groups: list[Kept] = [seen.top.of(unit)]
        random = seen.drawn.of(unit)
        # the same tokens again and again say nothing: of windows that overlap the first drawn
        random = random[np.array(apart(random, len(seen.span)), dtype=np.int64)]
        if of_decile:
            # in every tenth the first drawn, the largest of them first
            groups += [random[np.sort(at)[:of_decile]] for at in deciles(random.value)]
        for decile, kept in enumerate(groups):
            order = np.argsort(-kept.value, kind="stable")
            for number, at in enumerate(order, start=1):
                ids = texts.pairs[int(kept.text[at])].clean
                position = int(kept.position[at])
                start, stop = max(0, position - seen.span.before), min(len(ids), position + seen.span.after + 1)
                first = start - (position - seen.span.before)
                rows.append(
                    {
                        "component": seen.names[unit],
                        "decile": decile,
                        "place": number,
                        "value": float(kept.value[at]),
                        "text": int(kept.text[at]),
                        "position": position,
                        "start": start,
                        "ids": list(ids[start:stop]),
                        "values": [float(value) for value in kept.around[at][first : first + stop - start]],
                    }
                )
    return pd.DataFrame(rows)


def _correlations(
    seen: Watched, shown: Sequence[int], heads: Sequence[str], related: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, list[int]]:
    """Return what goes with each latent, what chance gives, and in how many tokens of the sample each is active."""
    codes, n = seen.sample.codes.astype(np.float64), len(seen.sample)
    columns = codes.tocsc()
    own = columns[:, list(shown)]
    active = own.getnnz(axis=0).tolist() if shown else []
    told, chance = list[dict[str, object]](), list[dict[str, object]]()
    if n > 1:
        order = np.random.default_rng(seed).permutation(n)
        norms = seen.sample.heads.astype(np.float64)
        norms = norms - norms.mean(0)
        mixed = codes.tocsr()[order].tocsc()
        for start in range(0, len(shown), _BLOCK):
            block = own[:, start : start + _BLOCK]
            units = shown[start : start + _BLOCK]
            with_latents, without = (_pearson(block, others) for others in (columns, mixed))
            with_heads, without_heads = (_with_dense(block, others) for others in (norms, norms[order]))
            for row, unit in enumerate(units):
                if active[start + row] < _FEWEST_ACTIVE:
                    continue
                name = seen.names[unit]
                # of itself it is no news; with tokens shuffled it is one candidate like any other
                with_latents[row, unit] = -np.inf
                for kind, found, shuffled, names in (
                    ("latent", with_latents[row], without[row], seen.names),
                    ("head", with_heads[row], without_heads[row], heads),
                ):
                    # sparse activations have no strong negative correlations, norms do
                    size = np.abs(found) if kind == "head" else found
                    best = [int(at) for at in np.lexsort((np.arange(len(size)), -size))[:related] if np.isfinite(size[at]) and size[at] > 0]
                    told += [{"component": name, "kind": kind, "other": names[at], "correlation": float(found[at])} for at in best]
                    if best:
                        largest = np.abs(shuffled).max() if kind == "head" else shuffled[np.isfinite(shuffled)].max()
                        chance.append({"component": name, "kind": kind, "largest": float(size[best[0]]), "shuffled": float(largest)})
    return (
        pd.DataFrame(told, columns=["component", "kind", "other", "correlation"]),
        pd.DataFrame(chance, columns=["component", "kind", "largest", "shuffled"]),
        active,
    )


def _pearson(own: sparse.csc_matrix, others: sparse.csc_matrix) -> np.ndarray:
    """Return the correlations of columns with columns; minus infinity for those that never vary."""
    n = own.shape[0]
    products = (own.T @ others).toarray() / n
    (mean, deviation), (other_mean, other_deviation) = (_moments(each) for each in (own, others))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (products - mean[:, None] * other_mean) / (deviation[:, None] * other_deviation)
    return np.where(np.isfinite(found), found, -np.inf)


def _with_dense(own: sparse.csc_matrix, centred: np.ndarray) -> np.ndarray:
    products = np.asarray(own.T @ centred) / own.shape[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = products / (_moments(own)[1][:, None] * centred.std(0))
    return np.where(np.isfinite(found), found, 0.0)


def _moments(columns: sparse.csc_matrix) -> tuple[np.ndarray, np.ndarray]:
    mean = np.asarray(columns.mean(axis=0)).ravel()
    square = np.asarray(columns.multiply(columns).mean(axis=0)).ravel()
    return mean, np.sqrt(np.clip(square - mean**2, 0, None))
