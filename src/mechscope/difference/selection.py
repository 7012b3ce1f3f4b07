"""Which layers or heads changed most: rules that turn the difference's tables into `Components`.

A rule gives every candidate (a layer or a head) a score, ranks by it and keeps the first k. The paper's own rule (arXiv 2505.17073) is
not stated; the top layers by mean attention KL reproduce its {2, 3, 5} from its published chart, so that is the default, with a quarter
of the layers (3 of 12). Attention KL is blind to heads whose values or output projections changed; the change of what a head writes on
the same input is not, so it is the default for heads. Random and last layers are controls. How far a selection depends on the documents at
hand is measured by redoing it on bootstrap replicates: `frequency` is the share of them in which a candidate is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechscope.errors import SettingsError
from mechscope.shapes import by_shape
from mechscope.stats.chance import stable_hash
from mechscope.stats.ranking import HEAD_SCORE_COLUMNS, LAYER_SCORE_COLUMNS, combined_score
from mechscope.subject.components import Components

Kind = Literal["layer", "head"]


@dataclass(frozen=True)
class Selection:
    """What a rule chose.

    Attributes:
        rule: The rule's name.
        components: The chosen layers or heads.
        table: One row per candidate, best first: `rule`, `component`, `kind`, `layer`, `head` (-1 for a layer), `rank` (from 1), `score`,
            `chosen`.
    """

    rule: str
    components: Components
    table: pd.DataFrame

    __repr__ = by_shape


@dataclass(frozen=True)
class _Rule:
    """A score takes its columns, (columns, *batch, n), the candidates' names and the seed, and returns (*batch, n), higher first."""

    kind: Kind
    columns: tuple[str, ...]
    score: Callable[[np.ndarray, list[str], int], np.ndarray]


def _magnitude(columns: np.ndarray, names: list[str], seed: int) -> np.ndarray:
    return np.abs(columns[0])


def _average(columns: np.ndarray, names: list[str], seed: int) -> np.ndarray:
    averages: np.ndarray = np.abs(columns).mean(axis=0)
    return averages


def _combined(columns: np.ndarray, names: list[str], seed: int) -> np.ndarray:
    return combined_score(columns)


def _depth(columns: np.ndarray, names: list[str], seed: int) -> np.ndarray:
    return np.arange(len(names), dtype=np.float64)


def _random(columns: np.ndarray, names: list[str], seed: int) -> np.ndarray:
    return np.array([stable_hash(seed, name) * 2.0**-63 for name in names])


_RULES: dict[str, _Rule] = {
    "layers_by_kl": _Rule("layer", ("kl_base_tuned",), _magnitude),
    "layers_by_write": _Rule("layer", ("write_change", "mlp_write_change"), _average),
    "layers_by_score": _Rule("layer", LAYER_SCORE_COLUMNS, _combined),
    "heads_by_kl": _Rule("head", ("kl_base_tuned",), _magnitude),
    "heads_by_entropy": _Rule("head", ("entropy_change",), _magnitude),
    "heads_by_write": _Rule("head", ("write_change",), _magnitude),
    "heads_by_score": _Rule("head", HEAD_SCORE_COLUMNS, _combined),
    "last_layers": _Rule("layer", (), _depth),
    "random_layers": _Rule("layer", (), _random),
    "random_heads": _Rule("head", (), _random),
}
RULES = tuple(_RULES)


def default_number(n_layers: int) -> int:
    """Return how many layers are chosen by default: a quarter of them, the paper's 3 of 12, and at least one."""
    return max(1, round(n_layers / 4))


def select(
    rule: str, heads: pd.DataFrame, layers: pd.DataFrame, *, number: int | None = None, seed: int = 0, rows: str = "all"
) -> Selection:
    """Choose the layers or heads that a rule ranks first.

    Args:
        rule: One of `RULES`. `*_by_kl` rank by mean KL(base ‖ tuned), `heads_by_entropy` by |entropy change|, `heads_by_write` by
            how much of what a head writes changed on the same input, `layers_by_write` by the mean of its heads' (or its mixer's) and of its MLP's,
            `*_by_score` by the combined score of `mechscope.stats.ranking`, `last_layers` by depth, `random_*` by the seed. Layers that do not attend are
            no candidates of rules that rank by attention.
        heads: The heads table.
        layers: The layers table.
        number: How many to choose; by default `default_number` layers, or as many heads as those layers hold.
        seed: Seed of the random rules.
        rows: Which query rows' statistics to use.

    Returns:
        The selection; ties go to the lower layer, then the lower head.

    Raises:
        SettingsError: The rule, the rows, a column or the number does not exist, or a score is NaN.
    """
    ranked = _score(rule, heads, layers, replicates=None, number=number, seed=seed, rows=rows)
    order = _order(ranked.scores)
    rank = np.argsort(order) + 1
    table = pd.DataFrame(
        {
            "rule": rule,
            "component": ranked.names,
            "kind": ranked.kind,
            "layer": ranked.layer,
            "head": ranked.head,
            "rank": rank,
            "score": ranked.scores,
            "chosen": rank <= ranked.number,
        }
    )
    chosen = table[table["chosen"]]
    pairs = zip(chosen["layer"], chosen["head"], strict=True)
    components = Components.of_layers(chosen["layer"]) if ranked.kind == "layer" else Components.of_heads(pairs)
    return Selection(rule, components, table.iloc[order].reset_index(drop=True))


