"""Claims about circuits: did fine-tuning change the circuit of summarizing, and do a few tuned edges carry what it brought?

A public replication of the paper found edge overlaps of .285 between the base and the tuned circuit and .71 to .81 between two runs of one model, with
circuits 93.0 % (base) and 89.4 % (tuned) faithful; CircuitLoRA (arXiv 2502.11812) reports that nodes stay and edges change. An overlap is
read here beside what two circuits share when the two models' scores are exchanged at random within texts, and a share of the gain beside random edges.
A change can be shown, not excluded: two models of noisy scores share little though nothing changed.
"""

from __future__ import annotations

from mechscope.studies.paper_2505_17073.interventions import overturned, ranked, ranks, withheld
from mechscope.studies.paper_2505_17073.judgement import SIGNIFICANT, Judgement, Scope, Tables, percent

# size at which circuits are compared: a share of all edges
SIZE = 0.05


def circuit_changed(tables: Tables, scope: Scope) -> Judgement | None:
    """Compare what base and tuned circuits share with what they share once the models are exchanged within texts; None where it was not measured."""
    if "circuit_overlap" not in tables:
        return None
    overlap = tables["circuit_overlap"]
    shared = {row["what"]: row for row in overlap[overlap["fraction"] == SIZE].to_dict("records")}
    edges, nodes = shared["edges"], shared["nodes"]
    measured = (
        f"Of the {percent(SIZE)} strongest edges, base and tuned share {edges['jaccard']:.2f} (Jaccard; n = {edges['n']} texts); with the two models "
        f"exchanged at random within texts {edges['exchanged']:.2f} (95\u202f% of exchanges {edges['exchanged_low']:.2f} to {edges['exchanged_high']:.2f}), "
        f"which is {edges['change']:+.2f} (p = {edges['p']:.3f}); random circuits of the same layers {edges['null']:.2f}. Of the nodes {nodes['jaccard']:.2f}, "
        f"exchanged {nodes['exchanged']:.2f}, random {nodes['null']:.2f}."
    )
    return Judgement(
        "The circuits of these two models differ: base and tuned share fewer edges than they would if it did not matter which model a text's scores are "
        "of.",
        "Not tested in the paper; a replication found .285 against .71 to .81.",
        measured=measured,
        value=float(edges["change"]),
        verdict="supported" if edges["p"] <= SIGNIFICANT and edges["change"] > 0 else "undecided",
        note=f"About these two models, on these texts: another training may find another circuit. {_faithful(tables)}".strip(),
        unit="text",
        overturn="More texts; for a statement about fine-tuning, circuits of other trainings and of controls.",
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
        unit="set of edges",
    )
    tuned, random = rows.get("tuned"), rows.get("random")
    if tuned is None or random is None:
        return judgement.replaced(note="There are no random edges to compare with.")
    if tuned["withheld"]:
        return withheld(judgement, tuned["withheld"])
    return judgement.replaced(
        measured=f"{percent(tuned['share'])} ({percent(tuned['low'])} to {percent(tuned['high'])}) of the gain; random edges "
        f"{percent(random['share'])} (95\u202f% of sets {percent(random['low'])} to {percent(random['high'])}); {ranks(tuned)}.",
        value=tuned["share"] - random["share"],
        low=tuned["share"] - random["high"],
        high=tuned["share"] - random["low"],
        verdict=ranked(tuned),
        note="The range is that of the difference from random sets, on these texts.",
        overturn=overturned(int(tuned["random_sets"]), "more random circuits (random_circuits)"),
    )


def _faithful(tables: Tables) -> str:
    if "circuit_summary" not in tables:
        return ""
    summary = tables["circuit_summary"]
    rows = summary[summary["measure"] == "faithfulness"].dropna(subset=["value"]).to_dict("records")
    return "Faithfulness: " + ", ".join(f"{row['model']} {percent(row['value'])}" for row in rows) + "." if rows else ""
