"""The verdict on a comparison of two models: what was compared, did fine-tuning do what it was meant to and at what price, where did it change the model, do
these places carry the gain, does LoRA there pay. Each sentence is composed from tables; what cannot be said is withheld, with the reason.
"""

from __future__ import annotations

import math

import pandas as pd

from mechscope.report.contents import Contents
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.section import Tables
from mechscope.report.shared import estimated, layers_in_words, of_rows, verb
from mechscope.report.statements import Derived, Finding
from mechscope.report.theme import TOKENS, model_name, name_of, percent
from mechscope.report.theme import number as written
from mechscope.report.verdicts import FEWEST, changed_parts, effect_of, largest, smallest_row


def identical(tables: Tables) -> Finding | None:
    """Return the one sentence on two models that do not differ; None where they do, or where that was not measured."""
    if "weights" in tables:
        if (tables["weights"]["change"] != 0).any():
            return None
        every = Derived("weights")
        text = f"The two models are identical: all {every.written(tables)} weight matrices and vectors are equal, so there is no change to report"
        return Finding(text, derived=(every,), question="compared", table="weights")
    shift = tables.get("circuit_shift")
    if shift is None or (shift["base"] != shift["tuned"]).any():
        return None
    every = Derived("circuit_shift")
    text = f"The two models do not differ on these texts: all {every.written(tables)} edges have the same score in both, so there is no change to report"
    return Finding(text, derived=(every,), question="compared", table="circuit_shift")


def compared(contents: Contents) -> list[Finding]:
    """Say which two models were compared, on how much text; nothing where there are not two."""
    tables, models = contents.tables, contents.manifest.get("models", {})
    if not {"base", "tuned"} <= set(models):
        return []
    base, tuned = (model_name(str(models[label].get("source", label))) for label in ("base", "tuned"))
    text = (
        f"the base model {base} was compared with {tuned}, fine-tuned from it"
        if base != tuned
        else f"two models called {base} were compared"
    )
    rows, n = _largest(tables)
    if "outputs" in tables and "tokens" in tables["outputs"]:
        rows = tables["outputs"].iloc[int(tables["outputs"]["tokens"].to_numpy().argmax())]
        text += f", over {written(int(rows['tokens']))} tokens"
    unit = "documents" if rows is not None and any(name in tables for name in ("outputs", "heads", "layers")) else "texts"
    return [Finding(text, n=n, unit=unit, rows=() if rows is None else (rows,), question="compared")]


def _largest(tables: Tables) -> tuple[pd.Series | None, float | None]:
    for name in ("outputs", "heads", "layers", "circuit_edges", "lens_summary", "head_roles"):
        if name in tables and "n" in tables[name] and tables[name]["n"].notna().any():
            row = tables[name].iloc[int(tables[name]["n"].fillna(0).to_numpy().argmax())]
            return row, row["n"]
    return None, None


def aim(tables: Tables) -> list[Finding]:
    """Say what fine-tuning did to the loss it was meant to lower, and what it cost elsewhere."""
    if "outputs" not in tables:
        return []
    by_kind = {str(one["rows"]): one for _, one in tables["outputs"].iterrows()}
    kind = "summary" if "summary" in by_kind else next(iter(by_kind))
    row = by_kind[kind]
    did = verb(
        row["loss_change_low"],
        row["loss_change_high"],
        below="Fine-tuning did what it was meant to: the loss on {} fell",
        above="Fine-tuning did the opposite of what it was meant to: the loss on {} rose",
        neither="Fine-tuning is not shown to have done what it was meant to: the loss on {} changed",
    ).format(TOKENS.get(kind, kind))
    small = ", less than the smallest effect of interest" if row["loss_change_verdict"] == "negligible" else ""
    rows, parts = [row], [f"{did} ({estimated(row, 'loss_change', sign=True)} nats per token{small})"]
    for other in ("document", "all"):
        if kind == "summary" and other in by_kind:
            there = by_kind[other]
            moved = verb(there["loss_change_low"], there["loss_change_high"], below="fell", above="rose", neither="shows no change")
            if other == "document":
                price = "At a price" if moved == "rose" else "No price was found"
                parts.append(
                    f". {price}: on {TOKENS[other]} the loss {moved}, from {written(there['loss_base'])} to {written(there['loss_tuned'])} nats per token "
                    f"({estimated(there, 'loss_change', sign=True)})"
                )
            else:
                parts.append(f"; over {TOKENS[other]} it changed by {estimated(there, 'loss_change', sign=True)}")
                parts.append(f", and the next-token distributions are {estimated(there, 'kl_base_tuned')} nats of KL apart")
            rows.append(there)
    effect = effect_of(tables, "outputs", "loss_change", row["loss_change"])
    return [Finding("".join(parts), n=row["n"], unit="documents", rows=tuple(rows), effect=effect, question="aim", table="outputs")]


