"""Selection: which layers and heads each rule chose, and how often resampled documents would choose the same."""

from __future__ import annotations

import re

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import head_heatmap, rule_heatmap
from mechscope.report.section import Panel, Section, Tables, number, table
from mechscope.report.shared import THIS_PAIR, main_rule
from mechscope.report.theme import name_of

SELECTION = table(
    "One row per rule and candidate (a layer or a head), best first.",
    rule="the rule, such as layers_by_kl; random_* and last_layers are controls",
    component="the candidate, such as layers:3 or a3.h5",
    kind="layer or head",
    layer="its layer",
    head="its head, −1 for a layer",
    rank="its rank by the rule, from 1",
    score=number(
        "what the rule ranks by: attention KL (nats), |entropy change| (nats), the change of what it writes (share), a combined score "
        "(share), depth, or chance"
    ),
    chosen="whether the rule chose it",
    frequency=number("resamples of the documents in which the rule chose it; none without resampling", "share"),
    n_resamples="resamples",
)


def _figures(tables: Tables) -> list[Figure]:
    selection, drawn = tables["selection"], list[Figure]()
    by_layer = selection[selection["kind"] == "layer"]
    if len(by_layer):
        caption = "How often each rule chose each layer when the documents were resampled. Outlined: chosen on all documents."
        drawn.append(rule_heatmap(by_layer, name="layer-selection", title="Stability of the selected layers", caption=caption))
    by_head = selection[selection["kind"] == "head"]
    for i, (rule, part) in enumerate(by_head.groupby("rule", sort=False)):
        own = part[part["chosen"]]
        drawn.append(
            head_heatmap(
                part,
                "frequency",
                name=f"head-selection-{i + 1}-{_slug(str(rule))}",
                title=f"Stability: {name_of(rule)}",
                legend="chosen in … of resamples",
                caption="How often the rule chose each head when the documents were resampled.",
                scale="share",
                selected=[(int(layer), int(head)) for layer, head in zip(own["layer"], own["head"], strict=True)],
                tooltip={"frequency": "chosen in (share)", "score": "score", "rank": "rank", "n_resamples": "resamples"},
            )
        )
    return drawn


def _slug(text: str) -> str:
    """Return `text` as a piece of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "rule"


def _panels(tables: Tables) -> list[Panel]:
    """List what each rule chose, and say which choice the figures outline."""
    selection = tables["selection"]
    main = {main_rule(selection, "layer"), main_rule(selection, "head")}
    rules = [
        {"name": name_of(rule), "components": ", ".join(map(str, own.sort_values("rank")["component"])), "outlined": rule in main}
        for rule, own in selection[selection["chosen"]].groupby("rule", sort=False)
    ]
    return [Panel("rules", {"rules": rules}, below=True)]


SECTION = Section(
    id="selection",
    heading="Selection and its stability",
    intro="What each rule chose, and how often it would choose the same on resampled documents: a choice that resampling does not repeat is chance.",
    tables={"selection": SELECTION},
    figures=_figures,
    panels=_panels,
    caveats=lambda tables: [THIS_PAIR],
    adds="mechscope study summarization --base BASE --tuned TUNED --data DATA --out NEW_RUN",
)
