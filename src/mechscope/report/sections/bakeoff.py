"""Bake-off: the same training with LoRA placed differently, compared by loss, ROUGE and trained parameters."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pandas as pd

from mechscope.report.marks.comparisons import differences, parameter_price, rouge, strategy_order
from mechscope.report.marks.curves import learning_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.tables import Cell, Shown, View, value, words
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import SHARED_WORDS, TOKENIZER, verb
from mechscope.report.statements import Caveat, Finding, sample
from mechscope.report.theme import METRIC_NAMES, interval, name_of, percent
from mechscope.report.theme import number as written

_ARM: dict[str, Column | str] = {
    "protocol": "equal_rank, equal_parameters, or reference: outside both",
    "strategy": "where LoRA was put: standard, targeted_layers, targeted_heads, more_rank, circuit, circuit_rank, random_layers, random_circuit, last_layers; "
    "full (fine-tuning), none",
}
_SEED = "seed of the training, −1 without training"
_WRITERS = "what the base or a strategy's first seed wrote; strategies that differ between protocols have a column for each: targeted_layers_equal_rank"
_ROUGE: dict[str, Column | str] = {metric: number(f"{name}, F-measure", "share") for metric, name in METRIC_NAMES.items()}
BAKEOFF = table(
    "One row per arm: protocol, strategy and seed.",
    **_ARM,
    seed=_SEED,
    components="what was trained",
    rank="LoRA rank, a range where it differs between matrices, full or none",
    trainable_parameters="parameters that were trained",
    trainable_share=number("the same of all parameters", "share"),
    best_loss=number("lowest validation loss", "nats per token"),
    best_step="step at which it was reached",
    tokens_to_best=number("training tokens until then", "tokens"),
    steps_to_standard_best=number(
        "first evaluated step with a loss as low as the standard arm's best of the same seed; none if never", "steps"
    ),
    stopped_early="whether training ended before its last step, because the loss had stopped falling",
    converged="whether the lowest validation loss had arrived when training ended",
    unconverged="why it does not count as arrived, in words; empty where it does",
    **_ROUGE,
    n_documents="held-out documents that were summarised",
)
BAKEOFF_ROUGE = table("One row per arm and held-out document.", **_ARM, seed=_SEED, id="the document", **_ROUGE, tokenizer=TOKENIZER)
BAKEOFF_SUMMARIES = table(
    "One row per held-out document.",
    {"": Column(_WRITERS)},
    id="the document",
    document="its text",
    reference="its reference summary",
)


def _against(name: str, other: str) -> dict[str, Column | str]:
    """Describe a paired difference: its interval over trainings, how much trainings differ, and the interval for these trainings alone."""
    meaning = (
        f"strategy minus {other}, paired by document and seed; interval over both. None against itself and where the other was not run"
    )
    these = "95\u202f% interval over documents for these very trainings, which says nothing about others"
    return {
        name: number(meaning, "share", "low", "high"),
        f"{name}_sd": number("its standard deviation between seeds", "share"),
        f"{name}_documents_low": number(f"{these}, lower end", "share"),
        f"{name}_documents_high": number(f"{these}, upper end", "share"),
    }


BAKEOFF_SUMMARY = table(
    "One row per protocol, strategy and metric.",
    **_ARM,
    metric="rouge1, rouge2, rougeL, rougeLsum",
    mean=number("mean over documents and seeds; interval over both, none below three seeds", "share", "low", "high", bare=True),
    n_seeds="seeds",
    n_documents="documents",
    **_against("vs_standard", "standard LoRA"),
    **_against("vs_random", "random layers, of the circuit random circuits"),
    withheld="why there are no intervals over trainings, in words; empty where there are",
)
LEARNING_CURVES = table(
    "One row per arm and evaluation; step 0 is before training.",
    **_ARM,
    seed=_SEED,
    step="training step",
    tokens=number("training tokens until then", "tokens"),
    train_loss=number("mean training loss since the last evaluation", "nats per token"),
    validation_loss=number("validation loss", "nats per token"),
)


def _figures(tables: Tables) -> list[Figure]:
    """Draw learning curves, prices and scores, each with the number of seeds of an arm."""
    seeds = [
        count
        for name in ("bakeoff", "learning_curves")
        if name in tables
        for _, count in tables[name].groupby(["protocol", "strategy"], sort=False)["seed"].nunique().items()
    ]
    if not seeds and "bakeoff_summary" in tables:
        seeds = list(tables["bakeoff_summary"]["n_seeds"])
    return [replace(figure, caption=f"{figure.caption} {sample(seeds, 'seeds')}.") for figure in _drawn(tables)]


def _drawn(tables: Tables) -> list[Figure]:
    drawn: list[Figure] = []
    curves, summary, arms = tables.get("learning_curves"), tables.get("bakeoff_summary"), tables.get("bakeoff")
    if curves is not None:
        protocols = list(dict.fromkeys(curves["protocol"]))
        for protocol in [p for p in protocols if p != "reference"] or protocols:
            # full fine-tuning belongs to no protocol and is drawn in each, as the mark to reach
            part = curves[curves["protocol"].isin([protocol, "reference"])]
            title = f"Learning curves, {name_of(protocol)}"
            caption = "Thin: seeds. Thick: their mean. Click a strategy in the legend to single it out."
            drawn.append(learning_curves(part, name=f"learning-{_slug(str(protocol))}", title=title, caption=caption))
    if arms is not None and (arms["trainable_parameters"] > 0).any():
        drawn.append(parameter_price(arms))
    if summary is not None:
        drawn += [rouge(summary, metric) for metric in METRIC_NAMES if (summary["metric"] == metric).any()]
        for protocol in dict.fromkeys(summary["protocol"]):
            drawn += [figure for baseline in ("standard", "random") if (figure := differences(summary, protocol, baseline)) is not None]
    return drawn


def _slug(text: str) -> str:
    """Return `text` as a piece of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "protocol"


