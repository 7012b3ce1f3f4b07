"""A circuit of latents: which latents and errors do a task, what they tell each other, and how much of it they keep beside random latents."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.node_graph import node_graph
from mechscope.report.marks.series import Series, curves, long
from mechscope.report.marks.tables import Cell, Shown, Table, strongest
from mechscope.report.section import Section, Tables, number, optional, table
from mechscope.report.shared import counted_in, estimated, few_texts, withheld_shares
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, label, percent
from mechscope.report.theme import number as written

# nodes of a place, and edges, that a picture can hold
_DRAWN, _EDGES_DRAWN = 12, 150
# share of a place's effect from which the sum of estimates is called wrong
_MISSED = 0.1
_IN = ("in_circuit", "==", True)
_OF = "of the metric"
_SURE = ("se", "low", "high", "p", "q")

TABLES = {
    "feature_nodes": table(
        "One row per latent or error, those with the largest effects.",
        component="the latent (resid6.f1024) or the error (resid6.error)",
        place="where it stands",
        latent="which latent, −1 for the error",
        metric="the metric",
        n="texts",
        effect=number("change of the metric if it took the other value, estimated; mean over texts", _OF, *_SURE, bare=True),
        in_circuit="whether it belongs to the circuit",
        exact=optional("the same by exact patching, where it was checked", _OF),
    ),
    "feature_places": table(
        "One row per place of a dictionary.",
        place="the place",
        active="latents that are active on any of the texts",
        metric="the metric",
        n="texts",
        whole=number("change of the metric when all of its nodes take the other value, measured", _OF, "low", "high"),
        latents=number("sum of the estimated effects of its latents", _OF, "low", "high"),
        error=number("estimated effect of its error", _OF, "low", "high"),
        missed=number("what the estimates miss of the whole", _OF, "low", "high"),
    ),
    "feature_edges": table(
        "One row per edge between nodes of the circuit, those with the largest effects.",
        edge="the edge, sender->receiver",
        sender="the latent or error that acts",
        receiver="the one through which it acts; logits for the metric itself",
        metric="the metric",
        n="texts",
        effect=number("change of the metric through that edge, nodes between held; mean over texts", _OF, *_SURE, bare=True),
        in_circuit="whether it is as large as the threshold",
    ),
    "feature_faithfulness": table(
        "One row per size of the circuit and treatment of errors, on texts from which it was not found.",
        nodes="nodes of the circuit; −1 for all latents and errors",
        latents="latents among them",
        errors="what becomes of the errors: kept (in the circuit and in its complement), removed, or in circuit (as nodes)",
        metric="the metric",
        n="texts",
        value=number("mean metric of the circuit", _OF),
        faithfulness=number("(circuit − no nodes) / (model − no nodes) of the mean metric", "share", "low", "high"),
        complement=number("the same of the model without the circuit", "share", "low", "high"),
        random=number("faithfulness of random latents, as many at each place, mean of several draws", "share", "low", "high"),
        random_complement=number("the same of the model without these", "share", "low", "high"),
        withheld="why shares are not given; empty where they are",
        filling="what stands in the place of what is left out: corrupt, zero or mean",
        held_out="whether the texts are others than those the circuit was found on",
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    return [*_graph(tables), *_faithfulness(tables.get("feature_faithfulness"))]


def _graph(tables: Tables) -> list[Figure]:
    nodes = tables.get("feature_nodes")
    if nodes is None or not (chosen := nodes[nodes["in_circuit"].astype(bool)]).size:
        return []
    places = list(dict.fromkeys(tables["feature_places"]["place"])) if "feature_places" in tables else sorted(set(chosen["place"]))
    drawn = chosen.assign(size=chosen["effect"].abs()).sort_values("size", ascending=False, kind="stable").groupby("place").head(_DRAWN)
    ends = pd.DataFrame({"node": ["logits"], "row": ["logits"], "effect": [0.0]})
    shown = pd.concat([drawn.rename(columns={"component": "node", "place": "row"})[["node", "row", "effect"]], ends], ignore_index=True)
    edges = tables.get("feature_edges", pd.DataFrame({"sender": [], "receiver": [], "effect": [], "in_circuit": []}))
    edges = strongest(edges[edges["in_circuit"].astype(bool)], "effect", _EDGES_DRAWN)
    rows = [*(place for place in places if place in set(drawn["place"])), "logits"]
    left = len(chosen) - len(drawn)
    caption = (
        "Nodes by place, the first at the bottom. Areas and widths grow with the size of effects; blue: it lowers the metric if it takes the other value, so "
        f"it holds it up; orange: it raises it.{f' Not drawn: {written(left)} of the smallest.' if left else ''}"
    )
    metric = str(chosen["metric"].iloc[0])
    return [
        node_graph(
            shown,
            edges[["sender", "receiver", "effect"]],
            rows=rows,
            name="feature-circuit",
            title="The circuit of latents",
            caption=counted_in(caption, chosen),
            axis=f"change of {metric}",
        )
    ]


def _faithfulness(curve: pd.DataFrame | None) -> list[Figure]:
    if curve is None:
        return []
    sized = curve[curve["nodes"] > 0]
    parts = [
        long(
            own,
            [Series(f"errors {errors}", "faithfulness", "faithfulness_"), Series(f"errors {errors}", "random", None, chance=True)],
            ("nodes",),
        )
        for errors, own in sized.groupby("errors", sort=False)
    ]
    if not parts:
        return []
    return curves(
        pd.concat(parts, ignore_index=True),
        name="feature-faithfulness",
        title="Faithfulness by number of nodes",
        x=("nodes", "latents and errors in the circuit"),
        axis="faithfulness (1: as the whole model)",
        caption=counted_in(
            "How much of the model's behaviour the first so many nodes keep when all others take the other value. Bands: 95\u202f% over texts. Dashed: random "
            "latents, as many at each place.",
            sized,
        ),
        kinds=("circuit", "random latents"),
        wide=True,
    )


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "feature_faithfulness" in tables:
        curve = tables["feature_faithfulness"]
        # a share of less than a ten-thousandth is none
        view = Table(curve.round(4)).cells("nodes", "nodes", _size).words("errors", "errors")
        for column, heading in (
            ("faithfulness", "faithfulness"),
            ("random", "random latents"),
            ("complement", "without the circuit"),
            ("random_complement", "without random latents"),
        ):
            view = view.shares(column, heading, ends=(f"{column}_low", f"{column}_high"))
        shown.append(
            Shown("What circuits keep, and what is left without them", view.numbers("n", "texts").view(), table="feature_faithfulness")
        )
    if "feature_nodes" in tables:
        nodes = tables["feature_nodes"]
        view = Table(strongest(nodes, "effect", 40)).words("component", "node", strong=lambda row: bool(row["in_circuit"]))
        view = view.numbers("effect", "effect", ends=("low", "high"), sign=True).numbers("exact", "by exact patching", sign=True)
        shown.append(
            Shown(
                "Nodes with the largest effects", view.numbers("q", "q").numbers("n", "texts").view(), table="feature_nodes", terminal=True
            )
        )
    if "feature_edges" in tables:
        view = Table(strongest(tables["feature_edges"], "effect", 40)).words("edge", "edge", strong=lambda row: bool(row["in_circuit"]))
        view = view.numbers("effect", "effect", ends=("low", "high"), sign=True).numbers("q", "q").numbers("n", "texts")
        shown.append(Shown("Edges with the largest effects", view.view(), table="feature_edges", folded=True))
    if "feature_places" in tables:
        view = Table(tables["feature_places"]).words("place", "place").numbers("active", "active latents")
        for column, heading in (
            ("whole", "all nodes, measured"),
            ("latents", "latents, estimated"),
            ("error", "error, estimated"),
            ("missed", "missed"),
        ):
            view = view.numbers(column, heading, ends=(f"{column}_low", f"{column}_high"), sign=True)
        words = "Replacing all nodes of a place, measured, beside the sum of what its nodes are estimated to do."
        shown.append(Shown("Places", view.numbers("n", "texts").view(), words, table="feature_places"))
    return shown


def _size(row: Any) -> Cell:
    return Cell("all there are", sort=float("inf")) if row["nodes"] < 0 else Cell(written(int(row["nodes"])), sort=float(row["nodes"]))


def _findings(tables: Tables) -> list[Finding]:
    found = []
    if "feature_faithfulness" in tables:
        found += _kept(tables["feature_faithfulness"])
    if "feature_nodes" in tables:
        found += _largest(tables)
    return found


def _kept(curve: pd.DataFrame) -> list[Finding]:
    """Say how much the whole circuit keeps with the errors kept, in the circuit and removed, and what random latents keep."""
    sized = curve[curve["nodes"] > 0]
    if sized.empty:
        return [
            Finding(
                "How much of what the model does a circuit of latents keeps",
                withheld="no latent or error has an effect as large as the threshold",
            )
        ]
    whole = sized[sized["nodes"] == sized["nodes"].max()]
    rows = {str(row["errors"]): row for _, row in whole.iterrows()}
    kept, own, removed = (rows[name] for name in ("kept", "in circuit", "removed"))
    bare = curve[(curve["nodes"] == 0) & (curve["errors"] == "kept")].iloc[0]
    if own["withheld"]:
        said = f"How much of what the model does its circuit of {written(int(own['nodes']))} nodes keeps"
        return [Finding(said, n=own["n"], rows=(own,), withheld=str(own["withheld"]), table="feature_faithfulness")]

    def share(row: pd.Series, column: str = "faithfulness") -> str:
        return estimated(row, column, share=True)

    beside = f"; random latents, as many at each place, {share(own, 'random')}" if pd.notna(own["random"]) else ""
    text = (
        f"The first {written(int(own['nodes']))} nodes, {written(int(own['latents']))} of them latents, keep {share(own)} of what the model does "
        f"(faithfulness) with the errors that are among them{beside}. With all errors kept it is {share(kept)}, of which errors alone keep {share(bare)}; "
        f"with all errors removed {share(removed)}. Without the circuit {share(own, 'complement')} is left"
    )
    return [
        Finding(
            text,
            n=own["n"],
            rows=(own, kept, removed, bare),
            effect=abs(float(own["faithfulness"])),
            card=Card(
                written(own["faithfulness"]),
                "faithfulness of the circuit of latents",
                interval(own["faithfulness_low"], own["faithfulness_high"]),
            ),
            table="feature_faithfulness",
        )
    ]


def _largest(tables: Tables) -> list[Finding]:
    nodes = tables["feature_nodes"]
    if nodes.empty:
        said = "Which latent or error has the largest estimated effect"
        return [Finding(said, withheld="no latent or error has any effect on the metric", table="feature_nodes")]
    chosen, top = nodes[nodes["in_circuit"].astype(bool)], strongest(nodes, "effect", 1).iloc[0]
    count = Derived("feature_nodes", (_IN,))
    text = (
        f"{label(top['component'])} has the largest estimated effect on {top['metric']}: {written(top['effect'], sign=True)} "
        f"{interval(top['low'], top['high'], sign=True)} if it took the other value; {count.written(tables)} nodes belong to the circuit"
    )
    checked = chosen[chosen["exact"].notna()] if "exact" in chosen else chosen.head(0)
    rows: tuple[pd.Series, ...] = (top,)
    if len(checked) and pd.notna(top.get("exact")):
        text += f"; exact patching gives {written(top['exact'], sign=True)}"
    return [Finding(text, n=top["n"], rows=rows, derived=(count,), table="feature_nodes")]


def _caveats(tables: Tables) -> list[Caveat]:
    found = []
    curve, places = tables.get("feature_faithfulness"), tables.get("feature_places")
    if curve is not None:
        found += withheld_shares(tables, "feature_faithfulness")
        if not curve["held_out"].astype(bool).all():
            found.append(
                Caveat("The circuit is judged on the very text that it was found on: others may not be done by it.", "feature_faithfulness")
            )
        worst = curve[(curve["nodes"] == -1) & (curve["errors"] == "removed")].iloc[0]
        if pd.notna(worst["faithfulness"]):
            found.append(
                Caveat(
                    f"All latents without the errors keep {percent(worst['faithfulness'])} of what the model does: the errors, which no one can read, carry "
                    "the rest.",
                    "feature_faithfulness",
                )
            )
    if places is not None:
        whole = places["whole"].abs().to_numpy(float)
        shares = places["missed"].abs().to_numpy(float)[whole > 0] / whole[whole > 0]
        if len(shares) and shares.max() > _MISSED:
            found.append(
                Caveat(
                    f"At one place the estimated effects miss {percent(shares.max())} of what replacing the place does: give more points of integrated "
                    "gradients.",
                    "feature_places",
                )
            )
    return [*found, *few_texts(tables, "feature_nodes")]


SECTION = Section(
    id="feature-circuit",
    heading="A circuit of latents",
    intro=(
        "What the model holds at each place is written as latents of a dictionary and an error. A node's effect is the change of the metric if it took its "
        "value on the corrupt text, or zero, estimated from gradients; an edge's is the part of it that goes through another node, with the nodes between held "
        "(Marks et al. 2024). Circuits of the first so many nodes are then run for themselves: all other nodes take the other value. Beside them stand random "
        "latents, as many at each place, from outside the circuit as far as enough others are active there."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
