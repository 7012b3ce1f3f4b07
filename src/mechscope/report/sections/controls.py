"""Controls: the tuned model beside other trainings of the same base and beside noise as large as what fine-tuning changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.beside import listed
from mechscope.report.marks.controls import KIND_NAMES
from mechscope.report.marks.tables import Cell, Shown, Table
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.sections import heads, layers, outputs, weights
from mechscope.report.shared import of_rows
from mechscope.report.statements import Caveat, Derived, Finding
from mechscope.report.theme import model_name, percent
from mechscope.report.theme import number as written

_MODEL: dict[str, Column | str] = {
    "control": "the model: tuned, a control's name, or a draw of noise",
    "kind": "tuned; seed: the same training with another seed; shuffled: trained on shuffled summaries; other: any other training; noise",
    "seed": "seed of its training, or number of the draw; none where it is not known",
}
_MATRIX = {"control_kind" if name == "kind" else name: column for name, column in _MODEL.items()}
CONTROLS = table(
    "One row per model that is compared with the base: the tuned one first. Without controls where base and tuned model are equal: noise of no size is none.",
    **_MODEL,
    source="where it came from",
    n="documents: the first of those measured",
    loss_change=number("change of the loss on summary tokens from the base", "nats per token", "low", "high"),
    weight_change=number("norm of the change of all weights, over their norm"),
)
_SAME = "by the same functions, against the same base, on the documents of `controls`; the model stands for the tuned one."
HEADS = table(f"The table `heads` of every model: {_SAME}", **heads.COLUMNS, **_MODEL)
LAYERS = table(f"The table `layers` of every model: {_SAME}", **layers.COLUMNS, **_MODEL)
OUTPUTS = table(f"The table `outputs` of every model: {_SAME}", **outputs.COLUMNS, **_MODEL)
WEIGHTS = table(
    "The table `weights` of every model, which stands for the tuned one. Of noise only the first draw's spectra are computed: those of others are the same but "
    "for chance.",
    weights.NUMBERED,
    **weights.COLUMNS,
    **_MATRIX,
)


def _views(tables: Tables) -> list[Shown]:
    if "controls" not in tables:
        return []
    models = tables["controls"].assign(**_shares(tables), **_kl(tables))
    changed = _changed(tables)
    view = Table(models).cells("control", "model", lambda row: Cell(str(row["control"]), strong=row["kind"] == "tuned"))
    view.mapped("kind", "which is", lambda kind: KIND_NAMES.get(str(kind), str(kind)))
    view.mapped("source", "source", lambda source: model_name(str(source)))
    if changed:
        view.cells("control", "heads that changed what they write", lambda row: changed.get(str(row["control"]), Cell("–")))
    view.cells("focused", "heads with lower entropy", lambda row: Cell(percent(row["focused"]), sort=float(row["focused"])))
    view.numbers("kl", "mean KL of attention")
    view.numbers("loss_change", "change of the summary loss", ends=("loss_change_low", "loss_change_high"), sign=True)
    view.numbers("weight_change", "ΔW").numbers("n", "documents")
    words = (
        "All against the same base, on the same documents. Their numbers part by part stand beside the tuned model's in the sections below, in tables and "
        "figures."
    )
    return [Shown("The tuned model and its controls", view.view(), words, terminal=True)]


def _by_model(tables: Tables, name: str, reduce: Callable[[pd.DataFrame], float]) -> dict[str, float]:
    rows, _ = of_rows(tables[name])
    return {str(control): reduce(own) for control, own in rows.groupby("control", sort=False)}


def _shares(tables: Tables) -> dict[str, list[float]]:
    """Return the share of heads with lower entropy of every model, as the column `focused`; nothing where heads were not measured."""
    if "control_heads" not in tables:
        return {}
    share = _by_model(tables, "control_heads", lambda own: float((own["entropy_change"] < 0).mean()))
    return {"focused": [share.get(str(control), float("nan")) for control in tables["controls"]["control"]]}


def _changed(tables: Tables) -> dict[str, Cell]:
    """Return of every model how many heads changed what they write by more than the smallest effect: `24 of 48`; nothing where that was not judged."""
    if "control_heads" not in tables:
        return {}
    rows, _ = of_rows(tables["control_heads"])
    judged = rows[rows["write_change_verdict"] != "not measured"]
    found = (
        judged.assign(changed=judged["write_change_verdict"] == "changed").groupby("control", sort=False)["changed"].agg(["sum", "count"])
    )
    return {
        str(name): Cell(f"{written(int(changed))} of {written(int(count))}", sort=float(changed))
        for name, changed, count in found.itertuples()
    }


def _kl(tables: Tables) -> dict[str, list[float]]:
    """Return the mean KL of every model, as the column `kl`; nothing where layers were not measured."""
    if "control_layers" not in tables:
        return {}
    mean = _by_model(tables, "control_layers", lambda own: float(own["kl_base_tuned"].mean()))
    return {"kl": [mean.get(str(control), float("nan")) for control in tables["controls"]["control"]]}


def _findings(tables: Tables) -> list[Finding]:
    """Say of three quantities where the tuned model lies beside its controls, a finding each."""
    if "controls" not in tables:
        return []
    models = tables["controls"].reset_index(drop=True)
    said: tuple[tuple[str, str, tuple[Derived, ...], Callable[[Any], str]], ...] = (
        ("the share of heads with lower entropy", "", _each(tables, "control_heads", _focused), percent),
        ("the mean KL of attention from the base's", " (nats)", _each(tables, "control_layers", _mean_kl), written),
        ("the change of the summary loss", " (nats per token)", (), lambda x: written(x, sign=True)),
    )
    found = []
    for words, unit, derived, say in said:
        if not derived and "loss" not in words:
            continue
        values = [each.of(tables) for each in derived] if derived else [float(x) for x in models["loss_change"]]
        by_kind = {str(kind): [values[at] for at in rows.index] for kind, rows in models.groupby("kind", sort=False)}
        if "tuned" in by_kind and len(by_kind) > 1 and not np.isnan(values).any():
            nulls = [value for kind, own in by_kind.items() if kind not in ("tuned", "seed") for value in own]
            among = bool(nulls) and min(nulls) <= by_kind["tuned"][0] <= max(nulls)
            found.append(
                Finding(
                    f"{words} is {say(by_kind['tuned'][0])} in the tuned model{unit}; beside it, {listed(by_kind, say)}"
                    + ("; so it does not stand out among controls" if among else ""),
                    n=models["n"].max(),
                    unit="documents",
                    rows=tuple(row for _, row in models.iterrows()),
                    derived=(*derived, *(Derived("controls", (("kind", "==", kind),)) for kind in by_kind)),
                    table="controls",
                )
            )
    return found


def _each(tables: Tables, name: str, derived: Callable[[str, str], Derived]) -> tuple[Derived, ...]:
    """Return a number of every model, in the order of the table `controls`; nothing where its table was not measured."""
    if name not in tables:
        return ()
    _, kind = of_rows(tables[name])
    return tuple(derived(str(control), kind) for control in tables["controls"]["control"])


def _focused(control: str, kind: str) -> Derived:
    return Derived("control_heads", (("rows", "==", kind), ("control", "==", control)), "entropy_change", "negative")


def _mean_kl(control: str, kind: str) -> Derived:
    return Derived("control_layers", (("rows", "==", kind), ("control", "==", control)), "kl_base_tuned", "mean")


def _caveats(tables: Tables) -> list[Caveat]:
    if "controls" not in tables:
        return []
    kinds = set(tables["controls"]["kind"])
    if kinds & {"shuffled", "other"}:
        return []
    return [
        Caveat(
            "No control training was given: that a number differs from noise of the same size does not say that learning to summarize did it. Train controls "
            "with mechscope tune --control shuffled and give them to --controls.",
            "controls",
        )
    ]


SECTION = Section(
    id="controls",
    heading="Beside controls",
    intro=(
        "The tuned model beside what it is no different from if fine-tuning to summarize did nothing of its own: other trainings of the same base, and the "
        "base with Gaussian noise that has, matrix by matrix, the norm of what fine-tuning changed. One training is one observation: statements about "
        "fine-tuning rest on the number of trainings, not of documents."
    ),
    unit="documents",
    tables={
        "controls": CONTROLS,
        "control_heads": HEADS,
        "control_layers": LAYERS,
        "control_outputs": OUTPUTS,
        "control_weights": WEIGHTS,
    },
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="where",
    adds="mechscope diff BASE TUNED --data DATA --controls CONTROL,CONTROL --out NEW_RUN",
)
