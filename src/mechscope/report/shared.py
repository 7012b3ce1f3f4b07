"""What several sections need to know of a run's tables: what was selected, whose rows these are, how sure a reader may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.tables import Table, View, strongest
from mechscope.report.section import NO_SAMPLE, Column, Tables, number
from mechscope.report.statements import Caveat, Derived, sample
from mechscope.report.theme import interval, label, name_of, percent
from mechscope.report.theme import number as written

# fewer documents or texts than these make an interval worth little: the page says so
_FEW = 30
FEWEST_TEXTS = 6
"""Texts below which there is neither an interval nor a test, as `mechscope.stats.inference` has it."""

NO_CAUSE = Caveat(
    "A change in attention or activations is where fine-tuning left traces; it does not prove that the part causes the behaviour. Only interventions do."
)
"""Caveat of every section that shows what changed."""
UNEQUAL_LENGTHS = Caveat(
    "Row i of a causal attention map can spread over i tokens, so mean entropies of documents of different length cannot be compared; "
    "changes within a document can."
)
"""Caveat of every section that shows attention entropies."""
THIS_PAIR = Caveat(
    "Intervals and tests are over documents, for this pair of models. They do not cover training again with another seed, except in the bake-off."
)
"""Caveat of every section whose intervals are over documents."""
SHARED_WORDS = Caveat("ROUGE counts shared words. It does not tell whether a summary is true.")
"""Caveat of every section that shows ROUGE."""

_METRICS = {
    "logit-diff": (
        "the logit difference, the right answers' mean logit minus the wrong ones' (higher is better): an edge with a negative score helps, as the metric "
        "falls when the edge carries the other run's value; one with a positive score works against the task"
    ),
    "probability": (
        "the probability of the right answers minus that of the wrong ones (higher is better): an edge with a negative score helps, as the metric falls "
        "when the edge carries the other run's value; one with a positive score works against the task"
    ),
    "loss": (
        "the loss on the target, in nats per token (lower is better): an edge with a positive score helps, as it pulls the loss down, which rises when the "
        "edge carries the other run's value; one with a negative score works against the task"
    ),
    "kl": (
        "the KL divergence from the clean run's predictions, in nats (lower is better): an edge with a positive score matters, as the predictions move away "
        "when the edge carries the other run's value"
    ),
}

_LARGEST = 40

NORMALISED = number("0: as the corrupt run, 1: as the clean run; a ratio of means", "share", "low", "high")
"""Column of sweeps between two runs."""
WITHHELD = Column("why shares are not given, in words; empty where they are")
"""Column beside shares of a whole, see `mechscope.stats.shares`."""
TOKENIZER = Column('how ROUGE cut texts into words: "english" (a–z and digits, stemmed) or "unicode" (words of any script)')
"""Column beside ROUGE, see `mechscope.data.rouge`."""


def effect_columns(
    *, component: str = "the place", site: str = "what was changed there", positions: str = "the tokens at which it was changed"
) -> dict[str, Column]:
    """Describe the columns of a sweep, see `mechscope.causal.Effects`.

    Args:
        component: What a row is about.
        site: What `site` says.
        positions: What `positions` says.
    """
    return {
        "component": Column(component),
        "site": Column(site),
        "layer": Column("its layer, −1 where there is none"),
        "head": Column("its head, −1 where there is none"),
        "feature": Column("its neuron, expert or latent, −1 where there is none"),
        "positions": Column(positions),
        "metric": Column("the metric"),
        "n": Column("texts"),
        "value": number("mean metric of the changed run", "of the metric"),
        "effect": number("its mean difference from the unchanged run", "of the metric", "se", "low", "high", "p", "q", bare=True),
    }


def largest_effects(effects: pd.DataFrame, component: str = "component") -> View:
    """Return the rows of a sweep with the largest effects, as a table to read.

    Args:
        effects: The sweep.
        component: Heading of the first column.
    """
    view = Table(strongest(effects, "effect", _LARGEST)).words("component", component)
    if effects["positions"].nunique() > 1 or (effects["positions"] != "all").any():
        view = view.words("positions", "positions")
    view = view.numbers("effect", "effect", ends=("low", "high"), sign=True)
    view = view.shares("normalised", "normalised", ends=("normalised_low", "normalised_high"))
    return view.numbers("q", "q").numbers("n", "texts").view()


def estimated(row: pd.Series, column: str, *, share: bool = False, sign: bool = False) -> str:
    """Return a number of a row and its interval, where it has one: `+0.120 [+0.0280, +0.269]`, or as a share `12 % [3.10, 21.0]`.

    Args:
        row: A row with the columns `column`, `column_low` and `column_high`.
        column: Which number.
        share: Whether it is a fraction, written in per cent.
        sign: Whether a plus is written.
    """
    scale = 100 if share else 1
    value = percent(row[column]) if share else written(row[column], sign=sign)
    return f"{value} {interval(scale * row[f'{column}_low'], scale * row[f'{column}_high'], sign=sign)}".strip()


def share_of(row: Mapping[Any, Any] | pd.Series, column: str, whole: str) -> str:
    """Return a share of a row in words: `65 % [51.0, 80.2] of what the noise took`, or why it is withheld.

    Args:
        row: A row with the columns `column`, `column_low`, `column_high` and `withheld`.
        column: The share.
        whole: What it is a share of.
    """
    if row.get("withheld"):
        return f"its share of {whole} is withheld ({row['withheld']})"
    return f"{percent(row[column])} {interval(100 * row[f'{column}_low'], 100 * row[f'{column}_high'])} of {whole}".replace("  ", " ")


def withheld_shares(tables: Tables, name: str) -> list[Caveat]:
    """Return the caveat that shares of a table are withheld, with the most frequent reason; empty where none is."""
    table = tables.get(name)
    reasons = table["withheld"][table["withheld"].fillna("") != ""] if table is not None and "withheld" in table else pd.Series(dtype=str)
    if table is None or reasons.empty:
        return []
    reason = reasons.mode().iloc[0]
    more = ", and so are intervals and tests" if reason.startswith("too few") and len(reasons) == len(table) else ""
    return [Caveat(f"{len(reasons)} of {len(table)} shares are withheld{more}: {reason}.", name, withheld=True)]


def metric_in_words(name: object) -> str:
    """Say what a metric of edges is and which sign of an edge's score means that the edge helps; another name as it is."""
    return _METRICS.get(str(name), label(name))


