"""The report's tables as the page shows them: columns with headings, cells with the text to read and the number to sort by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from mechscope.report.comparisons import strategy_order
from mechscope.report.heatmaps import Q_SIGNIFICANT
from mechscope.report.theme import METRIC_NAMES, interval, label, name_of, number, percent

TOP_HEADS = 20


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, a fainter second line, and the number by which its column is sorted (None for text)."""

    text: str
    note: str = ""
    sort: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class View:
    """One table of the page: headings and rows; `kind` names the query rows that it is about, None where it has none."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    kind: str | None = None

    @property
    def headings(self) -> list[tuple[str, bool]]:
        """Every heading and whether its column is one of numbers, which are set to the right."""
        return [(text, i > 0 and any(row[i].sort is not None for row in self.rows)) for i, text in enumerate(self.columns)]


def value(x: object, *, note: str = "", digits: int = 3, sign: bool = False, strong: bool = False) -> Cell:
    """Return a cell for a number."""
    plain = float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else float("nan") if x is None else float(str(x))
    return Cell(number(x, digits=digits, sign=sign), note, None if math.isnan(plain) else plain, strong)


def words(text: object, *, note: str = "", sort: float | None = None, strong: bool = False) -> Cell:
    """Return a cell for a name or a list of components."""
    return Cell(label(text), note, sort, strong)


def kinds(table: pd.DataFrame) -> list[str]:
    """Return the kinds of query rows in a table, all tokens first."""
    found = [str(kind) for kind in dict.fromkeys(table["rows"])]
    return sorted(found, key=lambda kind: kind != "all")


def heads_views(heads: pd.DataFrame, selected: Iterable[tuple[int, int]]) -> list[View]:
    """Return the heads that changed most by KL(base || tuned), one table per kind of query rows; selected heads are strong."""
    marked = set(selected)
    columns = (
        "head",
        "KL(base||tuned)",
        "KL(tuned||base)",
        "entropy base",
        "tuned",
        "change",
        "q",
        "distance",
        "first token",
        "1 − cos z",
        "ΔW",
    )
    views = []
    for kind in kinds(heads):
        top = heads[heads["rows"] == kind].sort_values("kl_base_tuned", ascending=False, kind="stable").head(TOP_HEADS)
        rows = []
        for row in top.to_dict("records"):
            significant = row["entropy_change_q"] < Q_SIGNIFICANT
            rows.append(
                (
                    words(row["component"], sort=float(row["layer"] * 10**6 + row["head"]), strong=(row["layer"], row["head"]) in marked),
                    value(row["kl_base_tuned"], note=f"± {number(row['kl_base_tuned_se'], digits=2)}"),
                    value(row["kl_tuned_base"]),
                    value(row["entropy_base"]),
                    value(row["entropy_tuned"]),
                    value(
                        row["entropy_change"],
                        sign=True,
                        strong=significant,
                        note=interval(row["entropy_change_low"], row["entropy_change_high"], sign=True),
                    ),
                    value(row["entropy_change_q"], digits=2, strong=significant),
                    value(row["distance_tuned"] - row["distance_base"], sign=True),
                    value(row["sink_tuned"] - row["sink_base"], sign=True),
                    value(row["z_cosine_distance"]),
                    value(row["weight_change"]),
                )
            )
        views.append(View(columns, tuple(rows), kind))
    return views


def layers_views(layers: pd.DataFrame, selected: Iterable[int]) -> list[View]:
    """Return every layer's numbers, one table per kind of query rows; selected layers are strong."""
    marked = set(selected)
    columns = (
        "layer",
        "KL(base||tuned)",
        "KL(tuned||base)",
        "entropy change",
        "focused",
        "norm base",
        "tuned",
        "1 − cosine",
        "CKA",
        "RSA",
        "ΔW",
    )
    views = []
    for kind in kinds(layers):
        rows = []
        for row in layers[layers["rows"] == kind].sort_values("layer").to_dict("records"):
            rows.append(
                (
                    Cell(str(row["layer"]), sort=float(row["layer"]), strong=row["layer"] in marked),
                    value(row["kl_base_tuned"], note=interval(row.get("kl_base_tuned_low"), row.get("kl_base_tuned_high"))),
                    value(row["kl_tuned_base"], note=interval(row.get("kl_tuned_base_low"), row.get("kl_tuned_base_high"))),
                    value(
                        row["entropy_change"],
                        sign=True,
                        note=interval(row.get("entropy_change_low"), row.get("entropy_change_high"), sign=True),
                    ),
                    Cell(percent(row["share_focused"]), sort=float(row["share_focused"])),
                    value(row["activation_norm_base"]),
                    value(row["activation_norm_tuned"]),
                    value(row["cosine_distance"]),
                    value(row["cka"]),
                    value(row["rsa"]),
                    value(row["weight_change"]),
                )
            )
        views.append(View(columns, tuple(rows), kind))
    return views


