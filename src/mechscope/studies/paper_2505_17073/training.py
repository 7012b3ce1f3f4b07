"""Claims about targeted LoRA, judged from the bake-off's tables: ROUGE, steps and parameters.

The paper compares one targeted with one standard run. Here "at least as good" is a non-inferiority test with a stated margin, "better" means
better than random layers at the same budget (the control that the paper lacks), and nothing is decided from one or two seeds, since an interval
over documents alone says nothing about the next training run. Intervals are over trainings and documents at once (`mechscope.stats.crossed`). LoRA in
a circuit is judged the same way where it was run.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.report.theme import METRIC_NAMES
from mechscope.stats.crossed import MIN_DOCUMENTS, MIN_TRAININGS, trainings_for
from mechscope.stats.inference import interval
from mechscope.studies.paper_2505_17073.judgement import SIGNIFICANT, Judgement, Scope, Tables, Verdict, percent, verdict

# "equal_rank" is the paper's protocol; at equal parameters the targeted layers get a higher rank instead
PROTOCOLS = {"equal_rank": "at equal rank", "equal_parameters": "at equal trainable parameters"}
# the paper saves 75 %; a depth that is no multiple of four cannot be cut to exactly a quarter, 6 layers come to 67 %
PAPER_SAVING, SAVING = 0.75, 0.65
_EQUAL = "equal_parameters"


def versus_standard(tables: Tables, scope: Scope, *, protocol: str) -> Judgement:
    """Compare targeted with standard LoRA."""
    judgement = Judgement(
        f"LoRA in the most changed layers alone is at least as good as LoRA in every layer, {PROTOCOLS[protocol]} "
        f"({METRIC_NAMES[scope.metric]} not lower by {100 * scope.margin:g} points or more).",
        "Targeted LoRA (layers 2, 3, 5) summarises at least as well as standard LoRA, at equal rank.",
    )
    return _judged(judgement, tables, scope, protocol, "vs_standard", -scope.margin, "standard LoRA")


def versus_random(tables: Tables, scope: Scope, *, protocol: str) -> Judgement:
    """Compare targeted LoRA with LoRA in as many random layers."""
    judgement = Judgement(
        f"LoRA in the most changed layers is better than LoRA in as many random layers, {PROTOCOLS[protocol]} ({METRIC_NAMES[scope.metric]}).",
        "Not tested in the paper.",
    )
    return _judged(judgement, tables, scope, protocol, "vs_random", 0.0, "random layers")


def circuit_versus_standard(tables: Tables, scope: Scope) -> Judgement | None:
    """Compare LoRA in the circuit with standard LoRA at equal trainable parameters; None where they were not compared."""
    judgement = Judgement(
        f"LoRA in the circuit's heads and MLPs alone is at least as good as LoRA in every layer, {PROTOCOLS[_EQUAL]} "
        f"({METRIC_NAMES[scope.metric]} not lower by {100 * scope.margin:g} points or more).",
        "Not tested in the paper.",
    )
    judgement = _judged(judgement, tables, scope, _EQUAL, "vs_standard", -scope.margin, "standard LoRA", strategy="circuit")
    return None if np.isnan(judgement.value) else judgement


def circuit_versus_random(tables: Tables, scope: Scope) -> Judgement | None:
    """Compare LoRA in the circuit with LoRA in random circuits at equal trainable parameters; None where they were not compared."""
    judgement = Judgement(
        f"LoRA in the circuit's heads and MLPs is better than LoRA in random circuits of the same shape, {PROTOCOLS[_EQUAL]} ({METRIC_NAMES[scope.metric]}).",
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
    bakeoff = tables.get("bakeoff")
    compared_with = None if versus == "vs_standard" else "random_circuit" if strategy == "circuit" else "random_layers"
    metric, compared = scope.metric, _runs(tables.get("bakeoff_summary"), protocol, strategy)
    compared = compared[compared["metric"] == metric] if len(compared) else compared
    if compared.empty or np.isnan(compared[versus].iloc[0]):
        return judgement
    row = compared.iloc[0]
    value, low, high, seeds = float(row[versus]), float(row[f"{versus}_low"]), float(row[f"{versus}_high"]), int(row["n_seeds"])
    what = f"{METRIC_NAMES[metric]} of {strategy.replace('_', ' ')} minus {other}: {100 * value:+.2f} points"
    over = f"{int(row['n_documents'])} documents and {_seeds(seeds)}"
    judgement = judgement.replaced(value=value, unit="training", overturn=_more_seeds(seeds, float(row[f"{versus}_sd"]), scope.margin))
    if np.isnan(low):
        ends = f"{100 * row[f'{versus}_documents_low']:+.2f} to {100 * row[f'{versus}_documents_high']:+.2f}"
        few = seeds < MIN_TRAININGS
        why = "So few trainings cannot tell a placement from its seed" if few else "So few documents say nothing of others"
        return judgement.replaced(
            overturn=judgement.overturn if few else f"At least {MIN_DOCUMENTS} documents (rouge_documents).",
            measured=f"{what} (of these trainings, over documents: {ends}).",
            note=f"Paired over {over}. {why}: no interval over trainings, undecided.",
        )
    return judgement.replaced(
        measured=f"{what} ({100 * low:+.2f} to {100 * high:+.2f}).",
        low=low,
        high=high,
        verdict=verdict(low, high, threshold),
        note=f"Paired over {over}; the interval is over both."
        + (" The whole interval is above zero." if low > 0 else "")
        + _unfinished(
            _runs(bakeoff, protocol, strategy),
            _standard(bakeoff, protocol) if compared_with is None else _runs(bakeoff, protocol, compared_with),
        ),
    )


def _unfinished(*runs: pd.DataFrame) -> str:
    """Say how many of the trainings had not converged: placements are then compared at this budget, not at their best."""
    arrived = np.concatenate([table["converged"].to_numpy(dtype=bool) for table in runs if len(table)] or [np.ones(0, dtype=bool)])
    late = int((~arrived).sum())
    return f" {late} of these {len(arrived)} trainings had not converged: this compares them at their budget." if late else ""


def _seeds(number: int) -> str:
    return f"{number} seed{'s' if number != 1 else ''}"


def _more_seeds(seeds: int, sd: float, margin: float) -> str:
    """Say how many seeds would tell a difference of the margin, as far as the spread between seeds is known."""
    if np.isnan(sd):
        return f"At least {MIN_TRAININGS} seeds; how many tell {100 * margin:g} points is known once two were run."
    enough = trainings_for(margin, sd)
    number = "more than a thousand" if enough is None else f"about {enough}"
    spread = f"differences vary by {100 * sd:.2f} points (SD) between {_seeds(seeds)}"
    return f"{number[0].upper()}{number[1:]} seeds give an interval of ± {100 * margin:g} points: {spread}; documents come on top."


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
    curves = tables.get("learning_curves")
    if seeds.empty or curves is None:
        return judgement
    reached = targeted.loc[seeds, "steps_to_standard_best"].notna().to_numpy()
    own = " after {:.0f} steps, standard LoRA's after {:.0f}".format(
        *(runs.loc[seeds, "best_step"].mean() for runs in (targeted, standard))
    )
    note = _unfinished(targeted.loc[seeds], standard.loc[seeds])
    judgement = judgement.replaced(
        unit="training", measured=f"Standard LoRA's best is reached in {int(reached.sum())} of {_seeds(len(seeds))}; own best{own}."
    )
    steps = np.array(
        [
            _steps_to_common_loss(_curve(curves, protocol, "targeted_layers", seed), _standard_curve(curves, protocol, seed))
            for seed in seeds
        ]
    )
    if not (steps > 0).all():
        return judgement.replaced(note="A loss that both reach is reached without training: no ratio of steps." + note)
    ratio = np.log(steps[:, 0] / steps[:, 1])
    value = float(np.exp(ratio.mean()))
    measured = f"{percent(value)} of standard LoRA's steps to the loss that both reach ({steps[:, 0].mean():.0f} against {steps[:, 1].mean():.0f}). "
    judgement = judgement.replaced(measured=measured + judgement.measured, value=value)
    if len(seeds) < MIN_TRAININGS:
        return judgement.replaced(
            note=f"{_seeds(len(seeds))}: no interval over trainings, undecided." + note, overturn=f"At least {MIN_TRAININGS} seeds."
        )
    low, high = (float(np.exp(end)) for end in _over_seeds(ratio, SIGNIFICANT))
    # three ways to decide share the 5 %
    sooner, later = _over_seeds(ratio, SIGNIFICANT / 3)
    worse, _ = _over_seeds(
        (targeted.loc[seeds, "best_loss"] - standard.loc[seeds, "best_loss"]).to_numpy(dtype=np.float64), SIGNIFICANT / 3
    )
    grain = _steps_between_evaluations(curves, protocol)
    told = abs(float((steps[:, 1] - steps[:, 0]).mean())) > grain
    decided: Verdict = "undecided"
    if later < 0 and told and reached.all():
        decided = "supported"
    elif (sooner > 0 and told) or (worse > 0 and not reached.any()):
        decided = "contradicted"
    return judgement.replaced(
        low=low,
        high=high,
        verdict=decided,
        note=f"Ratio of steps, geometric mean over {_seeds(len(seeds))}, t interval; below 1 is fewer. Supported where it is below 1 and standard "
        "LoRA's best is reached with every seed; contradicted where it is above 1, or where that best is never reached and the own best is worse; "
        "each at 1.7\u202f%, together 5\u202f%."
        + (f" Losses are known every {grain:g} steps; a difference no larger decides nothing." if grain else "")
        + note,
        overturn="More seeds; evaluations closer to each other.",
    )


def _over_seeds(values: np.ndarray, level: float) -> tuple[float, float]:
    """Return the t interval of a mean over seeds at a level of significance."""
    low, high = interval(values.mean(), values.std(ddof=1) / np.sqrt(len(values)), len(values), level=1 - level, fewest=MIN_TRAININGS)
    return float(low), float(high)


def _steps_to_common_loss(one: pd.DataFrame, other: pd.DataFrame) -> tuple[float, float]:
    """Return the first evaluated steps at which two runs reach the loss that both reach: the worse of their two bests.

    A goal that one run sets would favour it; this one is the same whichever run is called standard.
    """
    goal = max(one["validation_loss"].min(), other["validation_loss"].min())
    first, second = (float(curve.loc[curve["validation_loss"] <= goal, "step"].min()) for curve in (one, other))
    return first, second


def _curve(curves: pd.DataFrame, protocol: str, strategy: str, seed: int) -> pd.DataFrame:
    runs = _runs(curves, protocol, strategy)
    return runs[runs["seed"] == seed]


def _standard_curve(curves: pd.DataFrame, protocol: str, seed: int) -> pd.DataFrame:
    runs = _standard(curves, protocol)
    return runs[runs["seed"] == seed]


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
        unit="parameter",
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
