"""The report's first screen: what was found, in sentences and in a few large numbers, written from the tables.

Every sentence carries its number and, where the table has one, its interval; the words "lower", "higher", "better" and "worse" are used only
where the interval excludes zero, otherwise the sentence says that no difference was shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from mechscope.report.heatmaps import Q_SIGNIFICANT
from mechscope.report.theme import interval, name_of, number, percent

Tables = Mapping[str, pd.DataFrame]

# Attention that differs by less than this (nats) differs by rounding only; a model compared with itself stays below it.
_SAME = 1e-6
# Fewer units than these make an interval worth little: the page says so.
_FEW_DOCUMENTS, _FEW_SEEDS = 30, 3


@dataclass(frozen=True)
class Card:
    """A large number, what it counts, and a smaller line under it."""

    value: str
    label: str
    note: str = ""


def of_rows(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the part of a table over all tokens (else over its first kind of query rows) and that kind."""
    kinds = list(dict.fromkeys(table["rows"]))
    kind = "all" if "all" in kinds else str(kinds[0])
    return table[table["rows"] == kind], kind


def sentences(tables: Tables) -> list[str]:
    """Return the findings, one sentence or two each; nothing is said about tables that are absent."""
    found = [_effects(tables), _attention(tables), _heads(tables), _outputs(tables), *_bakeoff(tables), _claims(tables)]
    return [sentence for sentence in found if sentence]


def _effects(tables: Tables) -> str:
    """Name the largest effect of a sweep and how many there are."""
    effects = tables.get("effects")
    if effects is None:
        return ""
    top = effects.iloc[int(effects["effect"].abs().to_numpy().argmax())]
    where = str(top["component"]) if top["positions"] == "all" else f"{top['component']} at {top['positions']}"
    return (
        f"The largest effect on {top['metric']} is {number(top['effect'], sign=True)} {interval(top['low'], top['high'], sign=True)}, of {where}; "
        f"{int((effects['q'] < Q_SIGNIFICANT).sum())} of {len(effects)} effects differ from zero at q < {Q_SIGNIFICANT}."
    )


def cards(tables: Tables) -> list[Card]:
    """Return the large numbers, at most five."""
    found: list[Card] = []
    if "layers" in tables:
        layers, _ = of_rows(tables["layers"])
        top = layers.sort_values("kl_base_tuned", ascending=False)
        found.append(Card(number(int(layers["n"].max())), "documents", "the unit of every interval"))
        found.append(
            Card(f"layer {top['layer'].iloc[0]}", "changed its attention most", f"mean KL {number(top['kl_base_tuned'].iloc[0])} nats")
        )
    if "heads" in tables:
        heads, _ = of_rows(tables["heads"])
        significant = heads[heads["entropy_change_q"] < Q_SIGNIFICANT]
        focused = int((significant["entropy_change"] < 0).sum())
        note = f"{number(focused)} more focused, {number(len(significant) - focused)} more diffuse (q < {Q_SIGNIFICANT})"
        found.append(Card(f"{number(len(significant))} of {number(len(heads))}", "heads changed their entropy", note))
    row = _summary_outputs(tables)
    if row is not None:
        words = "change of the summary loss" if row["rows"] == "summary" else "change of the loss"
        found.append(
            Card(
                number(row["loss_change"], sign=True),
                words,
                f"nats per token {interval(row['loss_change_low'], row['loss_change_high'], sign=True)}",
            )
        )
    if "claims" in tables:
        verdicts = tables["claims"]["verdict"].value_counts()
        note = f"{verdicts.get('contradicted', 0)} contradicted, {verdicts.get('undecided', 0)} undecided"
        found.append(Card(f"{verdicts.get('supported', 0)} of {len(tables['claims'])}", "claims of the paper supported", note))
    return found


def caveats(tables: Tables) -> list[str]:
    """Return what a reader must keep in mind, the run's own weaknesses first."""
    found = []
    counts = [int(tables[name]["n"].max()) for name in ("heads", "layers", "outputs") if name in tables]
    if counts and min(counts) < _FEW_DOCUMENTS:
        found.append(f"Only {min(counts)} documents were measured; intervals from fewer than {_FEW_DOCUMENTS} are rough.")
    if "bakeoff" in tables:
        trained = tables["bakeoff"][tables["bakeoff"]["trainable_parameters"] > 0]
        seeds = int(trained.groupby(["protocol", "strategy"])["seed"].nunique().min()) if len(trained) else 0
        if 0 < seeds < _FEW_SEEDS:
            found.append(
                f"At least one arm of the bake-off ran with {seeds} seed{'s' * (seeds > 1)}: differences between arms may be differences between seeds."
            )
        found.append("ROUGE counts shared words. It does not tell whether a summary is true.")
    found.append(
        "A change in attention or activations is where fine-tuning left traces; it does not prove that the part causes the behaviour. Only interventions do."
    )
    found.append(
        "Row i of a causal attention map can spread over i tokens, so mean entropies of documents of different length cannot be compared; "
        "changes within a document can."
    )
    found.append(
        "Intervals and tests are over documents, for this pair of models. They do not cover training again with another seed, except in the bake-off."
    )
    return found