def role_in_words(role: object) -> str:
    """Write a role for reading; what its name does not tell stands behind it."""
    return "negative OV (lowers the logit of what it attends to)" if role == "negative-ov" else name_of(role)


def layers_in_words(component: object) -> str:
    """Write a selection of layers for reading: `layers:1,4` as `layers 1 and 4`, `layers:2` as `layer 2`; what is no such selection stays."""
    name, _, listed = str(component).partition(":")
    layers = listed.split(",")
    if name != "layers" or not listed:
        return label(component)
    before, last = ", ".join(layers[:-1]), layers[-1]
    return f"layers {before} and {last}" if before else f"layer{'s' * ('-' in last)} {last}"


def texts(n: float) -> str:
    """Return a number of texts in words: `1 text`, `1,024 texts`."""
    return f"{written(int(n))} text{'' if n == 1 else 's'}"


def differ_from_zero(tables: Tables, name: str) -> tuple[str, tuple[Derived, ...]]:
    """Return how many effects of a sweep differ from zero, in words and as numbers: `3 of 48 effects differ from zero at q < 0.05`."""
    surely, all_of_them = Derived(name, (("q", "<", Q_SIGNIFICANT),)), Derived(name)
    if int(tables[name]["n"].max()) < FEWEST_TEXTS:
        return f"none of {all_of_them.written(tables)} effects has an interval or a test, which take {FEWEST_TEXTS} texts", (all_of_them,)
    differ = "differs" if surely.of(tables) == 1 else "differ"
    words = f"{surely.written(tables)} of {all_of_them.written(tables)} effects {differ} from zero at q < {Q_SIGNIFICANT}"
    return words, (surely, all_of_them)


def largest_effect(tables: Tables, name: str) -> tuple[pd.Series, str, str, dict[str, Any]]:
    """Return what a finding on a sweep says: the row with the largest effect, that effect and its interval in words, how many differ from zero in words,
    and the finding's keywords but for its card.

    Args:
        tables: The run's tables.
        name: The sweep's table, see `effect_columns`.
    """
    top = strongest(tables[name], "effect", 1).iloc[0]
    differ, counts = differ_from_zero(tables, name)
    size = f"{written(top['effect'], sign=True)} {interval(top['low'], top['high'], sign=True)}".rstrip()
    return top, size, differ, {"n": top["n"], "rows": (top,), "derived": counts, "effect": sized(top), "table": name}


def sized(row: Mapping[Any, Any] | pd.Series, column: str = "effect", se: str = "se") -> float:
    """Return the size of an effect in its standard errors, to order findings by; 0 where it has none."""
    effect, error = abs(float(row[column])), float(row[se])
    return effect / error if error > 0 else 0.0


NO_DOCUMENTS = f" {NO_SAMPLE}"
"""End of the caption of a figure that no text entered."""


def count_of(table: pd.DataFrame, column: str) -> str:
    """Return the column that counts the documents of another: its own, such as `write_change_n`, where it has one, else `n`."""
    return f"{column}_n" if f"{column}_n" in table else "n"


