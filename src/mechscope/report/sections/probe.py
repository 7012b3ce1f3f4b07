"""Probes: what can be read off the activations of every layer, beside controls; and whether fine-tuning made it more readable, or moved it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.place_curves import place_curves
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import estimated, few_texts
from mechscope.report.statements import Card, Caveat, Finding
from mechscope.report.theme import number as written
from mechscope.report.theme import percent

_LABELS, _SHUFFLED, _CONTROL, _UNTRAINED, _OWN = "labels", "shuffled labels", "control task", "random weights", "its own"
_OVER_SHUFFLED, _OVER_BASE, _BASES = "over shuffled labels", "over the base", "the base's probe over its own"

_PROBES = {
    **dict.fromkeys(("lda", "ridge"), "a linear probe"),
    "means": "the nearest class mean",
    "logistic": "a logistic probe",
    "mlp": "a probe with a hidden layer",
}

_TOLD = {
    "task": Column("what is told"),
    "unit": Column("what a row that is told is: texts or tokens"),
    "method": Column("how probes are fitted: lda, ridge, means (the nearest), logistic, mlp (one hidden layer)"),
}
_WHERE = {"component": Column("what is read: embed, resid3, a3, m3, a3.h5"), "layer": Column("its layer, −1 for the embedding")}
TABLES = {
    "probe_accuracy": table(
        "One row per model, whose probe, labels and component, over held-out texts.",
        **_TOLD,
        model="model, or base, tuned and random weights",
        probe="whose probe: its own, or the base's",
        labels="labels; shuffled labels (of all shuffles together); control task (a random class for each kind of token)",
        **_WHERE,
        n="texts",
        rows=number("texts or tokens that are told"),
        classes=number("classes"),
        balanced=number("balanced accuracy: the share told right, mean over classes", "share", "low", "high"),
        chance=number("balanced accuracy of any guess that does not look", "share"),
        accuracy=number("share of all rows told right; classes weigh alike in the probe, so that it may lie below the next", "share"),
        majority=number("share of the most frequent class", "share"),
    ),
    "probe_contrasts": table(
        "One row per model, contrast and component: balanced accuracies on the same texts, one less the other.",
        **_TOLD,
        model="model, or base, tuned and random weights",
        contrast="what it is compared with: over shuffled labels, over the control task (selectivity), over the embedding, over random weights, over the base; "
        "the base's probe over its own in the tuned model",
        **_WHERE,
        n="texts",
        difference=number(
            "balanced accuracy less that of the control; p over shuffled labels by the spread of the shuffles",
            "share",
            "low",
            "high",
            "p",
            "q",
        ),
    ),
    "probe_directions": table(
        "One row per component: whether the differences of class means point where they pointed before fine-tuning.",
        **_TOLD,
        **_WHERE,
        n="texts",
        folds="folds, each left out once for the interval",
        angle=number("angle between the differences of class means in both models", "degrees", "low", "high"),
        alike=number("angle between those of two halves of the texts in the base: noise alone", "degrees"),
        apart=number("angle between those of one half in the base and the other in the tuned model", "degrees"),
    ),
    "probe_erased": table(
        "One row per model, metric and what was erased at a component, each text run without what was learned from others.",
        task=_TOLD["task"],
        model="model, or base and tuned",
        **_WHERE,
        metric="kl: of the next token's distribution from the unchanged run's; loss: of the text's tokens",
        erased="labels; shuffled labels; random directions",
        n="texts",
        draws=number("how many times labels were shuffled, or directions drawn"),
        rank=number("directions taken out"),
        effect=number("mean over texts of the metric less that of the unchanged run", "nats per token", "low", "high"),
        less=number(
            "the labels' effect less this control's; interval over texts, p by the spread of the draws",
            "nats per token",
            "low",
            "high",
            "p",
        ),
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    rows = tables.get("probe_accuracy")
    if rows is None or rows["component"].str.contains(".h", regex=False).any():
        return []
    points = rows.assign(
        place=rows["component"],
        series=[_series(str(row["model"]), str(row["probe"])) for _, row in rows.iterrows()],
        dash=rows["labels"],
        value=rows["balanced"],
        low=rows["balanced_low"],
        high=rows["balanced_high"],
    )
    task = str(rows["task"].iloc[0])
    return [
        place_curves(
            points[["place", "series", "dash", "value", "low", "high", "n"]],
            name="probe",
            title=f"What {_PROBES[str(rows['method'].iloc[0])]} tells of {task}",
            axis="balanced accuracy",
            caption="Held-out texts, each judged by probes of the others; the band is the 95\u202f% interval over texts. "
            f"A guess gets {percent(rows['chance'].iloc[0])}.",
            words={"series": "model", "dash": "labels"},
            share=True,
        )
    ]


def _series(model: str, probe: str) -> str:
    return model if probe == _OWN else f"{model}, by {probe} probe"


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if (rows := tables.get("probe_accuracy")) is not None:
        own = rows[rows["labels"] == _LABELS]
        view = Table(own).words("component", "component").words("model", "model")
        view = view.words("probe", "probe") if own["probe"].nunique() > 1 else view
        view = view.numbers("balanced", "balanced accuracy", ends=("balanced_low", "balanced_high")).numbers("accuracy", "accuracy")
        view = (
            view.numbers("majority", "majority")
            .numbers("n", "texts")
            .numbers("rows", str(rows["unit"].iloc[0]) if rows["unit"].iloc[0] != "texts" else "rows")
        )
        shown.append(Shown("What is told", view.view(), table="probe_accuracy", terminal=True))
    if (rows := tables.get("probe_contrasts")) is not None:
        view = Table(rows).words("component", "component").words("model", "model").words("contrast", "balanced accuracy")
        view = (
            view.numbers("difference", "more", ends=("difference_low", "difference_high"), sign=True)
            .numbers("difference_q", "q")
            .numbers("n", "texts")
        )
        shown.append(Shown("Beside controls", view.view(), table="probe_contrasts", folded=True))
    if (rows := tables.get("probe_directions")) is not None:
        view = Table(rows).words("component", "component").numbers("angle", "turned by, degrees", ends=("angle_low", "angle_high"))
        view = view.numbers("alike", "between halves of the texts").numbers("apart", "between halves in both models").numbers("n", "texts")
        shown.append(Shown("Whether directions moved", view.view(), table="probe_directions"))
    if (rows := tables.get("probe_erased")) is not None:
        view = Table(rows).words("component", "at").words("model", "model").words("metric", "metric").words("erased", "erased")
        view = view.numbers("effect", "effect, nats per token", ends=("effect_low", "effect_high"), sign=True)
        view = view.numbers("less", "labels' less this", ends=("less_low", "less_high"), sign=True).numbers("less_p", "p")
        shown.append(
            Shown("What the model does without it", view.numbers("rank", "directions").numbers("n", "texts").view(), table="probe_erased")
        )
    return shown


def _findings(tables: Tables) -> list[Finding]:
    rows = tables.get("probe_accuracy")
    if rows is None or "probe_contrasts" not in tables:
        return []
    own = rows[(rows["labels"] == _LABELS) & (rows["probe"] == _OWN)]
    found = [_told(str(model), of_model, tables) for model, of_model in own.groupby("model", sort=False) if model != _UNTRAINED]
    return found + _changed(own, tables) + _without(tables)


def _without(tables: Tables) -> list[Finding]:
    """Say what erasing the labels changes of the next token, and whether labels that mean nothing change as much."""
    rows = tables.get("probe_erased")
    if rows is None:
        return []
    found = []
    for model, own in rows[rows["metric"] == "kl"].groupby("model", sort=False):
        labels, shuffled, drawn = (own[own["erased"] == name].iloc[0] for name in (_LABELS, _SHUFFLED, "random directions"))
        more = all(row["less"] > 0 and row["less_p"] < Q_SIGNIFICANT for row in (shuffled, drawn))
        whose = "" if model == "model" else f" of the {model} model"
        said = "more than" if more else "no more than is shown of"
        text = (
            f"erasing {labels['task']} at {labels['component']}{whose} moves the next token's distribution by {estimated(labels, 'effect')} nats (KL), {said} "
            f"erasing as many directions of shuffled labels, {estimated(shuffled, 'effect')}, and random ones, {estimated(drawn, 'effect')}"
        )
        found.append(Finding(text, n=labels["n"], rows=(labels, shuffled, drawn), effect=float(labels["effect"]), table="probe_erased"))
    return found


def _told(model: str, own: pd.DataFrame, tables: Tables) -> Finding:
    """Say how well the best component tells the labels, beside controls; or that none does."""
    rows, contrasts = tables["probe_accuracy"], tables["probe_contrasts"]
    best = own.sort_values("balanced", ascending=False, kind="stable").iloc[0]
    over = contrasts[(contrasts["model"] == model) & (contrasts["contrast"] == _OVER_SHUFFLED)]
    beyond = over[(over["difference_q"] < Q_SIGNIFICANT) & (over["difference"] > 0)]
    there = rows[(rows["component"] == best["component"]) & (rows["probe"] == _OWN)]
    beside, quoted = [], [best]
    for said, which in (
        ("shuffled labels", (there["model"] == model) & (there["labels"] == _SHUFFLED)),
        ("a control task by kind of token", (there["model"] == model) & (there["labels"] == _CONTROL)),
        ("random weights", (there["model"] == _UNTRAINED) & (there["labels"] == _LABELS)),
    ):
        if which.any():
            row = there[which].iloc[0]
            beside.append(f"{said} {estimated(row, 'balanced', share=True)}")
            quoted.append(row)
    embedding = own[own["component"] == "embed"]
    if len(embedding) and best["component"] != "embed":
        beside.append(f"the embedding alone {estimated(embedding.iloc[0], 'balanced', share=True)}")
        quoted.append(embedding.iloc[0])
    told = f"{best['task']} of held-out {best['unit']}"
    whose = "" if model == "model" else f" in the {model} model"
    numbers = f"{estimated(best, 'balanced', share=True)}; beside it {', '.join(beside)}, and a guess {percent(best['chance'])}"
    if best["component"] not in set(beyond["component"]):
        return Finding(
            f"no component{whose} is shown to tell {told} better than shuffled labels: the best, {best['component']}, has a balanced accuracy of {numbers}",
            n=best["n"],
            rows=tuple(quoted),
            table="probe_accuracy",
        )
    return Finding(
        f"{_PROBES[str(best['method'])].capitalize()} at {best['component']}{whose} tells {told} with a balanced accuracy of {numbers}",
        n=best["n"],
        rows=tuple(quoted),
        effect=float(best["balanced"] - best["chance"]),
        card=Card(
            percent(best["balanced"]),
            f"balanced accuracy on {best['task']}",
            f"at {best['component']}; a guess gets {percent(best['chance'])}",
        ),
        table="probe_accuracy",
    )


def _changed(own: pd.DataFrame, tables: Tables) -> list[Finding]:
    """Say what fine-tuning changed where the base tells most."""
    contrasts, directions = tables["probe_contrasts"], tables.get("probe_directions")
    base = own[own["model"] == "base"]
    if base.empty or directions is None:
        return []
    component = str(base.sort_values("balanced", ascending=False, kind="stable").iloc[0]["component"])
    at = contrasts[(contrasts["component"] == component) & (contrasts["model"] == "tuned")]
    more, moved = (at[at["contrast"] == name].iloc[0] for name in (_OVER_BASE, _BASES))
    turned = directions[directions["component"] == component].iloc[0]
    rows: tuple[Any, ...] = (more, moved)
    text = (
        f"at {component}, where the base tells {more['task']} best, fine-tuning changed the balanced accuracy (a share) by {_difference(more)}; "
        f"the base's probe differs from the tuned model's own by {_difference(moved)} there"
    )
    if pd.notna(turned["angle"]) and pd.notna(turned["alike"]):
        rows = (*rows, turned)
        text += f"; the directions along which class means differ lie {estimated(turned, 'angle')} degrees apart, "
        text += f"those of two halves of the texts {written(turned['alike'])} in the base and {written(turned['apart'])} across both models"
    return [Finding(text, n=more["n"], rows=rows, effect=abs(float(more["difference"])), table="probe_contrasts")]


def _difference(row: pd.Series) -> str:
    return estimated(row, "difference", sign=True)


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        *few_texts(tables, "probe_accuracy"),
        Caveat(
            "The best of all components is named, on the texts that it is judged on: its accuracy lies a little lower on others.",
            weakens="probe_accuracy",
        ),
        Caveat(
            "Intervals are over texts, for these probes; folds learn from texts they share, so that other texts to learn from would change accuracies more. "
            "Simulated where there is nothing to tell, they miss the truth two to three times as often as they say; p over shuffled labels does not rest on "
            "them.",
            weakens="probe_accuracy",
        ),
        Caveat("What a probe tells is there to be read. Whether the model reads it, only an intervention shows."),
    ]


SECTION = Section(
    id="probe",
    heading="What can be read off",
    intro=(
        "A probe learns from the activations of some texts to tell their labels and is judged on others, fold by fold; equal texts fall into one "
        "fold. Balanced accuracy is the mean over classes of the share told right. What it means, controls say: the same probe on shuffled labels; on a "
        "control task, a random class for each kind of token, which only knowing tokens by heart tells (Hewitt and Liang 2019); on the embedding, which "
        "sees no other token; and on a model of the same architecture with random weights."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
