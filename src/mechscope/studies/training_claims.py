"""The claims of paper 1 about targeted LoRA, judged from the bake-off's tables: ROUGE, steps and parameters.

The paper compares one targeted with one standard run. Here "at least as good" is a non-inferiority test with a stated margin, "better" is
asked of random layers at the same budget (the control that the paper lacks), and nothing is decided from a single seed, since an interval
over documents alone says nothing about the next training run. LoRA in a circuit is judged the same way where it was run. `Claim` is the row
of the claims table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from mechscope.stats.inference import interval

Verdict = Literal["supported", "contradicted", "undecided", "no change"]
NAN = float("nan")
# "equal_rank" is the paper's protocol; at equal parameters the targeted layers get a higher rank instead
PROTOCOLS = {"equal_rank": "at equal rank", "equal_parameters": "at equal trainable parameters"}
# the paper saves 75 %; a depth that is no multiple of four cannot be cut to exactly a quarter, 6 layers come to 67 %
PAPER_SAVING, SAVING = 0.75, 0.65


@dataclass(frozen=True)
class Claim:
    """One claim, what the paper says, what was measured and the verdict; the columns of the claims table."""

    claim: str
    statement: str
    paper: str
    measured: str = "not measured"
    value: float = NAN
    low: float = NAN
    high: float = NAN
    verdict: str = "undecided"
    note: str = ""

    def replaced(self, **fields: Any) -> Claim:
        """Return the claim with some fields changed."""
        return replace(self, **fields)

    def row(self) -> dict[str, str | float]:
        """Return the claim as a row of the table."""
        return asdict(self)


def verdict(low: float, high: float, threshold: float) -> Verdict:
    """Judge a claim that something exceeds a threshold by the interval it was measured with; undecided where that is NaN."""
    return "supported" if low > threshold else "contradicted" if high < threshold else "undecided"


def percent(share: float) -> str:
    """Write a fraction as a percentage."""
    return "unknown" if np.isnan(share) else f"{100 * share:.0f} %"


def training_claims(
    bakeoff: pd.DataFrame | None,
    summary: pd.DataFrame | None,
    curves: pd.DataFrame | None,
    *,
    metric: str = "rougeL",
    margin: float = 0.005,
) -> list[Claim]:
    """Judge the claims about targeted LoRA; those about LoRA in a circuit are there only if it was compared.

    Args:
        bakeoff: The bake-off's runs, or None.
        summary: The bake-off's intervals, or None.
        curves: The learning curves, or None.
        metric: The ROUGE score that decides.
        margin: By how much of that score targeted LoRA may fall behind standard LoRA and still count as equal.
    """
    claims = []
    for protocol, words in PROTOCOLS.items():
        claims.append(_versus_standard(summary, protocol, words, metric, margin))
        claims.append(_versus_random(summary, protocol, words, metric))
        claims.append(_fewer_steps(bakeoff, curves, protocol, words))
    return [*claims, _fewer_parameters(bakeoff), *_circuit(summary, metric, margin)]


def _versus_standard(summary: pd.DataFrame | None, protocol: str, words: str, metric: str, margin: float) -> Claim:
    claim = Claim(
        f"targeted_vs_standard.{protocol}",
        f"LoRA in the most changed layers alone is at least as good as LoRA in every layer, {words} "
        f"({metric} not lower by {100 * margin:g} points or more).",
        "Targeted LoRA (layers 2, 3, 5) summarises at least as well as standard LoRA, at equal rank.",
    )
    return _judged(claim, summary, protocol, metric, "vs_standard", -margin, "standard LoRA")


def _versus_random(summary: pd.DataFrame | None, protocol: str, words: str, metric: str) -> Claim:
    claim = Claim(
        f"targeted_vs_random.{protocol}",
        f"LoRA in the most changed layers is better than LoRA in as many random layers, {words} ({metric}).",
        "Not tested in the paper.",
    )
    return _judged(claim, summary, protocol, metric, "vs_random", 0.0, "random layers")


def _circuit(summary: pd.DataFrame | None, metric: str, margin: float) -> list[Claim]:
    """Judge LoRA in the circuit's heads and MLPs at equal trainable parameters; what it was not compared with is left out."""
    protocol = "equal_parameters"
    versus_standard = Claim(
        f"circuit_vs_standard.{protocol}",
        f"LoRA in the circuit's heads and MLPs alone is at least as good as LoRA in every layer, {PROTOCOLS[protocol]} "
        f"({metric} not lower by {100 * margin:g} points or more).",
        "Not tested in the paper.",
    )
    versus_random = Claim(
        f"circuit_vs_random.{protocol}",
        f"LoRA in the circuit's heads and MLPs is better than LoRA in random circuits of the same shape, {PROTOCOLS[protocol]} ({metric}).",
        "Not tested in the paper.",
    )
    claims = [
        _judged(versus_standard, summary, protocol, metric, "vs_standard", -margin, "standard LoRA", strategy="circuit"),
        _judged(versus_random, summary, protocol, metric, "vs_random", 0.0, "random circuits", strategy="circuit"),
    ]
    return [claim for claim in claims if not np.isnan(claim.value)]


