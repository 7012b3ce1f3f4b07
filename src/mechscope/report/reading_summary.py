"""What lenses, heads' roles and weights say, in sentences.

As in `summary`, every sentence carries its number and, where the table has one, its interval; "rose" and "fell" are used only where q is significant.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from mechscope.report.heatmaps import Q_SIGNIFICANT
from mechscope.report.lens_figures import SITES, first_lens
from mechscope.report.theme import interval, label, model_name, name_of, number, percent

Tables = Mapping[str, pd.DataFrame]

KINDS = {
    "lens": ("lens_tokens", "lens_grid", "lens_summary", "lens_change", "logit_attribution", "logit_attribution_change"),
    "heads": ("head_roles", "role_definitions", "head_role_changes", "head_cards", "attention_tokens", "attention_edges"),
    "weights": (
        "weight_heads",
        "weight_tokens",
        "weight_singular",
        "composition",
        "weight_changes",
        "neurons",
        "neuron_changes",
        "neuron_contexts",
    ),
}
"""The tables of each kind of run that reads a model without an experiment on it."""
READING = {name for names in KINDS.values() for name in names}
"""All their names."""

_TITLES = {
    "lens": ("What {} predicts, layer by layer", "Layer by layer: {} before and after fine-tuning"),
    "heads": ("What the heads of {} do", "What the heads of {} do, before and after fine-tuning"),
    "weights": ("What the weights of {} say", "What the weights of {} say, before and after fine-tuning"),
}
FOUND = 0.5
"""A lens has found the prediction where it names the model's own likeliest token in so many positions; a head copies from this score on."""


def reading_title(tables: Tables, model: str | None) -> str:
    """Return the title of the page of a run that only reads, of one model or of a base and what was made of it.

    Args:
        tables: The run's tables.
        model: The model's source, of a pair that of the base; None where the settings do not tell.
    """
    kinds = [kind for kind, names in KINDS.items() if any(name in tables for name in names)]
    one, two = _TITLES[kinds[0]] if len(kinds) == 1 else ("Reading {}", "Reading {} before and after fine-tuning")
    pair = any("tuned" in set(table["model"]) for table in tables.values() if "model" in table)
    return (two if pair else one).format(model_name(model) if model else "the model")


def reading_sentences(tables: Tables) -> list[str]:
    """Return the findings, one sentence or two each; nothing is said about tables that are absent."""
    found = [*_lens(tables), _lens_change(tables), *_attribution(tables), _attribution_change(tables)]
    found += [*_roles(tables), _role_changes(tables), *_copying(tables), _moved(tables), _composition(tables)]
    return [sentence for sentence in found if sentence]