def _views(tables: Tables) -> list[Shown]:
    if "bakeoff" not in tables:
        return []
    return [Shown("Arms and their budgets", _arms(tables["bakeoff"]), terminal=True, brief=_brief(tables["bakeoff"]), table="bakeoff")]


def _by_arm(arms: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Return protocol, strategy and rows of every arm, in the order of reading."""
    protocols, order = list(dict.fromkeys(arms["protocol"])), strategy_order(arms)
    groups = [(str(protocol), str(strategy), own) for (protocol, strategy), own in arms.groupby(["protocol", "strategy"], sort=False)]
    return sorted(groups, key=lambda arm: (protocols.index(arm[0]), order.index(name_of(arm[1]))))


def _brief(arms: pd.DataFrame) -> View:
    """Return what fits a terminal: every arm with its budget, and what it reached."""
    metrics = [metric for metric in ("rougeL",) if metric in arms]
    columns = ("protocol", "strategy", "rank", "parameters", "best loss", *(METRIC_NAMES[metric] for metric in metrics), "seeds")
    rows = []
    for protocol, strategy, group in _by_arm(arms):
        reached = (value(group["best_loss"].mean(), digits=4), *(value(group[metric].mean()) for metric in metrics))
        budget = (words(_distinct(group["rank"])), value(int(group["trainable_parameters"].iloc[0])))
        rows.append((words(name_of(protocol)), words(name_of(strategy)), *budget, *reached, value(int(group["seed"].nunique()))))
    return View(columns, tuple(rows))


def _arms(arms: pd.DataFrame) -> View:
    """Return one line per protocol and strategy, means over seeds."""
    metrics = [metric for metric in METRIC_NAMES if metric in arms]
    columns = (
        *("protocol", "strategy", "seeds", "where, rank", "trained parameters", "best loss", "tokens to best", "steps to standard's best"),
        *(METRIC_NAMES[metric] for metric in metrics),
    )
    return View(columns, tuple((words(name_of(protocol)), *_arm(strategy, group, metrics)) for protocol, strategy, group in _by_arm(arms)))


def _arm(strategy: object, group: pd.DataFrame, metrics: list[str]) -> tuple[Cell, ...]:
    reached = group["steps_to_standard_best"].dropna()
    spread = f"{written(group['best_loss'].min(), digits=4)} to {written(group['best_loss'].max(), digits=4)}" if len(group) > 1 else ""
    trains, tokens = bool((group["trainable_parameters"] > 0).any()), float(group["tokens_to_best"].mean())
    return (
        words(name_of(strategy), strong=True),
        value(int(group["seed"].nunique())),
        words(_distinct(group["components"]), note=_distinct(group["rank"])),
        value(int(group["trainable_parameters"].iloc[0]), note=percent(group["trainable_share"].mean(), digits=2)),
        value(group["best_loss"].mean(), digits=4, note=spread),
        Cell(f"{tokens / 1e6:,.2f} M", sort=tokens) if trains else Cell("–"),
        value(reached.mean(), note="" if len(reached) == len(group) or not trains else f"reached by {len(reached)} of {len(group)}"),
        *(value(group[metric].mean()) for metric in metrics),
    )


def _distinct(texts: pd.Series) -> str:
    """Return the different values of a column, at most three of them (random layers differ by seed)."""
    values = [str(text) for text in dict.fromkeys(texts)]
    return "; ".join(values[:3]) + (f"; and {len(values) - 3} more" if len(values) > 3 else "")


def _findings(tables: Tables) -> list[Finding]:
    summary = tables.get("bakeoff_summary")
    budgets = _budgets(tables["bakeoff"]) if "bakeoff" in tables else []
    if summary is None:
        return budgets
    found = []
    for protocol, at in (("equal_rank", "At equal rank"), ("equal_parameters", "At equal trainable parameters")):
        for strategy, control in (("targeted_layers", "random layers"), ("circuit", "random circuits")):
            part = summary[(summary["protocol"] == protocol) & (summary["metric"] == "rouge1") & (summary["strategy"] == strategy)]
            found += [_score(row, at, control) for _, row in part.head(1).iterrows()]
    return [*found, *budgets]


def _budgets(arms: pd.DataFrame) -> list[Finding]:
    """Say between which budgets arms of one rank lie; nothing where they have one budget."""
    adapted = arms[arms["protocol"] == "equal_rank"].sort_values("trainable_parameters", kind="stable")
    if adapted["trainable_parameters"].nunique() < 2:
        return []
    least, most = adapted.iloc[0], adapted.iloc[-1]
    ends = (f"{written(int(row['trainable_parameters']))} trainable parameters ({name_of(row['strategy'])})" for row in (least, most))
    return [Finding(f"At equal rank the arms differ in their budgets, from {' to '.join(ends)}", rows=(least, most), table="bakeoff")]


def _score(row: pd.Series, at: str, control: str) -> Finding:
    """Say what LoRA in some place scores, beside standard LoRA and random places; without trainings enough only that."""
    score = f"{written(row['mean'])} {interval(row['low'], row['high'])}".strip()
    place = name_of(row["strategy"])
    return Finding(
        f"{at}, LoRA in the {place} scores ROUGE-1 {score} over {written(int(row['n_documents']))} documents: "
        f"{_compared(row, 'standard', 'standard LoRA')}, and {_compared(row, 'random', control)}",
        n=row["n_seeds"],
        unit="seeds",
        rows=(row,),
        effect=0.0 if math.isnan(float(row["vs_standard_low"])) else abs(float(row["vs_standard"])),
        table="bakeoff_summary",
    )


def _compared(row: pd.Series, baseline: str, other: str) -> str:
    difference, low, high = (float(row[f"vs_{baseline}{end}"]) for end in ("", "_low", "_high"))
    if math.isnan(difference):
        return f"not compared with {other}"
    if math.isnan(low):
        ends = interval(row[f"vs_{baseline}_documents_low"], row[f"vs_{baseline}_documents_high"], sign=True)
        return f"{written(difference, sign=True)} against {other} in these trainings ({f'over documents {ends}; ' if ends else ''}{row['withheld']})"
    compared = verb(low, high, below="worse than", above="better than", neither="no difference shown from")
    return f"{compared} {other} ({written(difference, sign=True)} {interval(low, high, sign=True)})".replace(" )", ")")


def _caveats(tables: Tables) -> list[Caveat]:
    summary, caveats = tables.get("bakeoff_summary"), []
    reasons = summary["withheld"][summary["withheld"] != ""] if summary is not None and "withheld" in summary else pd.Series(dtype=str)
    if len(reasons):
        said = f"Nothing is said of other trainings, {reasons.iloc[0]}: differences between arms may be differences between seeds."
        caveats.append(Caveat(said, "bakeoff_summary", withheld=True))
    trained = tables["bakeoff"].dropna(subset=["converged"]) if "bakeoff" in tables and "converged" in tables["bakeoff"] else pd.DataFrame()
    late = int((~trained["converged"].astype(bool)).sum()) if len(trained) else 0
    if late:
        said = f"{late} of {len(trained)} trainings had not converged: placements are compared at this budget, not at their best."
        caveats.append(Caveat(said, "bakeoff_summary"))
    return [*caveats, SHARED_WORDS]


SECTION = Section(
    id="bakeoff",
    heading="Bake-off",
    intro=(
        "The same training with LoRA placed differently, at equal rank (the protocol of arXiv 2505.17073) and at equal trainable parameters (a fair price)."
    ),
    unit="seeds",
    tables={
        "bakeoff": BAKEOFF,
        "bakeoff_rouge": BAKEOFF_ROUGE,
        "bakeoff_summaries": BAKEOFF_SUMMARIES,
        "bakeoff_summary": BAKEOFF_SUMMARY,
        "learning_curves": LEARNING_CURVES,
    },
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="lora",
    adds="mechscope bakeoff BASE --data DATA --out NEW_RUN",
)