def _judged(
    claim: Claim,
    summary: pd.DataFrame | None,
    protocol: str,
    metric: str,
    versus: str,
    threshold: float,
    other: str,
    *,
    strategy: str = "targeted_layers",
) -> Claim:
    """Judge a paired ROUGE difference against a threshold."""
    found = _runs(summary, protocol, strategy)
    found = found[found["metric"] == metric] if len(found) else found
    if found.empty or np.isnan(found[versus].iloc[0]):
        return claim
    row = found.iloc[0]
    value, low, high, seeds = float(row[versus]), float(row[f"{versus}_low"]), float(row[f"{versus}_high"]), int(row["n_seeds"])
    note = f"Paired over {int(row['n_documents'])} documents and {seeds} seed{'s' if seeds != 1 else ''}."
    if seeds < 2:
        note += " One training run each cannot tell a placement from its seed: undecided."
    elif low > 0:
        note += " The whole interval is above zero."
    return claim.replaced(
        measured=f"{metric} of {strategy.replace('_', ' ')} minus {other}: {100 * value:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}).",
        value=value,
        low=low,
        high=high,
        verdict=verdict(low, high, threshold) if seeds >= 2 else "undecided",
        note=note,
    )


def _fewer_steps(bakeoff: pd.DataFrame | None, curves: pd.DataFrame | None, protocol: str, words: str) -> Claim:
    """Compare steps to standard LoRA's best loss: one goal for both, where each run's own best would reward stopping at a worse loss."""
    claim = Claim(
        f"fewer_steps.{protocol}",
        f"LoRA in the most changed layers alone reaches standard LoRA's best validation loss in fewer steps than standard LoRA did, {words}.",
        "10 epochs become 6 (to each run's own best).",
    )
    runs = (_runs(bakeoff, protocol, "targeted_layers"), _standard(bakeoff, protocol)) if bakeoff is not None else ()
    if not runs or any(found.empty for found in runs):
        return claim
    targeted, standard = (found.set_index("seed") for found in runs)
    seeds = targeted.index.intersection(standard.index)
    if seeds.empty:
        return claim
    needed, needed_by_standard = (
        table.loc[seeds, column].to_numpy(dtype=np.float64)
        for table, column in ((targeted, "steps_to_standard_best"), (standard, "best_step"))
    )
    reached = ~np.isnan(needed)
    own = f"own best after {targeted.loc[seeds, 'best_step'].mean():.0f} steps, standard LoRA's after {needed_by_standard.mean():.0f}"
    claim = claim.replaced(measured=f"Reached in {int(reached.sum())} of {len(seeds)} seeds; {own}.")
    late = int((~standard.loc[seeds, "stopped_early"].astype(bool)).sum())
    note = f" In {late} of {len(seeds)} seeds standard LoRA was still improving when training ended." if late else ""
    if not reached.any():
        decided = "contradicted" if len(seeds) >= 2 else "undecided"
        return claim.replaced(verdict=decided, note="Never reached within the training given, with any seed." + note)
    if not reached.all() or (needed <= 0).any() or (needed_by_standard <= 0).any():
        return claim.replaced(note="Not reached, or reached without training, in some seeds: no ratio of steps." + note)
    ratio = np.log(needed / needed_by_standard)
    error = ratio.std(ddof=1) / np.sqrt(len(ratio)) if len(ratio) > 1 else NAN
    low, high = (float(np.exp(end)) for end in interval(ratio.mean(), error, len(ratio)))
    grain = _steps_between_evaluations(curves, protocol)
    saved = float((needed_by_standard - needed).mean())
    decided = "undecided" if abs(saved) <= grain else verdict(-high, -low, -1.0)
    return claim.replaced(
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


def _fewer_parameters(bakeoff: pd.DataFrame | None) -> Claim:
    claim = Claim(
        "fewer_parameters",
        f"LoRA in the most changed layers alone trains about a quarter of standard LoRA's parameters at equal rank "
        f"(at least {percent(SAVING)} fewer).",
        f"{percent(PAPER_SAVING)} fewer (3 of 12 layers).",
    )
    targeted, standard = _runs(bakeoff, "equal_rank", "targeted_layers"), _standard(bakeoff, "equal_rank")
    if targeted.empty or standard.empty:
        return claim
    few, many = (float(table["trainable_parameters"].mean()) for table in (targeted, standard))
    saving = 1 - few / many
    return claim.replaced(
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
    return next((found for found in runs if len(found)), pd.DataFrame())


def _steps_between_evaluations(curves: pd.DataFrame | None, protocol: str) -> float:
    """Return the largest distance between two evaluations of a targeted run; 0 where the curves are not at hand."""
    found = _runs(curves, protocol, "targeted_layers")
    found = found[found["validation_loss"].notna()] if len(found) else found
    if found.empty:
        return 0.0
    gaps = found.sort_values("step").groupby("seed")["step"].diff()
    return float(gaps.max()) if gaps.notna().any() else 0.0
