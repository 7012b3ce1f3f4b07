"""What fine-tuning changed in a circuit: overlap of base and tuned beside two nulls, and the shift of every edge's score.

Two circuits of one model, found on different texts, are not equal either, so an overlap of base and tuned says nothing alone. It is shown beside
(a) what random circuits of those sizes share, and (b) what circuits of the same model share when each is found on another half of the texts. For
(b) base and tuned are compared on disjoint halves too: only then do they differ by as much noise as the two circuits of one model. Models may differ
in how noisy they are, and then two circuits of the quieter one share more than it can share with the noisier one though nothing else differs. So
what base and tuned share is held against the smaller of the two self-overlaps: a lower bound of the change.
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
from mechscope.errors import DataError
from mechscope.stats.inference import benjamini_hochberg, paired_difference

# what scores must share besides their method
_NOTED = ("metric", "source", "texts", "steps", "points")
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
    resamples: int = 50,
    draws: int = 200,
    seed: int = 0,
    **manner: Unpack[Manner],
) -> pd.DataFrame:
    """Compare the circuits of two models at several sizes, beside both nulls.

    Args:
        base: Scores of the base model.
        tuned: Scores of the tuned model, on the same texts.
        fractions: Sizes, as fractions of all edges.
        resamples: Random halvings of the texts.
        draws: Random circuits of the layer-matched null.
        seed: Seed of halvings and draws.
        manner: Options of `choose` but its size.

    Returns:
        One row per `fraction` and `what` (edges, nodes): `base_size`, `tuned_size`, `jaccard` of the two circuits of all texts; `null`, `null_low`,
        `null_high`, `null_p` of layer-matched random circuits; on halves of the texts `across` (base on one half with tuned on the other; 2.5 % and
        97.5 % quantiles over halvings `across_low`, `across_high`), `self_base` and `self_tuned` (both halves, one model); `change`, in each halving the
        smaller of the two selfs − across, with `change_low`, `change_high`: positive where the models share less than the noisier one shares with
        itself, so where tuning changed the circuit. It is a lower bound and may be negative. Halvings share texts, so quantiles over them show their
        spread and are not confidence intervals.

    Raises:
        DataError: The scores are of different graphs, methods, metrics or numbers of texts, or were not kept by text.
        SettingsError: The options are not as `choose` needs them.
    """
    first, second = _same_texts(base, tuned)
    texts, graph = len(first), base.graph
    if texts < 4:
        raise DataError(f"{texts} texts cannot be halved for the models' own noise: at least 4 are needed")
    random = np.random.default_rng(seed)
    sides = [np.isin(np.arange(texts), random.permutation(texts)[: texts // 2]) for _ in range(resamples)]
    means = [(first[side].mean(0), first[~side].mean(0), second[side].mean(0), second[~side].mean(0)) for side in sides]
    rows = []
    for fraction in fractions:
        whole = choose(base, fraction=fraction, **manner), choose(tuned, fraction=fraction, **manner)
        by_chance = overlap(*whole, draws=draws, seed=seed).table
        halves = [tuple(choose((graph, mean), fraction=fraction, **manner) for mean in four) for four in means]
        for what, measure in _MEASURES.items():
            across = np.array([(measure(a, d) + measure(b, c)) / 2 for a, b, c, d in halves])
            own = np.array([(measure(a, b), measure(c, d)) for a, b, c, d in halves])
            # a quiet model agrees with itself more than it can agree with a noisy one
            change = own.min(1) - across
            null = by_chance[(by_chance["of"] == what) & (by_chance["null"] == "layer-matched")].iloc[0]
            sizes = {"base_size": int(null["first"]), "tuned_size": int(null["second"]), "jaccard": measure(*whole)}
            nulls = {"null": null["expected"], "null_low": null["low"], "null_high": null["high"], "null_p": null["p"]}
            selves = {"self_base": own[:, 0].mean(), "self_tuned": own[:, 1].mean()}
            spread = {**_quantiles("across", across), **selves, **_quantiles("change", change)}
            rows.append({"what": what, "fraction": fraction, **sizes, **nulls, **spread, "n": texts})
    return pd.DataFrame(rows)


def _quantiles(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: values.mean(), f"{name}_low": np.quantile(values, 0.025), f"{name}_high": np.quantile(values, 0.975)}


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
