"""How much of what a model does a circuit of latents keeps, and how much is left without it (Marks et al. 2024, §3.4).

    faithfulness   (m(C) − m(∅)) / (m(M) − m(∅))          only the nodes of C are as they are; M: all of them, ∅: none
    complement     the same of M without C                 0 where C holds everything that matters

Errors are nodes and no one can read them, so three curves are given: with the errors kept (all of them are as they are, in the circuit and in its complement),
removed (all are filled in), and in the circuit (each as its rank says). Beside each stand random latents: as many at every place, drawn among those that are
active on the texts and not in the circuit (its own only where too few others are active), with the same errors.
The unit is the text; shares are ratios of means with Fieller's interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from mechscope.choices import Errors, Filling
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, Runs, check_fits, metric_of
from mechscope.features.node_effects import TOKENS_PER_BATCH
from mechscope.features.node_patching import Chosen, Fillings, Means, only, without
from mechscope.features.places import Place
from mechscope.features.standing import Node, Standing, require
from mechscope.instrument import CachedRun, Execution
from mechscope.stats.shares import Shares, shares_of
from mechscope.subject import Subject

ERRORS: tuple[Errors, ...] = get_args(Errors)
_ABSENT = "the model and the model without any node do not differ in the metric"
Circuit = Mapping[Place, Chosen]


def faithfulness(
    subject: Subject,
    standing: Sequence[Standing],
    pairs: Pairs,
    ranked: Sequence[Node],
    *,
    sizes: Sequence[int] | None = None,
    active: Mapping[Place, Sequence[int]] | None = None,
    draws: int = 5,
    filling: Filling = "corrupt",
    means: Mapping[Place, Means] | None = None,
    metric: str = "logit-diff",
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Measure circuits of the first so many nodes, and their complements; better on texts from which they were not ranked.

    Args:
        subject: The model.
        standing: The autoencoders, in the order of the run.
        pairs: The texts.
        ranked: Nodes, the most important first.
        sizes: How many of them make a circuit; by default none, 1, 2, 4, … and all of them.
        active: By place: the latents that random ones are drawn from, those of the circuit last; None for no random latents.
        draws: Random circuits of each size.
        filling: What stands in the place of nodes that are left out.
        means: For the filling `mean` (`node_means`).
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        execution: Tokens of a batch (1,024 by default), seed of the random latents, progress.

    Returns:
        One row per size and treatment of errors (`errors`: `kept`, `removed`, `in circuit`), the last size being every latent and error there is (`nodes` −1):
        `nodes`, `latents` (of the circuit), `errors`, `metric`, `n` (texts), `value` (mean metric of the circuit), `faithfulness`, `complement`, `random`,
        `random_complement`, each with `_low` and `_high` (95 %), and `withheld`: why they are NaN, or empty.

    Raises:
        MechscopeError: Nodes, texts or metric do not fit the model or each other.
    """
    check_fits(subject, pairs)
    require(standing, ranked)
    chosen = [*dict.fromkeys(size for size in (doubling(len(ranked)) if sizes is None else sizes) if 0 <= size <= len(ranked)), -1]
    random = np.random.default_rng(execution.seed)
    drawn_from = {each.place: np.asarray((active or {}).get(each.place, ()), dtype=int) for each in standing}
    orders = [{place: random.permutation(own).tolist() for place, own in drawn_from.items()} for _ in range(draws if active else 0)]
    plans = [(size, errors) for size in chosen for errors in ERRORS]
    gathered = PerText(pairs)

    @torch.no_grad()
    def run(batch: PairBatch) -> dict[str, np.ndarray]:
        clean = CachedRun(subject, batch.clean, batch.real, sites={each.place.site for each in standing})
        runs = Runs(clean, metric_of(metric, batch, clean))
        fillings = Fillings(subject, standing, batch, filling, means)
        real = fillings.counted(clean.recording)
        units = [only(standing, {}, fillings, real)]
        for size, errors in plans:
            for order in (None, *orders) if size > 0 else (None,):
                inside, outside = _circuits(standing, ranked, size, errors, order)
                units += [only(standing, inside, fillings, real), without(standing, outside, fillings, real)]
        return {"whole": runs.unchanged(), "runs": runs.of(units, progress=gathered.step)}

    number = 1 + 2 * sum(1 + len(orders) * (size > 0) for size, _ in plans)
    gathered.run(run, execution, tokens=TOKENS_PER_BATCH, label="faithfulness", units=number)
    whole, values = gathered["whole"], gathered["runs"]
    return _table(plans, ranked, standing, whole, values[0], values[1:], len(orders), metric)


def doubling(most: int) -> list[int]:
    """Return 0, 1, 2, 4, … and the largest size."""
    sizes = [0]
    while sizes[-1] < most:
        sizes.append(min(most, max(1, 2 * sizes[-1])))
    return sizes


def _circuits(
    standing: Sequence[Standing], ranked: Sequence[Node], size: int, errors: Errors, order: Mapping[Place, Sequence[int]] | None
) -> tuple[Circuit, Circuit]:
    """Return the nodes that a circuit keeps, and those that its complement lacks."""
    inside: dict[Place, Chosen] = {}
    outside: dict[Place, Chosen] = {}
    for each in standing:
        own = [node for node in ranked[: max(size, 0)] if node.place == each.place]
        latents: tuple[int, ...] | None = tuple(node.latent for node in own if node.latent is not None)
        ranked_in = any(node.latent is None for node in own)
        if size < 0:
            latents, ranked_in = None, True
        elif order is not None and latents:
            # the circuit's own last
            latents = tuple(sorted(order.get(each.place, ()), key=set(latents).__contains__)[: len(latents)])
        inside[each.place] = Chosen(latents, errors == "kept" or (errors == "in circuit" and ranked_in))
        outside[each.place] = Chosen(latents, errors == "removed" or (errors == "in circuit" and ranked_in))
    return inside, outside


def _table(
    plans: Sequence[tuple[int, Errors]],
    ranked: Sequence[Node],
    standing: Sequence[Standing],
    whole: Float[np.ndarray, " text"],
    empty: Float[np.ndarray, " text"],
    values: Float[np.ndarray, "run text"],
    draws: int,
    metric: str,
) -> pd.DataFrame:
    rows, at = [], 0
    every = sum(each.dictionary.latents for each in standing)
    for size, errors in plans:
        number = 1 + draws * (size > 0)
        circuit, complement = values[at : at + 2 * number : 2], values[at + 1 : at + 2 * number : 2]
        at += 2 * number
        latents = every if size < 0 else sum(node.latent is not None for node in ranked[:size])
        row = {"nodes": size, "latents": latents, "errors": errors, "metric": metric, "n": len(whole), "value": float(circuit[0].mean())}
        parts = {"faithfulness": circuit[0], "complement": complement[0]}
        parts |= {"random": circuit[1:].mean(0), "random_complement": complement[1:].mean(0)} if number > 1 else {}
        shares: Shares = shares_of(np.stack(list(parts.values())) - empty, whole - empty, absent=_ABSENT)
        for name in ("faithfulness", "complement", "random", "random_complement"):
            found = shares[list(parts).index(name)] if name in parts else None
            row |= {
                f"{name}{end}": np.nan if found is None else getattr(found, part)
                for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))
            }
        rows.append(row | {"withheld": shares.note or ""})
    return pd.DataFrame(rows)
