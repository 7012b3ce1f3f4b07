"""Claims about circuits: did fine-tuning change the circuit of summarizing, and do a few tuned edges carry what it brought?

A public replication of the paper found edge overlaps of .285 between the base and the tuned circuit and .71 to .81 between two runs of one model, with
circuits 93.0 % (base) and 89.4 % (tuned) faithful; CircuitLoRA (arXiv 2502.11812) reports that nodes stay and edges change. An overlap is
read here beside what two circuits of one model share, and a share of the gain beside random edges. Halvings of the texts share texts, so how a
difference spreads over them is no confidence interval; and since the noisier of the two models sets what is expected, a change can be shown here but
not excluded.
"""

from __future__ import annotations

import pandas as pd

from mechscope.studies.paper_2505_17073.judgement import Judgement, Scope, Tables, Verdict, percent, verdict

# size at which circuits are compared: a share of all edges
SIZE = 0.05


def circuit_changed(tables: Tables, scope: Scope) -> Judgement | None:
    """Compare what base and tuned circuits share with what two circuits of one model share; None where they were not compared."""
    if "circuit_overlap" not in tables:
        return None
    overlap = tables["circuit_overlap"]
    shared = {row["what"]: row for row in overlap[overlap["fraction"] == SIZE].to_dict("records")}
    edges, nodes = shared["edges"], shared["nodes"]
    measured = (
        f"Of the {percent(SIZE)} strongest edges, base and tuned share {edges['jaccard']:.2f} (Jaccard; random circuits {edges['null']:.2f}), of the "
        f"nodes {nodes['jaccard']:.2f} ({nodes['null']:.2f}). Found on different texts, edges: base with tuned {edges['across']:.2f}, base with itself "
        f"{edges['self_base']:.2f}, tuned with itself {edges['self_tuned']:.2f}."
    )
    low, high = float(edges["change_low"]), float(edges["change_high"])
    measured += (
        f" The smaller of these two exceeds base with tuned by {edges['change']:.2f}; in 95 % of halvings by {low:.2f} to {high:.2f}."
    )
    spread = "The range is over halvings of the texts: it shows their spread and is not a confidence interval."
    return Judgement(
        "Fine-tuning changed the circuit: base and tuned share fewer edges than two circuits of the noisier of the two models do.",
        "Not tested in the paper; a replication found .285 against .71 to .81.",
        measured=measured,
        value=float(edges["change"]),
        verdict="supported" if low > 0 else "undecided",
        note=f"{spread} {_faithful(tables)}".strip(),
    )


def few_edges_carry_gain(tables: Tables, scope: Scope) -> Judgement | None:
    """Compare what a few tuned edges bring to the base model with what random edges bring; None where it was not measured."""
    if "circuit_gain" not in tables:
        return None
    gain = tables["circuit_gain"]
    rows = {row["kind"]: row for row in gain[gain["fraction"] == SIZE].to_dict("records")}
    judgement = Judgement(
        f"A few edges carry what fine-tuning brought: {percent(SIZE)} of the tuned model's edges, put into the base model, bring more of the gain than "
        "random edges of the same layers.",
        "Not tested in the paper.",
    )
    tuned, random = rows.get("tuned"), rows.get("random")
    if tuned is None or random is None or pd.isna(tuned["share"]):
        return judgement.replaced(note="Fine-tuning changed the metric too little to take a share of, or there is nothing to compare with.")
    more, low, high = (tuned[end] - random[other] for end, other in (("share", "share"), ("low", "high"), ("high", "low")))
    decided: Verdict = verdict(low, high, 0.0)
    return judgement.replaced(
        measured=f"{percent(tuned['share'])} ({percent(tuned['low'])} to {percent(tuned['high'])}) of the gain; random edges "
        f"{percent(random['share'])} (95 % of sets {percent(random['low'])} to {percent(random['high'])}).",
        value=more,
        low=low,
        high=high,
        verdict=decided,
        note="The interval runs from the low end of the one to the high end of the other, which is wider than that of the difference.",
    )


def _faithful(tables: Tables) -> str:
    if "circuit_summary" not in tables:
        return ""
    summary = tables["circuit_summary"]
    rows = summary[summary["measure"] == "faithfulness"].dropna(subset=["value"]).to_dict("records")
    return "Faithfulness: " + ", ".join(f"{row['model']} {percent(row['value'])}" for row in rows) + "." if rows else ""