def where(tables: Tables) -> list[Finding]:
    """Say how many heads changed what they write and how many layers their attention; nothing is named that is not shown to have changed."""
    counts, details, rows, derived, n = list[str](), list[str](), list[pd.Series](), list[Derived](), list[float]()
    said = (("heads", "write_change", "what heads write", "of it"), ("layers", "kl_base_tuned", "attention", "nats"))
    for table, quantity, what, unit in said:
        if table not in tables or not smallest_row(tables, table, quantity):
            continue
        verdicts, (own, _) = changed_parts(tables, table, quantity), of_rows(tables[table])
        changed, every = verdicts["changed"], verdicts[""]
        documents = own[f"{quantity}_n" if f"{quantity}_n" in own else "n"].max()
        if verdicts["not measured"].of(tables) == every.of(tables) or documents < FEWEST:
            continue
        n.append(documents)
        derived += [changed, every]
        counts.append(f"{changed.written(tables)} of {every.written(tables)} {table}")
        if changed.of(tables):
            top = largest(own, quantity)
            name = top["component"] if "component" in top else f"layer {int(top['layer'])}"
            rows.append(top)
            details.append(f"{what}, most {name} ({estimated(top, quantity)} {unit})")
    if not counts:
        return []
    more = "by more than the smallest effect of interest"
    text = f"It changed {' and '.join(counts)} {more}: {'; '.join(details)}"
    if not details:
        text = f"It is not shown to have changed anything {more}: {' and '.join(counts)} did"
    return [Finding(text, n=min(n), unit="documents", rows=tuple(rows), derived=tuple(derived), question="where", table="heads")]


def gain(tables: Tables) -> list[Finding]:
    """Say whether the selected layers carry more of the gain than others do."""
    sets = tables.get("layer_sets")
    if sets is None or not sets["selected"].any():
        return []
    row = sets[sets["selected"]].iloc[0]
    whole = f"whether these places ({layers_in_words(row['component'])}) carry the gain"
    basis = {"n": row["n"], "unit": "documents", "question": "gain", "table": "layer_sets"}
    if row.get("withheld"):
        return [Finding(whole, rows=(row,), withheld=str(row["withheld"]), **basis)]
    if pd.isna(row.get("more")) or pd.isna(row.get("p_random")):
        return [Finding(whole, rows=(row,), withheld="no other sets of as many layers were measured beside them", **basis)]
    others = Derived("layer_sets", (("selected", "==", False), ("share", ">", float("-inf"))))
    least, most = (Derived(others.table, others.where, "share", how) for how in ("min", "max"))
    beside = (
        f"{percent(row['share'])} beside {percent(least.of(tables))} to {percent(most.of(tables))} of {others.written(tables)} other sets of as many layers, "
        f"rank p = {written(row['p_random'], digits=2)}"
    )
    layers = layers_in_words(row["component"])
    if row["more_low"] > 0 and row["p_random"] <= Q_SIGNIFICANT:
        text = f"The most changed layers ({layers}) carry more of the gain than others do: {beside}"
    elif row["more_high"] < 0 and row["p_less"] <= Q_SIGNIFICANT:
        text = f"The most changed layers ({layers}) carry less of the gain than others do: {beside}"
    else:
        text = f"The most changed layers ({layers}) are not shown to carry more of the gain than others do: {beside}"
    return [Finding(text, rows=(row,), derived=(others, least, most), effect=abs(float(row["share"])), **basis)]


def lora(tables: Tables) -> list[Finding]:
    """Say whether LoRA in the selected layers does better than everywhere, and than in random layers."""
    summary = tables.get("bakeoff_summary")
    if summary is None:
        return []
    rows = summary[(summary["metric"] == "rouge1") & (summary["strategy"] == "targeted_layers")]
    if rows.empty:
        return []
    rows = rows.sort_values("protocol", key=lambda protocol: protocol != "equal_parameters", kind="stable")
    row = rows.iloc[0]
    basis = {"n": row["n_seeds"], "unit": "seeds", "question": "lora", "table": "bakeoff_summary", "rows": (row,)}
    if row.get("withheld") or math.isnan(float(row["vs_standard_low"])):
        return [Finding("Whether LoRA there pays", withheld=str(row.get("withheld") or "standard LoRA was not trained beside it"), **basis)]
    parts, words = list[str](), {"below": "worse than", "above": "better than", "neither": "not shown to be better or worse than"}
    for name, other in (("standard", "LoRA in every layer"), ("random", "LoRA in random layers")):
        low, high = float(row[f"vs_{name}_low"]), float(row[f"vs_{name}_high"])
        if not math.isnan(low):
            parts.append(f"{verb(low, high, **words)} {other} ({estimated(row, f'vs_{name}', sign=True)} ROUGE-1)")
    text = (
        f"LoRA in these layers, at {name_of(row['protocol'])}, is {' and '.join(parts)}, over {written(int(row['n_documents']))} documents"
    )
    return [Finding(text, effect=abs(float(row["vs_standard"])), **basis)]


def unmeasured(tables: Tables) -> list[Finding]:
    """Say of a difference that was measured alone what is not known from it."""
    if "outputs" not in tables and "heads" not in tables:
        return []
    missing = [
        words
        for name, words in (("layer_sets", "whether these places carry the gain"), ("bakeoff_summary", "whether LoRA there pays"))
        if name not in tables
    ]
    return [Finding(f"Not measured in this run: {', and '.join(missing)}", question="gain")] if missing else []


ANSWERS = (aim, where, gain, lora, unmeasured)
"""What composes the verdict on a difference behind its first sentence, in order: from tables to at most one finding each."""
