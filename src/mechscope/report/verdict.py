"""The verdict on a comparison of two models: what was compared, did fine-tuning do what it was meant to and at what price, where did it change the model, do
these places carry the gain, does LoRA there pay. Each sentence is composed from tables; what cannot be said is withheld, with the reason.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from mechscope.report.beside import listed
from mechscope.report.contents import Contents
from mechscope.report.section import Tables
from mechscope.report.shared import FEWEST_TEXTS, estimated, layers_in_words, moved, of_rows, verb
from mechscope.report.statements import Derived, Finding
from mechscope.report.theme import TOKENS, model_name, name_of, percent
from mechscope.report.theme import number as written
from mechscope.report.verdicts import FEWEST, FEWEST_SETS, changed_parts, effect_of, largest, rank_verdict, smallest_row

# what a difference measures of the two models beside their weights
_MEASURED = ("heads", "layers", "outputs")
# what may have changed in the model: the table, its quantity, what is said of so many parts, and the unit of the largest
_PLACES = (
    ("heads", "write_change", "what {} of {} heads write", "of it"),
    ("layers", "kl_base_tuned", "the attention of {} of {} layers", "nats"),
    ("layers", "mlp_write_change", "what {} of {} MLPs write", "of it"),
)


def identical(contents: Contents) -> Finding | None:
    """Return the one sentence on two models that do not differ; None where they do, or where that is not known."""
    tables, models = contents.tables, contents.manifest.get("models", {})
    prints = [models[label].get("fingerprint") for label in ("base", "tuned") if label in models]
    if "weights" in tables:
        if (tables["weights"]["change"] != 0).any():
            return None
        every = Derived("weights")
        text = f"The two models are identical: all {every.written(tables)} weight matrices and vectors are equal, so there is no change to report"
        return Finding(text, derived=(every,), question="compared", table="weights")
    if len(prints) == 2 and prints[0] is not None and prints[0] == prints[1]:
        return Finding(
            "The two models are identical: their weights have one fingerprint, so there is no change to report", n=None, question="compared"
        )
    shift = tables.get("circuit_shift")
    # scores that are all zero tell no two models apart, and what a difference measured says more
    if shift is None or any(name in tables for name in _MEASURED) or (shift["base"] != shift["tuned"]).any() or not shift["base"].any():
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
        f"the base model {base} was compared with the tuned model {tuned}" if base != tuned else f"two models called {base} were compared"
    )
    row, n = _largest(tables)
    unit = "documents" if row is not None and any(name in tables for name in _MEASURED) else "texts"
    return [Finding(text, n=n, unit=unit, rows=() if row is None else (row,), question="compared")]


def _largest(tables: Tables) -> tuple[pd.Series | None, float | None]:
    for name in (*_MEASURED, "circuit_edges", "lens_summary", "head_roles"):
        if name in tables and "n" in tables[name] and tables[name]["n"].notna().any():
            row = tables[name].iloc[int(tables[name]["n"].fillna(0).to_numpy().argmax())]
            return row, row["n"]
    return None, None


def aim(tables: Tables) -> list[Finding]:
    """Say what fine-tuning did to the loss it was meant to lower, beside controls, and what it cost elsewhere."""
    if "outputs" not in tables:
        return []
    by_kind = {str(one["rows"]): one for _, one in tables["outputs"].iterrows()}
    kind = "summary" if "summary" in by_kind else next(iter(by_kind))
    row, words = by_kind[kind], TOKENS.get(kind, kind)
    basis: dict[str, Any] = {"n": row["n"], "unit": "documents", "question": "aim", "table": "outputs"}
    how = moved(row, "loss_change")
    if not how:
        reason = f"an interval needs {FEWEST_TEXTS} documents"
        return [Finding(f"What fine-tuning did to the loss on {words}", rows=(row,), withheld=reason, **basis)]
    size = f"({estimated(row, 'loss_change', sign=True)} nats per token)"
    if row["loss_change_verdict"] == "negligible":
        text = f"Fine-tuning changed next to nothing: the loss on {words} moved by less than the smallest effect of interest {size}"
    elif kind != "summary":
        # what these models were meant to do is not known without summaries
        text = f"The loss on {words} {how} {size}"
    else:
        did = {
            "fell": "Fine-tuning did what it was meant to: the loss on {} fell",
            "rose": "Fine-tuning did the opposite of what it was meant to: the loss on {} rose",
        }.get(how, "Fine-tuning is not shown to have done what it was meant to: the loss on {} changed")
        text = f"{did.format(words)} {size}"
    rows, derived = [row], tuple[Derived, ...]()
    if kind == "summary":
        beside, models, derived = _beside(tables, how)
        text += beside
        rows += models
        if "document" in by_kind:
            rows.append(by_kind["document"])
            text += f". {_price(by_kind['document'])}"
        if "all" in by_kind:
            there = by_kind["all"]
            rows.append(there)
            text += (
                f"; over {TOKENS['all']} it changed by {estimated(there, 'loss_change', sign=True)}, and the next-token distributions are "
                f"{estimated(there, 'kl_base_tuned')} nats of KL apart"
            )
    effect = effect_of(tables, "outputs", "loss_change", row["loss_change"])
    return [Finding(text, rows=tuple(rows), derived=derived, effect=effect, **basis)]


def _price(row: pd.Series) -> str:
    """Say what became of the loss on the documents themselves."""
    from_to = (
        f"from {written(row['loss_base'])} to {written(row['loss_tuned'])} nats per token ({estimated(row, 'loss_change', sign=True)})"
    )
    how, words = moved(row, "loss_change"), TOKENS["document"]
    if not how:
        return f"Whether at a price is not known: on {words} the loss went {from_to}, without an interval"
    if row["loss_change_verdict"] == "negligible":
        return f"The price is negligible: on {words} the loss moved by less than the smallest effect of interest, {from_to}"
    price = {"rose": "At a price", "fell": "No price was found"}.get(how, "A price is not shown")
    return f"{price}: on {words} the loss {how}, {from_to}"


def _beside(tables: Tables, how: str) -> tuple[str, list[pd.Series], tuple[Derived, ...]]:
    """Say how far every kind of control lowered the loss on the same documents; the sentence, and the rows and counts that it quotes."""
    if how != "fell" or "controls" not in tables or tables["controls"]["loss_change"].isna().any():
        return "", [], ()
    models = tables["controls"]
    by_kind = {str(kind): [float(x) for x in own["loss_change"]] for kind, own in models.groupby("kind", sort=False)}
    nulls = [value for kind, values in by_kind.items() if kind not in ("tuned", "seed") for value in values]
    if not nulls:
        return "", [], ()
    own = by_kind["tuned"][0]
    text = (
        f". On the {written(int(models['n'].max()))} documents of the controls it changed by {written(own, sign=True)}; beside it, "
        f"{listed(by_kind, lambda x: written(x, sign=True))}{', so it does not stand out among controls' if own >= min(nulls) else ''}"
    )
    counts = tuple(Derived("controls", (("kind", "==", kind),)) for kind in by_kind)
    return text, [row for _, row in models.iterrows()], counts


def where(tables: Tables) -> list[Finding]:
    """Say how many heads and MLPs changed what they write and how many layers their attention; nothing is named that is not shown to have changed."""
    did, did_not, rows, derived, n = list[str](), list[str](), list[pd.Series](), list[Derived](), list[float]()
    few = list[float]()
    for table, quantity, said, unit in _PLACES:
        if table not in tables or not smallest_row(tables, table, quantity):
            continue
        verdicts, (own, _) = changed_parts(tables, table, quantity), of_rows(tables[table])
        changed, every = verdicts["changed"], verdicts[""]
        documents = own[f"{quantity}_n" if f"{quantity}_n" in own else "n"].max()
        if verdicts["not measured"].of(tables) == every.of(tables):
            continue
        if documents < FEWEST:
            few.append(documents)
            continue
        n.append(documents)
        derived += [changed, every]
        if changed.of(tables):
            top = largest(own, quantity)
            name = top["component"] if "component" in top and quantity != "mlp_write_change" else f"layer {int(top['layer'])}"
            rows.append(top)
            did.append(f"{said.format(changed.written(tables), every.written(tables))} (most {name}, {estimated(top, quantity)} {unit})")
        else:
            did_not.append(said.format("any", every.written(tables)))
    basis: dict[str, Any] = {"unit": "documents", "question": "where", "table": "heads" if "heads" in tables else "layers"}
    if not n:
        reason = f"a verdict needs {FEWEST} documents" if few else "no smallest effect of interest was measured or set"
        missing = any(table in tables for table, *_ in _PLACES)
        return [Finding("Where it changed the model", n=max(few, default=None), withheld=reason, **basis)] if missing else []
    more = "by more than the smallest effect of interest"
    if not did:
        text = f"It is not shown to have changed {_or(did_not)} {more}"
    else:
        text = f"It changed, {more}: {'; '.join(did)}" + (f"; not shown to have changed: {_or(did_not)}" if did_not else "")
    return [Finding(text, n=min(n), rows=tuple(rows), derived=tuple(derived), **basis)]


def _or(parts: list[str]) -> str:
    return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def gain(tables: Tables) -> list[Finding]:
    """Say whether the selected layers carry more of the gain than others do."""
    sets = tables.get("layer_sets")
    if sets is None or not sets["selected"].any():
        return []
    row = sets[sets["selected"]].iloc[0]
    layers = layers_in_words(row["component"])
    whole = f"whether these places ({layers}) carry the gain"
    basis: dict[str, Any] = {"n": row["n"], "unit": "documents", "question": "gain", "table": "layer_sets"}
    if row.get("withheld"):
        return [Finding(whole, rows=(row,), withheld=str(row["withheld"]), **basis)]
    if pd.isna(row.get("more")) or pd.isna(row.get("p_random")):
        return [Finding(whole, rows=(row,), withheld="no other sets of as many layers were measured beside them", **basis)]
    others = Derived("layer_sets", (("selected", "==", False), ("share", ">", float("-inf"))))
    least, most = (Derived(others.table, others.where, "share", how) for how in ("min", "max"))
    as_much = Derived("layer_sets", (("selected", "==", False), ("share", ">=", float(row["share"]))))
    count = int(others.of(tables))
    beside = (
        f"{percent(row['share'])} beside {percent(least.of(tables))} to {percent(most.of(tables))} of {others.written(tables)} other sets of as many layers, "
        f"{as_much.written(tables)} of which carr{'ies' if as_much.of(tables) == 1 else 'y'} at least as much"
    )
    # as the claim on it: the rank says whether another selection would do as well, the interval whether other documents would say so too
    decided = {"more": row["more_low"] > 0, "less": row["more_high"] < 0}
    word = rank_verdict(row)
    if decided.get(word, False):
        text = f"The most changed layers ({layers}) carry {word} of the gain than others do: {beside}"
    else:
        text = f"The most changed layers ({layers}) are not shown to carry more of the gain than others do: {beside}"
        if count < FEWEST_SETS:
            text += "; so few other sets cannot show it, whatever they carry"
    return [Finding(text, rows=(row,), derived=(others, least, most, as_much), effect=abs(float(row["share"])), **basis)]


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
