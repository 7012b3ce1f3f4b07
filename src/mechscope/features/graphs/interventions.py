"""Does the model do what its graph says? Latents are ablated or scaled in the model itself, and what changes is set beside what the graph predicts.

What a latent wrote in the prompt, f D, is multiplied by a factor at every MLP that it writes to; the model runs on as it is, with its own patterns, norms
and MLPs (errors are kept: `mechscope.features.splice` with the latent scaled does the same to one latent). Read are the latents' values before their
activation rule, and the logits less their mean. The graph predicts the direct effect (the edge times factor − 1), and that by all paths through latents;
neither knows of patterns and scales that move. Ameisen et al. 2025, §5.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features.graphs.graph import AttributionGraph
from mechscope.features.graphs.influence import predicted_effects
from mechscope.instrument import Edit, Execution, Walk, intervene, record
from mechscope.stats.inference import MIN_TEXTS, estimate, rank_correlation, too_few
from mechscope.stats.skewness import ThirdMoments

# tokens of a batch of prompts that are changed at once
_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class LatentChange:
    """A change of what latents write in the prompt.

    Attributes:
        name: What it is called.
        latents: Numbers of the latents' nodes.
        factor: What they write is multiplied by this: 0 ablates.
        chosen: How it was chosen: `influence`, `random`, `group`.
    """

    name: str
    latents: tuple[int, ...]
    factor: float
    chosen: str


def changes_of(
    graph: AttributionGraph,
    kept: np.ndarray,
    reached: np.ndarray,
    *,
    count: int,
    factor: float = 0.0,
    groups: Sequence[tuple[str, Sequence[str]]] = (),
    seed: int = 0,
) -> list[LatentChange]:
    """Return the changes that are tried: groups, the latents of most influence, and as many random ones that the pruned graph leaves out.

    Args:
        graph: The graph.
        kept: ``(node)``: whether a node is in the pruned graph.
        reached: ``(node)``: influence.
        count: Latents of most influence, and random ones.
        factor: What they write is multiplied by this.
        groups: Names with their nodes, latents among them.
        seed: Of the random ones.

    Raises:
        SettingsError: A group names a node that the graph does not have, or holds no latent.
    """
    names = graph.nodes["node"].tolist()
    number = {name: at for at, name in enumerate(names)}
    latents = graph.where("latent")
    found = []
    for name, nodes in groups:
        for node in nodes:
            if node not in number:
                raise SettingsError(
                    f"group {name!r} names {node!r}, which is no node of this graph: groups belong to the prompt that they were made for"
                )
        own = tuple(number[node] for node in nodes if number[node] in set(latents.tolist()))
        if not own:
            raise SettingsError(f"group {name!r} holds no latent: errors, tokens and logits cannot be scaled")
        found.append(LatentChange(name, own, factor, "group"))
    inside = latents[kept[latents]]
    best = inside[np.argsort(-reached[inside], kind="stable")][:count]
    outside = latents[~kept[latents]]
    drawn = np.random.default_rng(seed).permutation(outside)[: len(best)]
    for chosen, several in (("influence", best), ("random", np.sort(drawn))):
        found += [LatentChange(names[each], (int(each),), factor, chosen) for each in several]
    return found


@torch.no_grad()
def tried(
    graph: AttributionGraph, changes: Sequence[LatentChange], targets: np.ndarray, *, execution: Execution = Execution()
) -> pd.DataFrame:
    """Make changes in the model and set what happens beside what the graph predicts.

    Args:
        graph: The graph, with every active latent that may matter.
        changes: What is changed.
        targets: Numbers of the nodes that are read: latents and logits.
        execution: Tokens of a batch, progress.

    Returns:
        One row per change and logit, or latent that the changed ones reach by some path: `change`, `chosen`, `latents` (how many), `factor`, `target`, `kind`,
        `value` (of the target in the prompt), `direct`, `total` (predicted), `measured`.
    """
    nodes, values = graph.nodes, graph.nodes["value"].to_numpy()
    names, kinds, tokens = nodes["node"].to_numpy(), nodes["kind"].to_numpy(), len(graph.ids)
    at_once = max(1, execution.tokens(_TOKENS_PER_BATCH) // tokens - 1)
    parts = []
    for start in range(0, len(changes), at_once):
        batch = changes[start : start + at_once]
        measured = _measured(graph, batch, targets)
        for change, own in zip(batch, measured, strict=True):
            share = np.zeros(len(nodes))
            share[list(change.latents)] = change.factor - 1
            direct, total = predicted_effects(graph.edges, values, share)
            # logits are always told of, as a change may reach them by attention alone
            reached = np.flatnonzero((total[targets] != 0) | (kinds[targets] == "logit"))
            at = targets[reached]
            parts.append(
                pd.DataFrame(
                    {
                        "change": change.name,
                        "chosen": change.chosen,
                        "latents": len(change.latents),
                        "factor": change.factor,
                        "target": names[at],
                        "kind": kinds[at],
                        "value": values[at],
                        "direct": direct[at],
                        "total": total[at],
                        "measured": own[reached],
                    }
                )
            )
        execution.told("interventions", min(start + at_once, len(changes)), len(changes))
    return pd.concat(parts, ignore_index=True)


def _measured(graph: AttributionGraph, changes: Sequence[LatentChange], targets: np.ndarray) -> Float[np.ndarray, "change target"]:
    """Run the prompt once as it is and once with every change, and return by how much each target moves."""
    run, subject = graph.replacement.run, graph.replacement.run.subject
    deltas = _deltas(graph, changes)
    edits = [Edit("mlp_output", layer, partial(_added, delta)) for layer, delta in deltas.items()]
    with intervene(subject, *edits), record(subject, "mlp_input") as seen:
        last = Walk(subject, torch.tensor([graph.ids] * (len(changes) + 1), device=subject.device)).run()[:, -1]
    read = [seen["mlp_input", layer].reshape(len(last), len(graph.ids), -1).to(run.embedding) for layer in range(graph.layers)]
    latents, logits = (
        targets[graph.nodes["kind"].to_numpy()[targets] == "latent"],
        targets[graph.nodes["kind"].to_numpy()[targets] == "logit"],
    )
    found = np.zeros((len(changes), len(targets)))
    place = {int(target): at for at, target in enumerate(targets)}
    own = numbers(graph, latents)
    for layer in graph.replacement.layer[own].unique().tolist():
        some = own[graph.replacement.layer[own] == layer]
        moved = read[layer][1:] - read[layer][:1]
        along = (moved[:, graph.replacement.position[some]] * graph.replacement.encoders(some)).sum(-1)
        at = [place[int(latents[number])] for number in (graph.replacement.layer[own] == layer).nonzero()[:, 0].tolist()]
        found[:, at] = along.cpu().double().numpy()
    chosen = torch.as_tensor(graph.nodes["index"].to_numpy()[logits], device=last.device)
    every = run.readout.logits(last.to(run.dtype)).to(run.dtype)
    centred = every[:, chosen] - every.mean(-1, keepdim=True)
    found[:, [place[int(target)] for target in logits]] = (centred[1:] - centred[:1]).cpu().double().numpy()
    return found


def _added(delta: Tensor, old: Tensor) -> Tensor:
    return old + delta.to(old)


def _deltas(graph: AttributionGraph, changes: Sequence[LatentChange]) -> dict[int, Float[Tensor, "row token d_model"]]:
    """Return what is added at each MLP's output, nothing in the first row."""
    given = graph.replacement
    rows = torch.tensor([at + 1 for at, change in enumerate(changes) for _ in change.latents], device=given.value.device)
    factors = given.value.new_tensor([change.factor - 1 for change in changes for _ in change.latents])
    own = numbers(graph, np.array([latent for change in changes for latent in change.latents], dtype=np.int64))
    deltas = {}
    for layer in range(graph.layers):
        written = given.decoders(own, layer) * factors[:, None]
        if written.any():
            delta = written.new_zeros(len(changes) + 1, len(graph.ids), written.shape[1])
            deltas[layer] = delta.index_put_((rows, given.position[own]), written, accumulate=True)
    return deltas


