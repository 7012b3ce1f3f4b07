"""Claims that interventions decide: are the layers and heads that changed most the ones that carry the improvement?

The paper calls the layers and heads whose attention changed most its "summarization circuit" without intervening on them; these rows say what
happens when one does. Both presuppose that fine-tuning improved something, and are withheld where it is not shown to have lowered the loss.

The null is that the selection picked one more random set like it: the selected set and the others are then exchangeable, so its rank among them is exact.
Like it is a set of as many layers, as many of them neighbours, at any depth: where late layers carry more than early ones and changed more, the statement
is true of these layers, and silent on why. An interval over documents alone would be none: any two sets of layers differ, and with enough documents
surely.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.shared import layers_in_words
from mechscope.report.verdicts import FEWEST_SETS, rank_verdict
from mechscope.studies.paper_2505_17073.judgement import Judgement, Scope, Tables, Verdict, percent

Row = pd.Series | Mapping[Any, Any]


def layers_carry(tables: Tables, scope: Scope) -> Judgement:
    """Compare what the selected layers carry of the gain with what other sets of as many layers carry."""
    judgement = Judgement(
        "The most changed layers are the ones that carry the improvement: put into the base model, their activations bring more of it than "
        "those of other layers.",
        "Implied by calling them the summarization circuit; not tested by intervention.",
        unit="set of layers",
    )
    if "layer_sets" not in tables:
        return judgement
    sets = tables["layer_sets"]
    row = sets[sets["selected"]].iloc[0]
    if row["withheld"]:
        return withheld(judgement, row["withheld"])
    others = sets.loc[~sets["selected"], "share"]
    if others.empty:
        return judgement.replaced(note="There is no other set of as many layers to compare with.")
    more, low, high = float(row["more"]), float(row["more_low"]), float(row["more_high"])
    measured = (
        f"Alone, {layers_in_words(row['component'])} carry {percent(float(row['share']))} of the gain in loss; {len(others)} other sets of as many layers, "
        f"as many of them neighbours, carry {percent(float(others.mean()))} on average (difference {_points(more)}, 95\u202f% interval "
        f"over {int(row['n'])} documents {_points(low)} to {_points(high)}); {ranks(row)}."
    )
    # the rank says whether another selection would do as well, the interval whether other documents would say so too
    agreed = {"supported": low > 0, "contradicted": high < 0}
    decided: Verdict = ranked(row)
    decided = decided if agreed.get(decided, True) else "undecided"
    return judgement.replaced(
        measured=measured,
        value=more,
        low=low,
        high=high,
        verdict=decided,
        note=_correlation(tables.get("importance")),
        overturn=overturned(len(others), "a model with more layers, or fewer layers selected"),
    )


def heads_matter(tables: Tables, scope: Scope) -> Judgement:
    """Compare the cost of ablating the selected heads with that of random heads of the same layers."""
    judgement = Judgement(
        "The most changed heads matter more for the tuned model than random heads of the same layers.",
        "Not tested in the paper.",
        unit="set of heads",
    )
    if "ablation" not in tables:
        return judgement
    ablation = tables["ablation"]
    row = ablation[ablation["kind"] == "selected"].iloc[0]
    if row["withheld"]:
        return withheld(judgement, row["withheld"])
    random = ablation.loc[ablation["kind"] == "random", "effect"]
    if random.empty:
        return judgement.replaced(note="The selected heads fill their layers, so there are no other sets like them.")
    low, high = (float(x) for x in np.quantile(random, [0.025, 0.975]))
    cost = float(row["effect"])
    return judgement.replaced(
        measured=f"Ablating them costs {cost:+.3f} nats per token; {len(random)} random sets with as many heads in each layer cost "
        f"{random.mean():+.3f} on average (95\u202f% of them {low:+.3f} to {high:+.3f}); {ranks(row)}.",
        value=cost - float(random.mean()),
        low=cost - high,
        high=cost - low,
        verdict=ranked(row),
        note="The range is that of the difference from random sets, on these documents.",
        overturn=overturned(len(random), "more random sets (random_sets)"),
    )


def ranked(row: Row) -> Verdict:
    """Judge "more than random sets" by its ranks among them."""
    words: dict[str, Verdict] = {"more": "supported", "less": "contradicted"}
    return words.get(rank_verdict(row), "undecided")


def withheld(judgement: Judgement, reason: str) -> Judgement:
    """Return a judgement of what fine-tuning improved where it did not."""
    return judgement.replaced(
        measured=f"Withheld: {reason}.",
        verdict="withheld",
        overturn="A tuned model that is shown to have a lower loss than the base on these summaries; more of them, if it is only not shown.",
    )


def ranks(row: Row) -> str:
    """Write the two-sided p of a rank among random sets."""
    return f"rank p = {min(1.0, 2 * min(row['p_random'], row['p_less'])):.3g}"


def overturned(sets: int, more: str) -> str:
    """Say what would overturn a rank among so many random sets: more of them, got by `more`, where they are too few to decide."""
    if sets < FEWEST_SETS:
        return f"{sets} other sets cannot decide at 5\u202f% (two-sided), {FEWEST_SETS} can: {more}."
    return "Other documents, or another training, in which another selection does as well: this is one pair of models."


def _correlation(importance: pd.DataFrame | None) -> str:
    """Say how the ranks of change and of gain carried agree."""
    if importance is None or importance.empty:
        return ""
    parts = []
    for level in ("layer", "head"):
        rows = importance[(importance["level"] == level) & (importance["by"] == "activations") & (importance["into"] == "into_base")]
        if len(rows) and not np.isnan(rows["rho"].iloc[0]):
            row = rows.iloc[0]
            parts.append(f"over {int(row['n'])} {level}s {row['rho']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})")
    return f"Rank correlation of attention KL with the gain carried: {'; '.join(parts)}." if parts else ""


def _points(share: float) -> str:
    return f"{100 * share:+.0f} points"