def by_model(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return every model's words (``the base model``, else ``the model``) and rows."""
    named = {"base": "the base model", "tuned": "the tuned model"}
    return [(named.get(str(model), "the model"), own) for model, own in table.groupby("model", sort=False)]


def first_found(tables: Tables) -> list[tuple[str, pd.Series, int]]:
    """Return of every model the first layer whose logit lens agrees with the final prediction in half of the positions, and the number of layers."""
    summary = tables.get("lens_summary")
    if summary is None or "agreement" not in summary:
        return []
    lenses = list(dict.fromkeys(summary["lens"]))
    rows = summary[(summary["site"] == "residual") & (summary["lens"] == ("logit" if "logit" in lenses else lenses[0]))]
    found = []
    for whose, own in by_model(rows):
        own = own.sort_values("layer", kind="stable")
        reached = own[own["agreement"] >= FOUND]
        if len(reached):
            found.append((whose, reached.iloc[0], int(own["layer"].max())))
    return found


def _lens(tables: Tables) -> list[str]:
    return [
        f"In {whose} the logit lens names the final prediction in at least half of the positions from {label(row['component'])} on "
        f"({percent(row['agreement'])} there; the last layer is {last})."
        for whose, row, last in first_found(tables)
    ]


def _lens_change(tables: Tables) -> str:
    change = tables.get("lens_change")
    rows = None if change is None else first_lens(change[(change["site"] == "residual") & change["log_probability_change"].notna()])
    if rows is None or rows.empty:
        return ""
    surely = rows[rows["log_probability_change_q"] < Q_SIGNIFICANT]
    if surely.empty:
        return (
            f"At none of {len(rows)} places of the residual stream did the lens's log-probability of the next token change significantly "
            f"(q < {Q_SIGNIFICANT})."
        )
    top = surely.iloc[int(surely["log_probability_change"].abs().to_numpy().argmax())]
    verb = "rose" if top["log_probability_change"] > 0 else "fell"
    ends = interval(top.get("log_probability_change_low"), top.get("log_probability_change_high"), sign=True)
    return (
        f"With fine-tuning the lens's log-probability of the next token {verb} most at {label(top['component'])} ({SITES['residual']}): "
        f"{number(top['log_probability_change'], sign=True)} nats {ends}".strip()
        + f"; it changed significantly at {len(surely)} of {len(rows)} places, embedding included."
    )


def _attribution(tables: Tables) -> list[str]:
    table, found = tables.get("logit_attribution"), []
    for whose, own in [] if table is None else by_model(table):
        top = own.iloc[int(own["effect"].abs().to_numpy().argmax())]
        ends = interval(top.get("low"), top.get("high"), sign=True)
        found.append(
            f"In {whose} the metric (an answer's logit, or two answers' difference) is {number(own['effect'].sum(), sign=True)} logits; its largest "
            f"direct part, {number(top['effect'], sign=True)} {ends}".strip()
            + f", comes from {label(top['component'])}."
        )
    return found


def _attribution_change(tables: Tables) -> str:
    change = tables.get("logit_attribution_change")
    if change is None:
        return ""
    top = change.iloc[int(change["change"].abs().to_numpy().argmax())]
    return (
        f"Fine-tuning moved the metric by {number(change['change'].sum(), sign=True)} logits; the direct part of {label(top['component'])} moved most "
        f"({number(top['change'], sign=True)} {interval(top.get('low'), top.get('high'), sign=True)}); {int((change['q'] < Q_SIGNIFICANT).sum())} of "
        f"{len(change)} components changed at q < {Q_SIGNIFICANT}."
    ).replace(" )", ")")


def having(tables: Tables) -> list[tuple[str, pd.DataFrame, int]]:
    """Return every model's rows of heads that have a role, and how many heads it has."""
    roles = tables.get("head_roles")
    if roles is None or "has_role" not in roles:
        return []
    roles = roles[roles["head"] >= 0]
    return [(whose, own[own["has_role"].fillna(False).astype(bool)], own["component"].nunique()) for whose, own in by_model(roles)]


def _roles(tables: Tables) -> list[str]:
    found = []
    for whose, own, count in having(tables):
        named = [f"{name_of(role)} ({number(int(n))})" for role, n in own["role"].value_counts(sort=True).head(4).items()]
        most = f": most often {', '.join(named)}" if len(named) > 1 else f": {named[0]}" if named else ""
        found.append(f"In {whose} {number(own['component'].nunique())} of {number(count)} heads have at least one role{most}.")
    return found


def _role_changes(tables: Tables) -> str:
    changes = tables.get("head_role_changes")
    if changes is None:
        return ""
    whole, heads = changes[changes["component"] == "all"], changes[changes["component"] != "all"]
    surely = whole[whole["q"] < Q_SIGNIFICANT].sort_values("change", key=abs, ascending=False, kind="stable")
    told = [
        f"{name_of(row['role'])} {'rose' if row['change'] > 0 else 'fell'} ({number(row['change'], sign=True)} {interval(row['low'], row['high'], sign=True)})"
        for row in surely.head(3).to_dict("records")
    ]
    mean = f"Mean over heads, {', '.join(told)}" if told else "No role's mean over heads changed significantly"
    single = (
        f"; {number(int((heads['q'] < Q_SIGNIFICANT).sum()))} of {number(len(heads))} single heads' scores changed at q < {Q_SIGNIFICANT}"
        if len(heads)
        else ""
    )
    return f"{mean}{single}."


def _copying(tables: Tables) -> list[str]:
    heads, found = tables.get("weight_heads"), list[str]()
    if heads is None or "copying" not in heads:
        return found
    for whose, own in by_model(heads[heads["copying"].notna()]):
        top = own.iloc[int(own["copying"].to_numpy().argmax())]
        count = int((own["copying"] > FOUND).sum())
        found.append(
            f"In {whose} {number(count)} of {number(len(own))} heads have a copying score above {FOUND:g}; the highest is "
            f"{label(top['component'])}'s, {number(top['copying'])}."
        )
    return found


def _moved(tables: Tables) -> str:
    changes = tables.get("weight_changes")
    if changes is None or "ov_relative" not in changes:
        return ""
    ov = changes.iloc[int(changes["ov_relative"].to_numpy().argmax())]
    told = f"Fine-tuning moved what {label(ov['component'])} writes most (W_OV, relative change {number(ov['ov_relative'])})"
    if "qk_relative" not in changes:
        return f"{told}."
    qk = changes.iloc[int(changes["qk_relative"].to_numpy().argmax())]
    return f"{told}, and what {label(qk['component'])} looks for (W_QK, {number(qk['qk_relative'])})."


def _composition(tables: Tables) -> str:
    table = tables.get("composition")
    if table is None:
        return ""
    # the last model is the tuned one, where there are two
    whose, own = by_model(table)[-1]
    top = own.iloc[int(own["z"].to_numpy().argmax())]
    return (
        f"In {whose} the strongest composition beyond chance is {label(top['source'])} into {label(top['target'])} ({str(top['kind']).upper()}, score "
        f"{number(top['score'])}, {number(top['z'])} standard deviations above random)."
    )
