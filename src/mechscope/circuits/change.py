"""What fine-tuning changed in a circuit: overlap of base and tuned beside two nulls, and the shift of every edge's score.

An overlap says nothing alone: circuits found from noisy scores differ though nothing changed, and large ones overlap by chance. So it stands beside

    random      what random circuits of these sizes and layers share
    exchanged   what two circuits share when in every text it is drawn by lot which model's scores count as base and which as tuned

Were the two models the same up to noise, the labels would mean nothing, and the overlap would be one more draw of the second: exactly so where scores
are exchangeable within a text (a permutation test whose unit is the text; Fisher 1935, Pitman 1937). Both models' scores are brought to one size
first, and by simulation it then holds also where one model's are larger, noisier, or both (docs/calibration.md). Noise that both models share with a
text stays in both. What the overlap falls short of is the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd

from mechscope.circuits.choosing import Manner, choose
from mechscope.circuits.graph import Circuit
from mechscope.circuits.overlap import jaccard, node_jaccard, overlap
from mechscope.circuits.scores import EdgeScores
from mechscope.errors import DataError, SettingsError
from mechscope.stats.inference import benjamini_hochberg, paired_difference

# what scores must share besides their method
_NOTED = ("metric", "source", "texts", "steps", "points")
# of fewer texts no labels can be exchanged that say anything: with four already p cannot fall below 1 in 8
FEWEST_TEXTS = 4
_MEASURES = {"edges": jaccard, "nodes": node_jaccard}


def edge_shift(base: EdgeScores, tuned: EdgeScores, base_circuit: Circuit, tuned_circuit: Circuit) -> pd.DataFrame:
    """Compare every edge's score in two models on the same texts.

    Returns:
        One row per edge: `edge`, `sender`, `receiver`, `sender_layer`, `receiver_layer`, `base`, `tuned`, `shift` (tuned − base) with `se`, `low`, `high`
        (95 % over texts), `p`, `q` (Benjamini–Hochberg over all edges), `in_base`, `in_tuned`.

    Raises:
        DataError: The scores are of different graphs, methods, metrics or numbers of texts, or were not kept by text.
    """
    first, second = _same_texts(base, tuned)
    table = base.table()[["edge", "sender", "receiver", "sender_layer", "receiver_layer"]]
    shift = paired_difference(second, first)
    shifts = {"shift": shift.mean, "se": shift.standard_error, "low": shift.low, "high": shift.high}
    tests = {"p": shift.p, "q": benjamini_hochberg(shift.p)}
    inside = {"in_base": base_circuit.edges, "in_tuned": tuned_circuit.edges}
    return table.assign(base=base.mean, tuned=tuned.mean, **shifts, **tests, **inside)


def overlap_table(
    base: EdgeScores,
    tuned: EdgeScores,
    fractions: Sequence[float],
    *,
    exchanges: int = 199,
    draws: int = 200,
    seed: int = 0,
    **manner: Unpack[Manner],
) -> pd.DataFrame:
    """Compare the circuits of two models at several sizes, beside both nulls.

    Args:
        base: Scores of the base model.
        tuned: Scores of the tuned model, on the same texts.
        fractions: Sizes, as fractions of all edges.
        exchanges: Random exchanges of the models' labels within texts.
        draws: Random circuits of the layer-matched null.
        seed: Seed of exchanges and draws.
        manner: Options of `choose` but its size.

    Returns:
        One row per `fraction` and `what` (edges, nodes): `base_size`, `tuned_size`, `jaccard` of the two circuits; `null`, `null_low`, `null_high`,
        `null_p` of layer-matched random circuits; `exchanged` with labels exchanged (mean, and 2.5 % and 97.5 % quantiles `exchanged_low`,
        `exchanged_high`); `change` (exchanged − jaccard) and `p`, the share of exchanges in which the two share at most as much, the models as they
        are among them; `n` texts.

    Raises:
        DataError: The scores are of different graphs, methods, metrics or numbers of texts, or were not kept by text.
        SettingsError: There are no exchanges, or the options are not as `choose` needs them.
    """
    first, second = _same_texts(base, tuned)
    texts, graph = len(first), base.graph
    if texts < FEWEST_TEXTS:
        raise DataError(f"{texts} texts are too few to exchange models in: at least {FEWEST_TEXTS} are needed")
    if exchanges < 1:
        raise SettingsError(f"a null of {exchanges} exchanges: give at least 1")
    # a louder or cleaner model would dominate every exchanged circuit: both are brought to one size first
    first, second = first / _size(first), second / _size(second)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(exchanges, texts))
    middle, apart = (first.mean(0) + second.mean(0)) / 2, signs @ (second - first) / (2 * texts)
    rows = []
    for fraction in fractions:
        whole = choose(base, fraction=fraction, **manner), choose(tuned, fraction=fraction, **manner)
        by_chance = overlap(*whole, draws=draws, seed=seed).table
        exchanged = [
            tuple(choose((graph, scores), fraction=fraction, **manner) for scores in (middle - one, middle + one)) for one in apart
        ]
        for what, measure in _MEASURES.items():
            shared, drawn = measure(*whole), np.array([measure(*two) for two in exchanged])
            null = by_chance[(by_chance["of"] == what) & (by_chance["null"] == "layer-matched")].iloc[0]
            sizes = {"base_size": int(null["first"]), "tuned_size": int(null["second"]), "jaccard": shared}
            nulls = {"null": null["expected"], "null_low": null["low"], "null_high": null["high"], "null_p": null["p"]}
            low, high = np.quantile(drawn, [0.025, 0.975])
            # of equal sets the index is the same number, however it was summed
            p = (1 + (drawn <= shared + 1e-12).sum()) / (1 + exchanges)
            spread = {"exchanged": drawn.mean(), "exchanged_low": low, "exchanged_high": high, "change": drawn.mean() - shared, "p": p}
            rows.append({"what": what, "fraction": fraction, **sizes, **nulls, **spread, "n": texts})
    return pd.DataFrame(rows)


def _size(per_text: np.ndarray) -> float:
    """Return how large a model's mean scores are without what noise adds to them: the root of their sum of squares less that of their errors."""
    squares = (per_text.mean(0) ** 2).sum()
    noise = (per_text.var(0, ddof=1) / len(per_text)).sum()
    # where noise is nearly all there is, its estimate may exceed the whole
    return float(np.sqrt(max(squares - noise, 0.05 * squares))) or 1.0


def _same_texts(base: EdgeScores, tuned: EdgeScores) -> tuple[np.ndarray, np.ndarray]:
    if base.graph != tuned.graph:
        raise DataError(f"circuits of {base.graph} and {tuned.graph} cannot be compared: both models need one architecture")
    if base.per_text is None or tuned.per_text is None:
        raise DataError(
            f"the scores of {base.method!r} keep none of every text, which intervals and the models' own noise need: use eap-ig"
        )
    if len(base.per_text) != len(tuned.per_text):
        raise DataError(f"base was scored on {len(base.per_text)} texts and tuned on {len(tuned.per_text)}: score both on the same pairs")
    one, other = ({"method": scores.method, **{key: scores.notes.get(key) for key in _NOTED}} for scores in (base, tuned))
    for what, first in one.items():
        if first != other[what]:
            raise DataError(
                f"base was scored with {what} {first!r} and tuned with {other[what]!r}: only scores of one kind have a difference"
            )
    return base.per_text.astype(np.float64), tuned.per_text.astype(np.float64)