def outputs_view(outputs: pd.DataFrame) -> View:
    """Return KL of the next-token distributions and the loss, one line per kind of query rows."""
    columns = ("tokens", "documents", "KL(base||tuned)", "KL(tuned||base)", "loss base", "loss tuned", "change", "p")
    rows = [
        (
            Cell(name_of(row["rows"])),
            value(int(row["n"])),
            value(row["kl_base_tuned"], note=interval(row["kl_base_tuned_low"], row["kl_base_tuned_high"])),
            value(row["kl_tuned_base"], note=interval(row["kl_tuned_base_low"], row["kl_tuned_base_high"])),
            value(row["loss_base"]),
            value(row["loss_tuned"]),
            value(row["loss_change"], sign=True, strong=True, note=interval(row["loss_change_low"], row["loss_change_high"], sign=True)),
            value(row["loss_change_p"], digits=2),
        )
        for row in outputs.to_dict("records")
    ]
    return View(columns, tuple(rows))


def rouge_view(scores: pd.DataFrame) -> View:
    """Return the ROUGE of each model's summaries, one line per model."""
    metrics = [metric for metric in METRIC_NAMES if (scores["metric"] == metric).any()]
    rows = []
    for model, group in scores.groupby("model", sort=False):
        of_metric = group.set_index("metric")
        cells = [value(of_metric.loc[m, "mean"], note=interval(of_metric.loc[m, "low"], of_metric.loc[m, "high"])) for m in metrics]
        rows.append((words(model, strong=True), *cells, value(int(group["n"].iloc[0]))))
    return View(("model", *(METRIC_NAMES[metric] for metric in metrics), "documents"), tuple(rows))


def weights_view(weights: pd.DataFrame) -> View:
    """Return the weight changes by kind of matrix; what lies outside the layers has lines of its own."""
    columns = ("matrix", "count", "relative change", "largest", "where", "effective rank", "stable rank", "intruder dimensions")
    rows = []
    inside = weights.assign(place=["layers" if layer >= 0 else "outside" for layer in weights["layer"]])
    for (place, kind), group in inside.groupby(["place", "kind"], sort=False):
        largest = group.sort_values("relative_change", ascending=False, kind="stable").iloc[0]
        rows.append(
            (
                words(f"{kind}{'' if place == 'layers' else ' (no layer)'}"),
                value(len(group)),
                value(group["relative_change"].mean()),
                value(largest["relative_change"]),
                words(largest["name"]),
                value(group["effective_rank"].mean()),
                value(group["stable_rank"].mean()),
                value(int(group["intruders"].fillna(0).sum())),
            )
        )
    return View(columns, tuple(rows))


def arms_view(arms: pd.DataFrame) -> View:
    """Return the arms of the bake-off, one line per protocol and strategy, means over seeds."""
    metrics = [metric for metric in METRIC_NAMES if metric in arms]
    columns = (
        "protocol",
        "strategy",
        "seeds",
        "where, rank",
        "trained parameters",
        "best loss",
        "tokens to best",
        "steps to standard's best",
    )
    rows = []
    order = strategy_order(arms)
    groups = list(arms.groupby(["protocol", "strategy"], sort=False))
    for (protocol, strategy), group in sorted(
        groups, key=lambda item: (list(dict.fromkeys(arms["protocol"])).index(item[0][0]), order.index(name_of(item[0][1])))
    ):
        reached = group["steps_to_standard_best"].dropna()
        spread = f"{number(group['best_loss'].min(), digits=4)} to {number(group['best_loss'].max(), digits=4)}" if len(group) > 1 else ""
        trains = bool((group["trainable_parameters"] > 0).any())
        rows.append(
            (
                words(name_of(protocol)),
                words(name_of(strategy), strong=True),
                value(int(group["seed"].nunique())),
                words(_distinct(group["components"]), note=_distinct(group["rank"])),
                value(int(group["trainable_parameters"].iloc[0]), note=percent(group["trainable_share"].mean(), digits=2)),
                value(group["best_loss"].mean(), digits=4, note=spread),
                Cell(f"{group['tokens_to_best'].mean() / 1e6:,.2f} M", sort=float(group["tokens_to_best"].mean())) if trains else Cell("–"),
                value(
                    reached.mean(), note="" if len(reached) == len(group) or not trains else f"reached by {len(reached)} of {len(group)}"
                ),
                *(value(group[metric].mean()) for metric in metrics),
            )
        )
    return View((*columns, *(METRIC_NAMES[metric] for metric in metrics)), tuple(rows))


def _distinct(texts: pd.Series) -> str:
    """Return the different values of a column, at most three of them (random layers differ by seed)."""
    found = [str(text) for text in dict.fromkeys(texts)]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