def numbers(graph: AttributionGraph, nodes: np.ndarray) -> Tensor:
    """Return the places of latents' nodes among all active latents."""
    return torch.as_tensor(graph.rows[nodes], device=graph.replacement.value.device)


def agreement(table: pd.DataFrame, likeliest: str) -> pd.DataFrame:
    """Return how well the graph predicts interventions, for those of each choice: means over changes.

    Args:
        table: What `tried` returned.
        likeliest: The node of the likeliest next token.

    Returns:
        One row per choice and measure: `chosen`, `measure`, `n` (changes), `value`, `low`, `high`, `withheld`. Measures: the rank correlation (Spearman) of
        predicted and measured changes over a change's targets, `rank correlation, direct` (targets with an edge) and `rank correlation, all paths`; the mean
        |change| of the likeliest logit, `likeliest logit, measured` and `likeliest logit, predicted` (by all paths).
    """
    rows = []
    for chosen, own in table.groupby("chosen", sort=False):
        measures: dict[str, list[float]] = {"rank correlation, direct": [], "rank correlation, all paths": []}
        for _, each in own.groupby("change", sort=False):
            edges = each[each["direct"] != 0]
            measures["rank correlation, direct"].append(_rank(edges, "direct"))
            reached = each[each["total"] != 0]
            measures["rank correlation, all paths"].append(_rank(reached, "total"))
        logit = own[own["target"] == likeliest].groupby("change", sort=False)[["measured", "total"]].first().abs()
        every = own["change"].nunique()
        measures["likeliest logit, measured"] = logit["measured"].tolist()
        measures["likeliest logit, predicted"] = logit["total"].tolist()
        for measure, values in measures.items():
            most = 1.0 if "correlation" in measure else np.inf
            rows.append({"chosen": chosen, "measure": measure, "changes": every, **_mean(np.array(values, dtype=float), most=most)})
    return pd.DataFrame(rows)


def _rank(table: pd.DataFrame, predicted: str) -> float:
    return rank_correlation(table[predicted].to_numpy(), table["measured"].to_numpy()).rho


def _mean(values: np.ndarray, *, most: float) -> dict[str, object]:
    """Return a mean with its interval, whose ends are not outside of what a value can be."""
    moments = ThirdMoments()
    moments.update_many(values)
    mean = estimate(moments)
    n, ends = int(mean.n), np.clip([mean.low, mean.high], -most, most)
    withheld = too_few(n, "interventions") if n < MIN_TEXTS else ""
    return {"n": n, "value": float(mean.mean), "low": float(ends[0]), "high": float(ends[1]), "withheld": withheld}
