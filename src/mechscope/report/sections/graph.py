"""Attribution graph: which latents, errors and tokens lead to the likeliest next tokens of a prompt, and whether the model does what the graph says."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mechscope.report.latents import EXAMPLES, PROMOTES, SUPPRESSES
from mechscope.report.marks.agreement import agreement_chart
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.graph_picture import graph_picture
from mechscope.report.marks.tables import Cell, Row, Shown, Table
from mechscope.report.section import Panel, Section, Tables, number, table
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import interval, label, percent
from mechscope.report.theme import number as written

_CHOSEN = {"influence": "of most influence", "random": "at random, outside the pruned graph", "group": "the groups"}
_ALL, _DIRECT = "rank correlation, all paths", "rank correlation, direct"
_MEASURED, _PREDICTED = "likeliest logit, measured", "likeliest logit, predicted"
_NODE = "m3.f1024@5 (a latent of m3 at token 5), m3.error@5, embed@5, or logits.t262@5 (a next token by its id)"
_SHOWN = 40

TABLES = {
    "graph_scores": table(
        "The graph and, below it, its control.",
        control="empty for the graph itself; shuffled decoders: the same latents, each of which writes what another one should",
        prompt="the prompt",
        replacement=number("influence of tokens, of that of tokens and errors", "share"),
        completeness=number("inputs that are no errors, averaged over nodes by influence", "share"),
        tokens=number("tokens of the prompt"),
        latents=number("latents with edges into them"),
        active=number("active latents of the prompt"),
        kept_latents=number("latents in the pruned graph"),
        kept_errors=number("errors in the pruned graph"),
        kept_edges=number("edges of the pruned graph"),
        without="MLPs without a dictionary, joined by commas: all that they write is error",
    ),
    "graph_logits": table(
        "One row per likely next token: what its logit, less the mean over the vocabulary, is made of; before a soft cap.",
        node=_NODE,
        token="the token",
        probability=number("its probability", "share"),
        value=number("its logit less the mean: the sum of what follows", "logits"),
        of_latents=number("what latents add to it directly", "logits"),
        of_errors=number("what errors add", "logits"),
        of_tokens=number("what the embedding adds", "logits"),
        of_constants=number("what biases, shifts of norms and the MLPs of the first tokens add", "logits"),
        of_others=number("what active latents without edges into them add", "logits"),
    ),
    "graph_nodes": table(
        "One row per node.",
        node=_NODE,
        kind="latent, error, token or logit",
        component="the part of the model: m3.f1024, m3, embed, logits",
        layer="the block whose MLP it reads or stands for; −1 for tokens, the number of blocks for logits",
        position="the token's place in the prompt, from 0",
        token="the token there; of a logit the next token",
        value=number("of a latent its value, of a logit the logit less the mean; empty for others"),
        probability=number("of a logit its probability; empty for others", "share"),
        bias=number("what constants add to it", "of the value"),
        rest=number("what active latents without edges into them add to it", "of the value"),
        influence=number("of the logits' inputs, the share that can be followed back to it, by |edges|", "share"),
        cumulative=number("share of all influence that nodes of its influence and more have", "share"),
        kept="whether it is in the pruned graph",
    ),
    "graph_edges": table(
        "One row per edge of the pruned graph, those of most influence first; all edges are in tensors/graph.safetensors.",
        source=_NODE,
        target=_NODE,
        weight=number("what the source adds to the target's value", "of the target's value"),
        share=number("its |weight|, of all the target's edges", "share"),
        influence=number("influence that goes through it", "share"),
    ),
    "graph_latents": table(
        "One row per latent of the pruned graph.",
        component="the latent: m3.f1024",
        dictionary="its dictionary",
        promotes=PROMOTES,
        suppresses=SUPPRESSES,
    ),
    "graph_examples": table(
        "One row per latent of the pruned graph and text in which it is active most.",
        component="the latent: m3.f1024",
        **EXAMPLES,
    ),
    "graph_interventions": table(
        "One row per intervention and node of the pruned graph that it reaches.",
        change="the latent, or the group, that was changed in the model",
        chosen="influence (of most influence), random (at random, outside the pruned graph) or group",
        latents=number("how many latents were changed"),
        factor=number("what they write was multiplied by this: 0 ablates"),
        target=_NODE,
        kind="latent or logit",
        value=number("its value in the prompt"),
        direct=number("its change as the edges predict", "of the value"),
        total=number("its change as all paths through latents predict", "of the value"),
        measured=number("its change in the model", "of the value"),
    ),
    "graph_agreement": table(
        "One row per choice of interventions and measure: means over interventions of one prompt.",
        chosen="influence (of most influence), random (at random, outside the pruned graph) or group",
        measure="what was measured: Spearman's correlation of predicted and measured changes over an intervention's targets, or the |change| of the "
        "likeliest logit",
        changes=number("interventions that were made"),
        n="interventions with such a value",
        value=number("its mean", "correlation or logits, by the measure", "low", "high", bare=True),
        withheld="why there is no interval; empty where there is",
    ),
    "graph_groups": table(
        "One row per group and node.",
        group="the group's name",
        node=_NODE,
    ),
}


def _panels(tables: Tables) -> list[Panel]:
    picture = graph_picture(tables)
    if picture is None:
        return []
    return [
        Panel(
            "attribution_graph",
            {"name": picture.name, "picture": picture},
            picture.data(),
            drawings=(picture,),
            scripts=("reading.js",),
        )
    ]


def _figures(tables: Tables) -> list[Figure]:
    table = tables.get("graph_interventions")
    if table is None:
        return []
    own = table[table["kind"] == "logit"].drop_duplicates(["chosen", "change"])
    if own.empty:
        return []
    drawn = pd.DataFrame(
        {
            "predicted": own["total"],
            "measured": own["measured"],
            "series": own["chosen"].map(_CHOSEN),
            "label": own["change"],
        }
    )
    return [
        agreement_chart(
            drawn,
            name="graph-interventions",
            title="Changes of latents in the model, beside the graph's prediction",
            caption="Each point is a latent, or a group, that was changed: what happens to the likeliest logit, less the mean, as all paths predict and as "
            f"measured; on the line both are equal. n = {len(own)} interventions of one prompt.",
            unit="logits",
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "graph_logits" in tables:
        view = Table(tables["graph_logits"]).tokens("token", "next token").cells("probability", "probability", _probability)
        view = view.numbers("value", "logit − mean")
        for part in ("latents", "errors", "tokens", "constants", "others"):
            view = view.numbers(f"of_{part}", "other latents" if part == "others" else part, sign=True)
        words = "What is added to each logit directly; what latents add they have from others, which the graph follows."
        shown.append(Shown("What the likeliest next tokens are made of", view.view(), words, terminal=True, table="graph_logits"))
    if "graph_scores" in tables:
        view = Table(tables["graph_scores"]).cells("control", "which is", lambda row: Cell(str(row["control"]) or "the graph itself"))
        view = view.numbers("replacement", "replacement").numbers("completeness", "completeness").numbers("active", "active latents")
        view = view.numbers("latents", "with edges into them").numbers("kept_latents", "latents kept").numbers("kept_errors", "errors kept")
        shown.append(Shown("How much latents explain", view.numbers("kept_edges", "edges kept").view(), table="graph_scores"))
    if "graph_agreement" in tables:
        view = Table(tables["graph_agreement"]).mapped("chosen", "latents", lambda chosen: _CHOSEN[str(chosen)]).words("measure", "measure")
        view = view.numbers("value", "mean", ends=("low", "high")).numbers("n", "interventions").texts("withheld", "withheld")
        shown.append(Shown("Interventions beside what the graph predicts", view.view(), table="graph_agreement"))
    if "graph_interventions" in tables:
        shown.append(_logit_changes(tables["graph_interventions"]))
    nodes = tables.get("graph_nodes")
    if nodes is not None:
        kept = nodes[nodes["kept"].astype(bool) & (nodes["kind"] != "logit")].nlargest(_SHOWN, "influence", keep="first")
        if "graph_latents" in tables:
            kept = kept.merge(tables["graph_latents"][["component", "promotes"]], on="component", how="left")
            # of errors and tokens there is nothing to read
            kept["promotes"] = kept["promotes"].map(lambda tokens: [] if isinstance(tokens, float) else tokens)
        view = Table(kept).words("node", "node").tokens("token", "token").numbers("value", "value").numbers("influence", "influence")
        shown.append(
            Shown("Nodes of most influence", view.token_lists("promotes", "promotes", most=5).view(), folded=True, table="graph_nodes")
        )
    return shown


def _probability(row: Row) -> Cell:
    return Cell(percent(row["probability"]), sort=float(row["probability"]))


def _logit_changes(table: pd.DataFrame) -> Shown:
    """Return what interventions do to the logits."""
    own = table[table["kind"] == "logit"].drop_duplicates(["chosen", "change"])
    own = own[own["chosen"] != "random"].assign(size=own["measured"].abs()).nlargest(_SHOWN, "size", keep="first")
    view = Table(own).words("change", "changed").numbers("latents", "latents").numbers("factor", "factor")
    view = (
        view.numbers("direct", "directly", sign=True).numbers("total", "by all paths", sign=True).numbers("measured", "measured", sign=True)
    )
    return Shown("What changes do to the likeliest logit", view.view(), folded=True, table="graph_interventions")


def _findings(tables: Tables) -> list[Finding]:
    return [*_of_scores(tables), *_of_interventions(tables)]


def _of_scores(tables: Tables) -> list[Finding]:
    scores, logits = tables.get("graph_scores"), tables.get("graph_logits")
    if scores is None or logits is None:
        return []
    row, first = scores.iloc[0], logits.iloc[0]
    controls, others = scores[scores["control"] != ""], len(logits) - 1
    beside = (
        ""
        if controls.empty
        else f"; with shuffled decoders {percent(controls.iloc[0]['replacement'])} and {percent(controls.iloc[0]['completeness'])}"
    )
    return [
        Finding(
            f"The graph follows {percent(row['replacement'])} of the influence on the likeliest next token (probability {percent(first['probability'])})"
            f"{f' and {written(others)} others' if others else ''} back to tokens and not to errors (replacement), and {percent(row['completeness'])} of its "
            f"nodes' inputs are no errors (completeness){beside}",
            n=1,
            unit="prompts",
            rows=(row, first, *([controls.iloc[0]] if len(controls) else [])),
            derived=(Derived("graph_logits", (("node", "!=", first["node"]),)),) if others else (),
            effect=float(row["replacement"]),
            card=Card(percent(row["replacement"]), "replacement score", f"completeness {percent(row['completeness'])}"),
            table="graph_scores",
        )
    ]


def _of_interventions(tables: Tables) -> list[Finding]:
    agreement = tables.get("graph_agreement")
    found = _of_groups(tables)
    if agreement is None:
        return found
    for chosen in [each for each in agreement["chosen"].unique() if each != "group"]:
        rows = {str(row["measure"]): row for _, row in agreement[agreement["chosen"] == chosen].iterrows()}
        row, logit, predicted = rows[_ALL], rows[_MEASURED], rows[_PREDICTED]
        who = "the latents of most influence" if chosen == "influence" else "latents at random outside the pruned graph"
        if row["withheld"]:
            said = f"how well the graph predicts what changes of {who} do"
            known = {"n": row["n"], "unit": "interventions", "rows": (row,), "table": "graph_agreement"}
            found.append(Finding(said, **known, withheld=str(row["withheld"]), folded=True))
            continue
        found.append(
            Finding(
                f"Changes of {who} in the model move the graph's nodes as all paths predict with a rank correlation of {_mean(row)}; over "
                f"{written(int(logit['n']))} the likeliest logit moves by {_mean(logit)} where {_mean(predicted)} is predicted",
                n=row["n"],
                unit="interventions",
                rows=(row, logit, predicted),
                effect=float(row["value"]) if chosen == "influence" else 0.0,
                table="graph_agreement",
            )
        )
    return found


def _of_groups(tables: Tables) -> list[Finding]:
    """Say of every group what changing it does to the likeliest logit."""
    table = tables.get("graph_interventions")
    if table is None:
        return []
    own = table[(table["chosen"] == "group") & (table["kind"] == "logit")].drop_duplicates("change")
    return [
        Finding(
            f"Group “{label(row['change'])}” ({written(int(row['latents']))} latents), what it writes times {written(row['factor'])}, moves the likeliest "
            f"logit by {written(row['measured'], sign=True)}; predicted is {written(row['total'], sign=True)} by all paths, "
            f"{written(row['direct'], sign=True)} directly",
            n=1,
            unit="interventions",
            rows=(row,),
            effect=abs(float(row["measured"])),
            table="graph_interventions",
        )
        for _, row in own.iterrows()
    ]


def _mean(row: Any) -> str:
    return f"{written(row['value'])} {interval(row['low'], row['high'])}".strip()


def _caveats(tables: Tables) -> list[Caveat]:
    found = [
        Caveat(
            "Attention patterns and the scales of norms are held as they were in the prompt: why a head looks where it looks is not explained."
        ),
        Caveat("It is the graph of one prompt; interventions on its latents are no sample of prompts.", weakens="graph_agreement"),
    ]
    scores = tables.get("graph_scores")
    if scores is not None:
        row = scores.iloc[0]
        if row["without"]:
            found.append(Caveat(f"Without a dictionary are {row['without']}: all that they write counts as error.", weakens="graph_scores"))
        if row["latents"] < row["active"]:
            found.append(
                Caveat(
                    f"Edges into latents are known of {written(int(row['latents']))} of {written(int(row['active']))} active ones, those that matter most; "
                    "what the others add is kept as one number of each target.",
                    weakens="graph_scores",
                )
            )
    if "graph_latents" in tables:
        found.append(
            Caveat("What a latent promotes is read off what it writes, which the layers behind may change.", weakens="graph_latents")
        )
    return found


SECTION = Section(
    id="graph",
    heading="Attribution graph",
    intro=(
        "The MLPs are replaced by transcoders' active latents plus an error that makes each of them exact, and with attention patterns and the scales of norms "
        "held, what each latent reads is a sum of what was written before it: an edge is what one node adds to another (Ameisen et al. 2025, “Circuit "
        "Tracing”). Kept are the nodes and edges through which most of the likeliest next tokens' influence goes. Latents are then changed in the "
        "model itself, where nothing is held, and what happens stands beside what the graph predicts."
    ),
    tables=TABLES,
    panels=_panels,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    unit="interventions",
)
