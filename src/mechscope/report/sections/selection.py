"""Selection: which layers and heads each rule chose, and how often resampled documents would choose the same."""

from __future__ import annotations

import re

import pandas as pd

from mechscope.report.beside import Beside
from mechscope.report.marks.control_maps import RESAMPLES, head_maps_beside, rule_maps_beside
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import head_heatmap, rule_heatmap
from mechscope.report.section import Column, Panel, Section, Tables, number, table
from mechscope.report.shared import THIS_PAIR, main_rule
from mechscope.report.theme import name_of
from mechscope.report.theme import number as written

_RANKED: dict[str, Column | str] = {
    "rule": "the rule, such as layers_by_kl; random_* and last_layers are controls",
    "component": "the candidate, such as layers:3 or a3.h5",
    "kind": "layer or head",
    "layer": "its layer",
    "head": "its head, −1 for a layer",
    "rank": "its rank by the rule, from 1",
    "score": number(
        "what the rule ranks by: attention KL (nats), |entropy change| (nats), the change of what it writes (share), a combined score "
        "(share), depth, or chance"
    ),
    "chosen": "whether the rule chose it",
}
SELECTION = table(
    "One row per rule and candidate (a layer or a head), best first.",
    **_RANKED,
    frequency=number("resamples of the documents in which the rule chose it; none without resampling", "share"),
    n_resamples="resamples",
)


CONTROL_SELECTION = table(
    "One row per model, rule and candidate: what the rule would choose if this model were the tuned one.",
    **_RANKED,
    control="the model: tuned, a control's name, or a draw of noise",
    control_kind="what it is: tuned, seed, shuffled, other, noise",
    seed="seed of its training, or number of the draw; none where it is not known",
)


def _figures(tables: Tables) -> list[Figure]:
    if "selection" not in tables:
        return []
    selection, drawn = tables["selection"], list[Figure]()
    beside = Beside.read(tables, "selection", ("rule", "component", "kind", "layer", "head"))
    # in how many of its controls a rule chooses the same
    shares = beside.means(["chosen", "score"]).rename(columns={"chosen": "frequency"})
    over = f" n = {written(int(selection['n_resamples'].max()))} resamples{_documents(tables)}."
    over += beside.caption("share in which the rule would choose it")
    by_layer = selection[selection["kind"] == "layer"]
    if len(by_layer):
        words = "How often each rule chose each layer when the documents were resampled. Outlined: chosen on all documents."
        named = {"name": "layer-selection", "title": "Stability of the selected layers", "caption": words + over}
        own = shares[shares["kind"] == "layer"]
        drawn.append(rule_heatmap(by_layer, **named) if own.empty else rule_maps_beside(by_layer, own, **named))
    by_head = selection[selection["kind"] == "head"]
    for i, (rule, part) in enumerate(by_head.groupby("rule", sort=False)):
        chosen = part[part["chosen"]]
        drawn.append(
            _of_heads(
                part,
                shares[shares["rule"] == rule],
                name=f"head-selection-{i + 1}-{_slug(str(rule))}",
                title=f"Stability: {name_of(rule)}",
                caption=f"How often the rule chose each head when the documents were resampled.{over}",
                selected=[(int(layer), int(head)) for layer, head in zip(chosen["layer"], chosen["head"], strict=True)],
            )
        )
    return drawn


def _of_heads(part: pd.DataFrame, shares: pd.DataFrame, *, name: str, title: str, caption: str, selected: list[tuple[int, int]]) -> Figure:
    tooltip = {"frequency": "chosen in (share)", "score": "score"}
    if shares.empty:
        told = {**tooltip, "rank": "rank", "n_resamples": "resamples"}
        return head_heatmap(
            part, "frequency", name=name, title=title, legend="chosen in … of resamples", caption=caption, scale="share", selected=selected,
            tooltip=told,
        )  # fmt: skip
    return head_maps_beside(
        part, shares, "frequency", name=name, title=title, legend="chosen in … of resamples, of controls", caption=caption, scale="share",
        selected=selected, tooltip=tooltip, headings=(RESAMPLES, "share of"),
    )  # fmt: skip


def _documents(tables: Tables) -> str:
    """Return ` of 80 documents`, where the run says how many were resampled."""
    return f" of {written(int(tables['heads']['n'].max()))} documents" if "heads" in tables else ""


def _slug(text: str) -> str:
    """Return `text` as a piece of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "rule"


def _panels(tables: Tables) -> list[Panel]:
    """List what each rule chose, and say which choice the figures outline."""
    if "selection" not in tables:
        return []
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
    unit="documents",
    tables={"selection": SELECTION, "control_selection": CONTROL_SELECTION},
    figures=_figures,
    panels=_panels,
    caveats=lambda tables: [THIS_PAIR],
    adds="mechscope study summarization --base BASE --tuned TUNED --data DATA --out NEW_RUN",
)
