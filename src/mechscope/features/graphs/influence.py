"""How much of the logits goes through each node and edge, what can be left out, and how much of it latents explain.

A is |edges| with every row divided by its sum, p the logits' probabilities. Influence of a node is p (A + A² + …): the share of the logits' inputs that can be
followed back to it (Ameisen et al. 2025, §3.2.3 and §5.1). The graph has no circle, so the sum ends after as many terms as there are layers.

Signs are lost on the way: what two paths cancel counts twice. `predicted_effects` keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import sparse

from mechscope.errors import SettingsError
from mechscope.shapes import by_shape


def normalised(edges: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return |edges| with each target's inputs summing to one; targets without inputs stay empty."""
    size = abs(edges).astype(np.float64).tocsr()
    total = np.asarray(size.sum(axis=1)).ravel()
    return sparse.diags_array(np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)) @ size


def influence(shares: sparse.csr_matrix, weights: Float[np.ndarray, " node"]) -> Float[np.ndarray, " node"]:
    """Return p (A + A² + …) of a graph without circles.

    Args:
        shares: ``(node, node)``: A, targets by sources.
        weights: ``(node)``: p.
    """
    total, current = np.zeros_like(weights), weights
    # a circle would go on for ever; a path meets no node twice
    for _ in range(shares.shape[0] + 1):
        current = current @ shares
        if not current.any():
            break
        total = total + current
    return total


@dataclass(frozen=True)
class Pruned:
    """What is left of a graph.

    Attributes:
        nodes: ``(node)``: whether a node is left.
        edges: ``(node, node)``: the edges that are left.
        edge_influence: ``(node, node)``: the influence that goes through each of them.
        influence: ``(node)``: of every node, in the whole graph.
        cumulative: ``(node)``: the share of all influence that nodes of this influence and more have.
    """

    nodes: Bool[np.ndarray, " node"]
    edges: sparse.csr_matrix
    edge_influence: sparse.csr_matrix
    influence: Float[np.ndarray, " node"]
    cumulative: Float[np.ndarray, " node"]

    __repr__ = by_shape


def pruned(
    edges: sparse.csr_matrix, weights: Float[np.ndarray, " node"], nodes: pd.DataFrame, *, node_share: float = 0.8, edge_share: float = 0.98
) -> Pruned:
    """Keep the fewest nodes that have a share of all influence, then the fewest edges, then what is still on a way to the logits.

    Tokens and logits stay in any case. Latents that nothing leads to, and latents and errors that lead nowhere, leave.

    Args:
        edges: ``(node, node)``: targets by sources.
        weights: ``(node)``: the logits' probabilities, 0 for others.
        nodes: The nodes, with `kind`.
        node_share: Share of all nodes' influence.
        edge_share: Share of the influence of the edges between nodes that are left.

    Raises:
        SettingsError: A share is not between 0 and 1.
    """
    for name, share in (("node_share", node_share), ("edge_share", edge_share)):
        if not 0 <= share <= 1:
            raise SettingsError(f"{name}={share}: shares of influence are between 0 and 1")
    kind = nodes["kind"].to_numpy()
    whole = influence(normalised(edges), weights)
    always = np.isin(kind, ("token", "logit"))
    left = always | (whole >= _threshold(whole, node_share))
    mark = sparse.diags_array(left.astype(np.float64))
    inner = sparse.csr_matrix(mark @ edges.astype(np.float64) @ mark)
    shares = normalised(inner)
    through = sparse.diags_array(influence(shares, weights) + weights) @ shares
    through = sparse.csr_matrix(through)
    through.eliminate_zeros()
    through.data[through.data < _threshold(through.data, edge_share)] = 0.0
    through.eliminate_zeros()
    while True:
        into, out = np.diff(through.indptr) > 0, np.diff(through.tocsc().indptr) > 0
        staying = left & (always | (out & ((kind != "latent") | into)))
        if (staying == left).all():
            break
        left = staying
        mark = sparse.diags_array(left.astype(np.float64))
        through = sparse.csr_matrix(mark @ through @ mark)
        through.eliminate_zeros()
    pattern = through.copy()
    pattern.data[:] = 1.0
    return Pruned(left, sparse.csr_matrix(inner.multiply(pattern)), through, whole, _cumulative(whole))


def _threshold(values: np.ndarray, share: float) -> float:
    """Return the least value of the fewest largest ones that add up to a share of all."""
    ordered = np.sort(values)[::-1]
    if not ordered.sum() > 0:
        return 0.0
    reached = np.cumsum(ordered) / ordered.sum()
    return float(ordered[min(int(np.searchsorted(reached, share)), len(ordered) - 1)])


def _cumulative(values: np.ndarray) -> np.ndarray:
    order = np.argsort(-values, kind="stable")
    found = np.zeros_like(values)
    found[order] = np.cumsum(values[order]) / (values.sum() or 1.0)
    return found


@dataclass(frozen=True)
class Scores:
    """How much of a graph latents explain; both are 1 where there are no errors.

    Attributes:
        replacement: Influence of the tokens, as a share of that of tokens and errors: how much of the way from the logits back ends at tokens.
        completeness: Share of a node's inputs that are no errors, averaged over nodes by their influence.
    """

    replacement: float
    completeness: float


def scores(edges: sparse.csr_matrix, weights: Float[np.ndarray, " node"], nodes: pd.DataFrame) -> Scores:
    """Return how much of a graph latents explain (Ameisen et al. 2025, §5.1)."""
    kind, shares = nodes["kind"].to_numpy(), normalised(edges)
    reached = influence(shares, weights)
    tokens, errors = reached[kind == "token"].sum(), reached[kind == "error"].sum()
    weighed = reached + weights
    explained = 1 - np.asarray(shares[:, kind == "error"].sum(axis=1)).ravel()
    return Scores(
        float(tokens / (tokens + errors)) if tokens + errors else float("nan"), float((explained * weighed).sum() / weighed.sum())
    )


def predicted_effects(
    edges: sparse.csr_matrix, values: Float[np.ndarray, " node"], changed: Float[np.ndarray, " node"]
) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"]]:
    """Return what a change of what nodes write does to every node: directly, and by all paths, where patterns, scales and the set of active latents are held.

    Args:
        edges: ``(node, node)``: targets by sources.
        values: ``(node)``: values of latents and logits; NaN for others.
        changed: ``(node)``: the change of what each node writes, as a share of it: −1 for what is ablated.

    Returns:
        Changes of the nodes' values. The change that is given is not among them.
    """
    direct = edges @ changed
    held = np.nan_to_num(values)
    total, share = np.zeros_like(direct), changed.astype(np.float64)
    for _ in range(edges.shape[0] + 1):
        change = edges @ share
        if not change.any():
            break
        total = total + change
        # a latent whose value changes by a share of it writes so much more
        share = np.divide(change, held, out=np.zeros_like(change), where=held != 0)
    return direct, total