def _attention(tables: Tables) -> str:
    if "layers" not in tables:
        return ""
    layers, kind = of_rows(tables["layers"])
    top = layers.sort_values("kl_base_tuned", ascending=False, kind="stable")
    first, count = top.iloc[0], number(int(layers["n"].max()))
    if float(first["kl_base_tuned"]) < _SAME:
        return f"Over {count} documents the two models attend alike: no layer's mean KL reaches {_SAME:g} nats."
    low, high = first.get("kl_base_tuned_low"), first.get("kl_base_tuned_high")
    others = [str(layer) for layer in top["layer"].iloc[1:3]]
    then = f", then layer{'s' * (len(others) > 1)} {' and '.join(others)}" if others else ""
    median = number(layers["kl_base_tuned"].median())
    measured = f"{number(first['kl_base_tuned'])} nats {interval(low, high)}".strip()
    return (
        f"Over {count} documents ({name_of(kind)}), attention changed most in layer {first['layer']} "
        f"(mean KL {measured}; the median layer: {median}){then}."
    )


def _heads(tables: Tables) -> str:
    if "heads" not in tables:
        return ""
    heads, _ = of_rows(tables["heads"])
    significant = heads[heads["entropy_change_q"] < Q_SIGNIFICANT]
    if significant.empty:
        return f"None of the {len(heads)} heads changed its attention entropy significantly (q < {Q_SIGNIFICANT})."
    focused = int((significant["entropy_change"] < 0).sum())
    lower = percent((heads["entropy_change"] < 0).mean())
    return (
        f"{number(len(significant))} of {number(len(heads))} heads changed their attention entropy (q < {Q_SIGNIFICANT}): "
        f"{number(focused)} became more focused, {number(len(significant) - focused)} more diffuse. "
        f"Counting heads regardless of significance, {lower} have lower entropy after fine-tuning."
    )


def _summary_outputs(tables: Tables) -> pd.Series | None:
    outputs = tables.get("outputs")
    if outputs is None:
        return None
    kinds = list(outputs["rows"])
    return outputs.iloc[kinds.index("summary") if "summary" in kinds else 0]


def _outputs(tables: Tables) -> str:
    row = _summary_outputs(tables)
    if row is None:
        return ""
    verb = _verb(row["loss_change_low"], row["loss_change_high"], below="fell", above="rose", neither="shows no change")
    change = f"{number(row['loss_change'], sign=True)} {interval(row['loss_change_low'], row['loss_change_high'], sign=True)}".strip()
    return (
        f"The loss on {name_of(row['rows'])} tokens {verb}: {number(row['loss_base'])} nats per token before fine-tuning, {number(row['loss_tuned'])} after "
        f"({change}). The next-token distributions are {number(row['kl_base_tuned'])} nats apart (KL of tuned from base)."
    )


def _bakeoff(tables: Tables) -> list[str]:
    summary = tables.get("bakeoff_summary")
    if summary is None:
        return []
    found = []
    for protocol, at in (("equal_rank", "At equal rank"), ("equal_parameters", "At equal trainable parameters")):
        for strategy, control in (("targeted_layers", "random layers"), ("circuit", "random circuits")):
            part = summary[(summary["protocol"] == protocol) & (summary["metric"] == "rouge1") & (summary["strategy"] == strategy)]
            if part.empty:
                continue
            row = part.iloc[0]
            found.append(
                f"{at}, LoRA in the {name_of(strategy)} scores ROUGE-1 {number(row['mean'])}: {_against(row, 'standard', 'standard LoRA')}, "
                f"and {_against(row, 'random', control)}."
            )
    return found


def _against(row: pd.Series, baseline: str, other: str) -> str:
    value, low, high = row[f"vs_{baseline}"], row[f"vs_{baseline}_low"], row[f"vs_{baseline}_high"]
    if pd.isna(value):
        return f"not compared with {other}"
    words = _verb(low, high, below="worse than", above="better than", neither="no difference shown from")
    return f"{words} {other} ({number(value, sign=True)} {interval(low, high, sign=True)})".replace(" )", ")")


def _verb(low: float, high: float, *, below: str, above: str, neither: str) -> str:
    """Return the word that an interval allows: it lies below zero, above zero, or it has zero (or no ends)."""
    if high < 0:
        return below
    return above if low > 0 else neither


def _claims(tables: Tables) -> str:
    if "claims" not in tables:
        return ""
    verdicts = tables["claims"]["verdict"].value_counts()
    counts = ", ".join(f"{verdicts.get(verdict, 0)} {verdict}" for verdict in ("supported", "contradicted", "undecided"))
    return f"Of the paper's {len(tables['claims'])} claims tested here: {counts}."