def stability(
    rule: str,
    heads: pd.DataFrame,
    layers: pd.DataFrame,
    replicates: Mapping[str, Float[np.ndarray, "replicates n_layers n_heads"]],
    *,
    number: int | None = None,
    seed: int = 0,
    rows: str = "all",
) -> tuple[Float[np.ndarray, " candidates"], int]:
    """Redo a selection on every bootstrap replicate and return how often each candidate is chosen.

    Rules of layers take the mean over heads of what was resampled. Columns that were not resampled, such as the weight change, which no
    document touches, keep their value from the table; where that is all a rule reads, the frequencies are 1 and 0.

    Args:
        rule: One of `RULES`.
        heads: The heads table.
        layers: The layers table.
        replicates: Resampled means by column name, such as `kl_base_tuned`, `entropy_change` and `write_change`, of the same rows.
        number: How many to choose; by default `default_number` layers, or as many heads as those layers hold.
        seed: Seed of the random rules.
        rows: Which query rows' statistics to use.

    Returns:
        The share of replicates that choose each candidate, in the order of layers (and heads within), and the number of replicates used:
        one that drew no document with a value says nothing and is left out. NaN and 0 where none is left.

    Raises:
        SettingsError: The rule, the rows, a column or the number does not exist, a score is NaN, or an array does not fit the tables.
    """
    ranked = _score(rule, heads, layers, replicates=replicates, number=number, seed=seed, rows=rows)
    scores = np.atleast_2d(ranked.scores)
    scores = scores[~np.isnan(scores).any(axis=-1)]
    if len(scores) == 0:
        return np.full(len(ranked.names), np.nan), 0
    chosen = np.zeros(scores.shape)
    np.put_along_axis(chosen, _order(scores)[:, : ranked.number], 1.0, axis=-1)
    return chosen.mean(axis=0), len(scores)


def selection_table(
    heads: pd.DataFrame,
    layers: pd.DataFrame,
    replicates: Mapping[str, Float[np.ndarray, "replicates n_layers n_heads"]] | None = None,
    *,
    rules: Iterable[str] = RULES,
    n_selected_layers: int | None = None,
    n_selected_heads: int | None = None,
    seed: int = 0,
    rows: str = "all",
) -> pd.DataFrame:
    """Build the table `selection`: one row per candidate and rule, best first, with how often resampling chooses it.

    Args:
        heads: The heads table.
        layers: The layers table.
        replicates: Resampled means by column name, such as `kl_base_tuned`, `entropy_change` and `write_change`, of the same rows; without, `frequency` is
            NaN and `n_resamples` 0.
        rules: Which rules.
        n_selected_layers: How many layers a rule of layers chooses; by default `default_number`.
        n_selected_heads: How many heads a rule of heads chooses; by default as many as the default number of layers holds.
        seed: Seed of the random rules.
        rows: Which query rows' statistics to use.

    Raises:
        SettingsError: A rule, the rows, a column or the number does not exist, a score is NaN, or an array does not fit the tables.
    """
    tables = []
    for rule in rules:
        number = n_selected_layers if _rule(rule).kind == "layer" else n_selected_heads
        table = select(rule, heads, layers, number=number, seed=seed, rows=rows).table
        frequency, used = np.full(len(table), np.nan), 0
        if replicates:
            frequency, used = stability(rule, heads, layers, replicates, number=number, seed=seed, rows=rows)
        # frequencies are in the order of layers and heads, the table in the order of rank
        position = np.argsort(np.lexsort((table["head"], table["layer"])))
        tables.append(table.assign(frequency=frequency[position], n_resamples=used))
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class _Ranked:
    """Candidates of a rule, in the order of layers (and heads within), with scores of shape (n,) or (replicates, n)."""

    kind: Kind
    layer: np.ndarray
    head: np.ndarray
    names: list[str]
    scores: np.ndarray
    number: int


def _rule(name: str) -> _Rule:
    if name not in _RULES:
        raise SettingsError(f"selection rule {name!r} is not known: use one of {', '.join(RULES)}")
    return _RULES[name]


