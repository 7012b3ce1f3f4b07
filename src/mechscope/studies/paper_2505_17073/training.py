"""Claims about targeted LoRA, judged from the bake-off's tables: ROUGE, steps and parameters.

The paper compares one targeted with one standard run. Here "at least as good" is a non-inferiority test with a stated margin, "better" means
better than random layers at the same budget (the control that the paper lacks), and nothing is decided from a single seed, since an interval
over documents alone says nothing about the next training run. LoRA in a circuit is judged the same way where it was run.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.stats.inference import interval
from mechscope.studies.paper_2505_17073.judgement import NAN, Judgement, Scope, Tables, percent, verdict

# "equal_rank" is the paper's protocol; at equal parameters the targeted layers get a higher rank instead
PROTOCOLS = {"equal_rank": "at equal rank", "equal_parameters": "at equal trainable parameters"}
# the paper saves 75 %; a depth that is no multiple of four cannot be cut to exactly a quarter, 6 layers come to 67 %
PAPER_SAVING, SAVING = 0.75, 0.65
_EQUAL = "equal_parameters"


def versus_standard(tables: Tables, scope: Scope, *, protocol: str) -> Judgement:
    """Compare targeted with standard LoRA."""
    judgement = Judgement(
        f"LoRA in the most changed layers alone is at least as good as LoRA in every layer, {PROTOCOLS[protocol]} "
        f"({scope.metric} not lower by {100 * scope.margin:g} points or more).",
        "Targeted LoRA (layers 2, 3, 5) summarises at least as well as standard LoRA, at equal rank.",
    )
    return _judged(judgement, tables, scope, protocol, "vs_standard", -scope.margin, "standard LoRA")


def versus_random(tables: Tables, scope: Scope, *, protocol: str) -> Judgement:
    """Compare targeted LoRA with LoRA in as many random layers."""
    judgement = Judgement(
        f"LoRA in the most changed layers is better than LoRA in as many random layers, {PROTOCOLS[protocol]} ({scope.metric}).",
        "Not tested in the paper.",
    )
    return _judged(judgement, tables, scope, protocol, "vs_random", 0.0, "random layers")


def circuit_versus_standard(tables: Tables, scope: Scope) -> Judgement | None:
    """Compare LoRA in the circuit with standard LoRA at equal trainable parameters; None where they were not compared."""
    judgement = Judgement(
        f"LoRA in the circuit's heads and MLPs alone is at least as good as LoRA in every layer, {PROTOCOLS[_EQUAL]} "
        f"({scope.metric} not lower by {100 * scope.margin:g} points or more).",
        "Not tested in the paper.",
    )
    judgement = _judged(judgement, tables, scope, _EQUAL, "vs_standard", -scope.margin, "standard LoRA", strategy="circuit")
    return None if np.isnan(judgement.value) else judgement


def circuit_versus_random(tables: Tables, scope: Scope) -> Judgement | None:
    """Compare LoRA in the circuit with LoRA in random circuits at equal trainable parameters; None where they were not compared."""
    judgement = Judgement(
        f"LoRA in the circuit's heads and MLPs is better than LoRA in random circuits of the same shape, {PROTOCOLS[_EQUAL]} ({scope.metric}).",
        "Not tested in the paper.",
    )
    judgement = _judged(judgement, tables, scope, _EQUAL, "vs_random", 0.0, "random circuits", strategy="circuit")
    return None if np.isnan(judgement.value) else judgement


def _judged(
    judgement: Judgement,
    tables: Tables,
    scope: Scope,
    protocol: str,
    versus: str,
    threshold: float,
    other: str,
    *,
    strategy: str = "targeted_layers",
) -> Judgement:
    """Judge a paired ROUGE difference against a threshold."""
    metric, compared = scope.metric, _runs(tables.get("bakeoff_summary"), protocol, strategy)
    compared = compared[compared["metric"] == metric] if len(compared) else compared
    if compared.empty or np.isnan(compared[versus].iloc[0]):
        return judgement
    row = compared.iloc[0]
    value, low, high, seeds = float(row[versus]), float(row[f"{versus}_low"]), float(row[f"{versus}_high"]), int(row["n_seeds"])
    note = f"Paired over {int(row['n_documents'])} documents and {seeds} seed{'s' if seeds != 1 else ''}."
    if seeds < 2:
        note += " One training run each cannot tell a placement from its seed: undecided."
    elif low > 0:
        note += " The whole interval is above zero."
    return judgement.replaced(
        measured=f"{metric} of {strategy.replace('_', ' ')} minus {other}: {100 * value:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}).",
        value=value,
        low=low,
        high=high,
        verdict=verdict(low, high, threshold) if seeds >= 2 else "undecided",
        note=note,
    )


def fewer_steps(tables: Tables, scope: Scope, *, protocol: str) -> Judgement:
    """Compare steps to standard LoRA's best loss: one goal for both, where each run's own best would reward stopping at a worse loss."""
    judgement = Judgement(
        f"LoRA in the most changed layers alone reaches standard LoRA's best validation loss in fewer steps than standard LoRA did, {PROTOCOLS[protocol]}.",
        "10 epochs become 6 (to each run's own best).",
    )
    bakeoff = tables.get("bakeoff")
    runs = (_runs(bakeoff, protocol, "targeted_layers"), _standard(bakeoff, protocol)) if bakeoff is not None else ()
    if not runs or any(table.empty for table in runs):
        return judgement
    targeted, standard = (table.set_index("seed") for table in runs)
    seeds = targeted.index.intersection(standard.index)
    if seeds.empty:
        return judgement
    needed, needed_by_standard = (
        table.loc[seeds, column].to_numpy(dtype=np.float64)
        for table, column in ((targeted, "steps_to_standard_best"), (standard, "best_step"))
    )
    reached = ~np.isnan(needed)
    own = f"own best after {targeted.loc[seeds, 'best_step'].mean():.0f} steps, standard LoRA's after {needed_by_standard.mean():.0f}"
    judgement = judgement.replaced(measured=f"Reached in {int(reached.sum())} of {len(seeds)} seeds; {own}.")
    late = int((~standard.loc[seeds, "stopped_early"].astype(bool)).sum())
    note = f" In {late} of {len(seeds)} seeds standard LoRA was still improving when training ended." if late else ""
    if not reached.any():
        decided = "contradicted" if len(seeds) >= 2 else "undecided"
        return judgement.replaced(verdict=decided, note="Never reached within the training given, with any seed." + note)
    if not reached.all() or (needed <= 0).any() or (needed_by_standard <= 0).any():
        return judgement.replaced(note="Not reached, or reached without training, in some seeds: no ratio of steps." + note)
    ratio = np.log(needed / needed_by_standard)
    error = ratio.std(ddof=1) / np.sqrt(len(ratio)) if len(ratio) > 1 else NAN
    low, high = (float(np.exp(end)) for end in interval(ratio.mean(), error, len(ratio)))
    grain = _steps_between_evaluations(tables.get("learning_curves"), protocol)
    saved = float((needed_by_standard - needed).mean())
    decided = "undecided" if abs(saved) <= grain else verdict(-high, -low, -1.0)
    return judgement.replaced(
        measured=f"{percent(float(np.exp(ratio.mean())))} of standard LoRA's steps "
        f"({needed.mean():.0f} against {needed_by_standard.mean():.0f}); {own}.",
        value=float(np.exp(ratio.mean())),
        low=low,
        high=high,
        verdict=decided,
        note=f"Ratio of steps, geometric mean over seeds ({len(ratio)}), t interval; below 1 is fewer."
        + (f" Losses are known every {grain:g} steps; a difference no larger decides nothing." if grain else "")
        + note,
    )


def fewer_parameters(tables: Tables, scope: Scope) -> Judgement:
    """Count what targeted and standard LoRA train at equal rank."""
    judgement = Judgement(
        f"LoRA in the most changed layers alone trains about a quarter of standard LoRA's parameters at equal rank "
        f"(at least {percent(SAVING)} fewer).",
        f"{percent(PAPER_SAVING)} fewer (3 of 12 layers).",
    )
    bakeoff = tables.get("bakeoff")
    targeted, standard = _runs(bakeoff, "equal_rank", "targeted_layers"), _standard(bakeoff, "equal_rank")
    if targeted.empty or standard.empty:
        return judgement
    few, many = (float(table["trainable_parameters"].mean()) for table in (targeted, standard))
    saving = 1 - few / many
    return judgement.replaced(
        measured=f"{few:,.0f} against {many:,.0f} trainable parameters: {percent(saving)} fewer.",
        value=saving,
        low=saving,
        high=saving,
        verdict="supported" if saving >= SAVING else "contradicted" if saving <= 0 else "undecided",
        note=f"Counted, not estimated: the interval has no width. Components: {targeted['components'].iloc[0]}.",
    )


def _runs(table: pd.DataFrame | None, protocol: str, strategy: str) -> pd.DataFrame:
    """Return the rows of a strategy under a protocol; an empty table where there are none."""
    if table is None:
        return pd.DataFrame()
    return table[(table["protocol"] == protocol) & (table["strategy"] == strategy)]


def _standard(bakeoff: pd.DataFrame | None, protocol: str) -> pd.DataFrame:
    """Return standard LoRA's runs: those of the protocol, or those that all protocols share as their reference."""
    runs = (_runs(bakeoff, name, "standard") for name in (protocol, "reference", "equal_rank"))
    return next((table for table in runs if len(table)), pd.DataFrame())


def _steps_between_evaluations(curves: pd.DataFrame | None, protocol: str) -> float:
    """Return the largest distance between two evaluations of a targeted run; 0 where the curves are not at hand."""
    evaluations = _runs(curves, protocol, "targeted_layers")
    evaluations = evaluations[evaluations["validation_loss"].notna()] if len(evaluations) else evaluations
    if evaluations.empty:
        return 0.0
    gaps = evaluations.sort_values("step").groupby("seed")["step"].diff()
    return float(gaps.max()) if gaps.notna().any() else 0.0
