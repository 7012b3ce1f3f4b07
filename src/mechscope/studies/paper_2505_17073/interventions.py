"""Claims that interventions decide: are the layers and heads that changed most the ones that carry the improvement?

The paper calls the layers and heads whose attention changed most its "summarization circuit" without intervening on them; these rows say what
happens when one does.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.studies.paper_2505_17073.judgement import SIGNIFICANT, Judgement, Scope, Tables, Verdict, percent, verdict


def layers_carry(tables: Tables, scope: Scope) -> Judgement:
    """Compare what the selected layers carry of the gain with what other sets of as many layers carry."""
    judgement = Judgement(
        "The most changed layers are the ones that carry the improvement: put into the base model, their activations bring more of it than "
        "those of other layers.",
        "Implied by calling them the summarization circuit; not tested by intervention.",
    )
    if "layer_sets" not in tables:
        return judgement
    sets = tables["layer_sets"]
    row = sets[sets["selected"]].iloc[0]
    if np.isnan(row["more"]):
        return judgement.replaced(note="There is no other set of as many layers to compare with, or fine-tuning changed no loss.")
    others = sets.loc[~sets["selected"], "share"]
    more, low, high = float(row["more"]), float(row["more_low"]), float(row["more_high"])
    measured = (
        f"Alone, {row['component']} carry {percent(float(row['share']))} of the gain in loss; {len(others)} other sets of as many layers carry "
        f"{percent(float(others.mean()))} on average (difference {_points(more)}, 95 % interval {_points(low)} to {_points(high)})."
    )
    return judgement.replaced(
        measured=measured, value=more, low=low, high=high, verdict=verdict(low, high, 0.0), note=_correlation(tables.get("importance"))
    )


def heads_matter(tables: Tables, scope: Scope) -> Judgement:
    """Compare the cost of ablating the selected heads with that of random heads of the same layers."""
    judgement = Judgement(
        "The most changed heads matter more for the tuned model than random heads of the same layers.",
        "Not tested in the paper.",
    )
    if "ablation" not in tables:
        return judgement
    ablation = tables["ablation"]
    row = ablation[ablation["kind"] == "selected"].iloc[0]
    random = ablation.loc[ablation["kind"] == "random", "effect"]
    if random.empty:
        return judgement.replaced(note="The selected heads fill their layers, so there are no other sets like them.")
    p = float(row["p_random"])
    low, high = (float(x) for x in np.quantile(random, [0.025, 0.975]))
    cost = float(row["effect"])
    decided: Verdict = "supported" if p < SIGNIFICANT else "contradicted" if cost < low else "undecided"
    return judgement.replaced(
        measured=f"Ablating them costs {cost:+.3f} nats per token; {len(random)} random sets with as many heads in each layer cost "
        f"{random.mean():+.3f} on average (95 % of them {low:+.3f} to {high:+.3f}); p = {p:.3g}.",
        value=cost - float(random.mean()),
        low=cost - high,
        high=cost - low,
        verdict=decided,
        note="The interval is that of the difference from random sets.",
    )


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