def _score(
    name: str,
    heads: pd.DataFrame,
    layers: pd.DataFrame,
    *,
    replicates: Mapping[str, np.ndarray] | None,
    number: int | None,
    seed: int,
    rows: str,
) -> _Ranked:
    rule = _rule(name)
    heads, layers = _of_rows(heads, "heads", rows), _of_rows(layers, "layers", rows)
    heads, layers = heads.sort_values(["layer", "head"]), layers.sort_values("layer")
    n_layers, attending = len(layers), sorted(set(heads["layer"]))
    n_heads = len(heads) // max(len(attending), 1)
    grid = [(layer, head) for layer in attending for head in range(n_heads)]
    if (
        list(layers["layer"]) != list(range(n_layers))
        or not set(attending) <= set(range(n_layers))
        or list(zip(heads["layer"], heads["head"], strict=True)) != grid
    ):
        raise SettingsError(
            f"the heads and layers tables have {len(heads)} heads and {n_layers} layers for rows={rows!r}: "
            "give each layer once and the same heads for every layer that has heads, counted from 0"
        )
    attends = layers["layer"].isin(attending)
    if any(layers.loc[~attends, column].isna().any() for column in rule.columns if rule.kind == "layer" and column in layers):
        # what the rule ranks by is nothing that layers without heads have
        layers = layers[attends]
    table = layers if rule.kind == "layer" else heads
    layer = table["layer"].to_numpy(dtype=np.int64)
    head = np.full(len(layers), -1) if rule.kind == "layer" else table["head"].to_numpy(dtype=np.int64)
    names = [str(Components.of_layers([i]) if j < 0 else Components.of_heads([(i, j)])) for i, j in zip(layer, head, strict=True)]
    columns = [_column(column, table, rule.kind, names, replicates or {}, (attending, n_heads)) for column in rule.columns]
    batch = np.broadcast_shapes(*(c.shape[:-1] for c in columns)) if columns else ()
    stacked = np.stack([np.broadcast_to(c, (*batch, len(names))) for c in columns]) if columns else np.zeros((0, len(names)))
    scores = rule.score(stacked, names, seed)
    if replicates and scores.ndim == 1:
        scores = np.broadcast_to(scores, (len(next(iter(replicates.values()))), len(names)))
    if number is None:
        number = default_number(len(layers)) if rule.kind == "layer" else default_number(len(attending)) * n_heads
    if not 1 <= number <= len(names):
        raise SettingsError(f"{number} {rule.kind}s to select by {name}: the model has {len(names)}, choose from 1 to {len(names)}")
    return _Ranked(rule.kind, layer, head, names, scores, number)


def _of_rows(table: pd.DataFrame, name: str, rows: str) -> pd.DataFrame:
    missing = {"rows", "layer"} - set(table.columns)
    if missing:
        raise SettingsError(f"the {name} table has no column {', '.join(sorted(missing))}: give the table that the difference made")
    chosen = table[table["rows"] == rows]
    if chosen.empty:
        raise SettingsError(
            f"the {name} table has no rows={rows!r}: use one of {', '.join(sorted(table['rows'].unique())) or '(it is empty)'}"
        )
    return chosen


def _column(
    column: str, table: pd.DataFrame, kind: Kind, names: list[str], replicates: Mapping[str, np.ndarray], grid: tuple[list[int], int]
) -> np.ndarray:
    """Return a column over the candidates: resampled (replicates, n) where that was done, else (n,) from the table; `grid`: layers with heads, heads."""
    if column in replicates:
        resampled = np.asarray(replicates[column], dtype=np.float64)
        shape = len(grid[0]), grid[1]
        if resampled.ndim != 3 or resampled.shape[1:] != shape:
            raise SettingsError(
                f"resampled {column} has shape {resampled.shape}: give (replicates, {shape[0]}, {shape[1]}) for these tables"
            )
        if kind == "head":
            return resampled.reshape(len(resampled), -1)
        # a layer without heads keeps its value from the table
        whole = np.tile(table[column].to_numpy(dtype=np.float64), (len(resampled), 1))
        whole[:, np.isin(table["layer"], grid[0])] = resampled.mean(axis=2)
        return whole
    if column not in table.columns:
        raise SettingsError(
            f"the {kind}s table has no column {column!r}, which the rule ranks by: choose another rule or run the difference again"
        )
    values = table[column].to_numpy(dtype=np.float64)
    if np.isnan(values).any():
        bad = names[int(np.flatnonzero(np.isnan(values))[0])]
        raise SettingsError(
            f"column {column!r} of the {kind}s table is NaN for {bad}: it cannot be ranked; choose another rule or more documents"
        )
    return values


def _order(scores: np.ndarray) -> np.ndarray:
    # stable, so that ties keep the order of layers and heads
    return np.argsort(-scores, axis=-1, kind="stable")