def counted_in(caption: str, table: pd.DataFrame, unit: str = "texts", column: str = "n") -> str:
    """Return a figure's caption with how many observations it rests on: `… n = 24 texts.`, or `… n = 20 to 24 texts.`"""
    said = sample(list(table[column].dropna()), unit) if column in table else ""
    return f"{caption} {said}." if said else caption


def main_rule(selection: pd.DataFrame | None, kind: str) -> str | None:
    """Return the rule whose choice the figures outline; None without any.

    Of layers the first by attention KL, of heads the first by what they write; else the first that is not a control.

    Args:
        selection: The selection table, or None.
        kind: ``layer`` or ``head``.
    """
    if selection is None:
        return None
    rules = [str(rule) for rule in dict.fromkeys(selection.loc[selection["kind"] == kind, "rule"])]
    # random and last layers are what a selection is compared with
    rules = [rule for rule in rules if not rule.startswith(("random", "last"))]
    preferred = "write" if kind == "head" else "kl"
    return next((rule for rule in rules if preferred in rule.lower()), rules[0] if rules else None)


def chosen(selection: pd.DataFrame | None, kind: str) -> list[tuple[int, int]]:
    """Return (layer, head) of what `main_rule` chose, sorted; the head of a layer is -1."""
    rule = main_rule(selection, kind)
    if selection is None or rule is None:
        return []
    rows = selection[(selection["rule"] == rule) & (selection["kind"] == kind) & selection["chosen"]]
    return sorted((int(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True))


def chosen_layers(tables: Tables) -> list[int]:
    """Return the selected layers; none without a selection."""
    return [layer for layer, _ in chosen(tables.get("selection"), "layer")]


def chosen_heads(tables: Tables) -> list[tuple[int, int]]:
    """Return (layer, head) of the selected heads; none without a selection."""
    return chosen(tables.get("selection"), "head")


def of_rows(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the part of a table over all tokens (else over its first kind of query rows) and that kind."""
    kinds = list(dict.fromkeys(table["rows"]))
    kind = "all" if "all" in kinds else str(kinds[0])
    return table[table["rows"] == kind], kind


def by_model(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return every model's words (``the base model``, else ``the model``) and rows."""
    named = {"base": "the base model", "tuned": "the tuned model"}
    return [(named.get(str(model), "the model"), own) for model, own in table.groupby("model", sort=False)]


def each_model(table: pd.DataFrame, before: str = ", ") -> list[tuple[str, str, pd.DataFrame]]:
    """Return of every model what ends its figure's name (``-1``), what ends its heading (``, base``) and its rows; both ends empty where there is one."""
    groups = list(table.groupby("model", sort=False))
    several = len(groups) > 1
    return [(f"-{i + 1}" * several, f"{before}{name_of(model)}" * several, own) for i, (model, own) in enumerate(groups)]


def verb(low: float, high: float, *, below: str, above: str, neither: str) -> str:
    """Return the word that an interval allows: it lies below zero, above zero, or it has zero (or no ends)."""
    if high < 0:
        return below
    return above if low > 0 else neither


def moved(row: pd.Series, column: str) -> str:
    """Return how a number of a row moved, as far as its interval goes: `fell`, `rose`, `is not shown to have changed`; empty without an interval."""
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return "" if pd.isna(low) else verb(low, high, below="fell", above="rose", neither="is not shown to have changed")


def worse_than_none(farther: Derived, tables: Tables) -> str:
    """Return how many trained maps are worse than none, as the end of a sentence: `; 1 is worse than none`; empty for none."""
    count = farther.of(tables)
    return f"; {farther.written(tables)} {'is' if count == 1 else 'are'} worse than none" if count else ""


def few_documents(tables: Tables, name: str) -> list[Caveat]:
    """Return the caveat that few documents were measured, where those of a table were few; the same words for all sections of a difference."""
    return _few(tables, name, "documents were measured")


def few_texts(tables: Tables, *names: str) -> list[Caveat]:
    """Return the caveat that few texts were read, for each of the named tables (with their number in `n`) that is of few."""
    return [caveat for name in names for caveat in _few(tables, name, "texts were read")]


def few_edits(tables: Tables, name: str) -> list[Caveat]:
    """Return the caveat that few edits were made, where those of a table (with their number in `n`) are few."""
    return _few(tables, name, "edits were made")


def _few(tables: Tables, name: str, what: str) -> list[Caveat]:
    most = int(tables[name]["n"].max()) if name in tables and tables[name]["n"].notna().any() else _FEW
    if most >= _FEW:
        return []
    if most < FEWEST_TEXTS:
        unit = what.partition(" ")[0]
        said = f"Too few {unit}: {most} of at least {FEWEST_TEXTS}, so there are no intervals and no tests."
        # shares that are withheld for it have said so
        return [] if any("too few" in each.text for each in withheld_shares(tables, name)) else [Caveat(said, name)]
    return [Caveat(f"Only {most} {what}; intervals from fewer than {_FEW} are rough.", name)]
