"""Controls: the tuned model beside other trainings of the same base and beside noise as large as what fine-tuning changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from mechscope.report.marks.controls import KIND_NAMES, head_scatter, layer_ticks, ranges
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.tables import Cell, Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import of_rows
from mechscope.report.theme import model_name, percent
from mechscope.report.theme import number as written

_MODEL = {
    "control": "the model: tuned, a control's name, or a draw of noise",
    "kind": "tuned; seed: the same training with another seed; shuffled: trained on shuffled summaries; other: any other training; noise",
}
CONTROLS = table(
    "One row per model that is compared with the base: the tuned one first.",
    **_MODEL,
    seed="seed of its training, or number of the draw; none where it is not known",
    source="where it came from",
    n="documents: the first of those measured",
    loss_change=number("change of the loss on summary tokens from the base", "nats per token", "low", "high"),
    weight_change=number("norm of the change of all weights, over their norm"),
)
HEADS = table(
    "One row per model, kind of query rows, layer and head; means over the same documents for all models.",
    rows="query rows that were averaged: all, document, summary",
    layer="layer",
    head="head",
    component="the head, such as a3.h5",
    n="documents",
    kl_base_tuned=number("KL of the model's attention rows from the base's", "nats", "se"),
    entropy_change=number("change of attention entropy from the base", "nats", "se"),
    **_MODEL,
)
LAYERS = table(
    "One row per model, kind of query rows and layer; means over the same documents for all models.",
    rows="query rows that were averaged: all, document, summary",
    layer="layer",
    n="documents",
    kl_base_tuned=number("KL of the model's attention rows from the base's, mean over heads", "nats", "se"),
    entropy_change=number("change of attention entropy from the base, mean over heads", "nats", "se"),
    cosine_distance=number("1 − cosine of the model's and the base's residual stream after the block", "", "se"),
    share_focused=number("heads whose mean entropy fell", "share"),
    **_MODEL,
)


def _figures(tables: Tables) -> list[Figure]:
    figures = []
    if "control_layers" in tables:
        layers = tables["control_layers"]
        figures += [
            layer_ticks(
                layers,
                "kl_base_tuned",
                name="controls-kl",
                title="Attention KL by layer, beside controls",
                axis="mean KL over heads (nats)",
                caption="Which layers change most under any change of this size?",
            ),
            layer_ticks(
                layers,
                "entropy_change",
                name="controls-entropy",
                title="Entropy change by layer, beside controls",
                axis="mean entropy change (nats)",
                caption="Below zero: attention became more focused.",
                zero=True,
            ),
            layer_ticks(
                layers,
                "share_focused",
                name="controls-focused",
                title="Heads that became more focused, beside controls",
                axis="share of the layer's heads",
                caption="Share of heads whose mean entropy fell.",
                share=True,
            ),
            layer_ticks(
                layers,
                "cosine_distance",
                name="controls-cosine",
                title="Residual stream by layer, beside controls",
                axis="1 − cosine, mean over tokens",
                caption="Zero: the same direction as in the base.",
            ),
        ]
    if "control_heads" in tables:
        figures.append(
            head_scatter(
                tables["control_heads"],
                "entropy_change",
                name="controls-heads",
                title="Entropy change of every head, beside controls",
                axis="entropy change (nats)",
                caption="A point is a head. On the dashed line, the controls do to it what fine-tuning did.",
            )
        )
    return figures


def _views(tables: Tables) -> list[Shown]:
    if "controls" not in tables:
        return []
    models = tables["controls"].assign(**_shares(tables), **_kl(tables))
    view = Table(models).cells("control", "model", lambda row: Cell(str(row["control"]), strong=row["kind"] == "tuned"))
    view.mapped("kind", "which is", lambda kind: KIND_NAMES.get(str(kind), str(kind)))
    view.mapped("source", "source", lambda source: model_name(str(source)))
    view.cells("focused", "heads with lower entropy", lambda row: Cell(percent(row["focused"]), sort=float(row["focused"])))
    view.numbers("kl", "mean KL of attention")
    view.numbers("loss_change", "change of the summary loss", ends=("loss_change_low", "loss_change_high"), sign=True)
    view.numbers("weight_change", "ΔW").numbers("n", "documents")
    return [Shown("The tuned model and its controls", view.view(), "All against the same base, on the same documents.", terminal=True)]


def _by_model(tables: Tables, name: str, reduce: Callable[[pd.DataFrame], float]) -> dict[str, float]:
    rows, _ = of_rows(tables[name])
    return {str(control): reduce(own) for control, own in rows.groupby("control", sort=False)}


def _shares(tables: Tables) -> dict[str, list[float]]:
    """Return the share of heads with lower entropy of every model, as the column `focused`; nothing where heads were not measured."""
    if "control_heads" not in tables:
        return {}
    share = _by_model(tables, "control_heads", lambda own: float((own["entropy_change"] < 0).mean()))
    return {"focused": [share.get(str(control), float("nan")) for control in tables["controls"]["control"]]}


def _kl(tables: Tables) -> dict[str, list[float]]:
    """Return the mean KL of every model, as the column `kl`; nothing where layers were not measured."""
    if "control_layers" not in tables:
        return {}
    mean = _by_model(tables, "control_layers", lambda own: float(own["kl_base_tuned"].mean()))
    return {"kl": [mean.get(str(control), float("nan")) for control in tables["controls"]["control"]]}


def _findings(tables: Tables) -> list[str]:
    if "controls" not in tables:
        return []
    models = tables["controls"]
    found: list[tuple[str, list[float], Callable[[Any], str]]] = [
        (words, values[column], say)
        for column, words, values, say in (
            ("focused", "heads with lower entropy", _shares(tables), percent),
            ("kl", "mean KL of attention (nats)", _kl(tables), written),
        )
        if column in values
    ]
    found.append(("change of the summary loss (nats per token)", list(models["loss_change"]), lambda x: written(x, sign=True)))
    parts = []
    for words, values, say in found:
        by_kind = {str(kind): [values[at] for at in rows.index] for kind, rows in models.reset_index(drop=True).groupby("kind", sort=False)}
        if "tuned" in by_kind and len(by_kind) > 1:
            parts.append(f"{words}: tuned {say(by_kind['tuned'][0])}, {ranges(by_kind, say)}")
    if not parts:
        return []
    return [f"Beside its controls (how many in brackets), over {written(int(models['n'].max()))} documents: {' – '.join(parts)}."]


def _caveats(tables: Tables) -> list[str]:
    if "controls" not in tables:
        return []
    kinds = set(tables["controls"]["kind"])
    if kinds & {"shuffled", "other"}:
        return []
    return [
        "No control training was given: that a number differs from noise of the same size does not say that learning to summarize did it. Train controls with "
        "mechscope tune --control shuffled and give them to --controls."
    ]


SECTION = Section(
    id="controls",
    heading="Beside controls",
    intro=(
        "The tuned model beside what it is no different from if fine-tuning to summarize did nothing of its own: other trainings of the same base, and the "
        "base with Gaussian noise that has, matrix by matrix, the norm of what fine-tuning changed. One training is one observation: statements about "
        "fine-tuning rest on the number of trainings, not of documents."
    ),
    tables={"controls": CONTROLS, "control_heads": HEADS, "control_layers": LAYERS},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    adds="mechscope diff BASE TUNED --data DATA --controls CONTROL,CONTROL --out NEW_RUN",
)
