"""Superposition in toy models: how many features share so many dimensions, the phase diagram of two, and what a dictionary finds."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import grid_heatmap
from mechscope.report.marks.intervals import response_curves
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import number as written

TOYS = table(
    "One row per sparsity and training.",
    sparsity=number("probability that a feature is zero", "probability"),
    training="which of several trainings",
    features="features",
    dimensions="dimensions",
    held="features that are represented: ‖W_i‖ above one half",
    loss=number("weighted squared error on fresh data, summed over features"),
    linear_loss=number(
        "the same of a model that keeps the most important features, one in each dimension, and guesses the others' mean: the control"
    ),
    dimensions_each=number("dimensions a represented feature has on average: m / ‖W‖²", "dimensions"),
)
FEATURES = table(
    "One row per sparsity and feature, of the training with the lowest loss.",
    sparsity=number("probability that a feature is zero", "probability"),
    feature="the feature",
    importance=number("its weight in the loss"),
    norm=number("‖W_i‖: how strongly it is represented"),
    held="whether that is above one half",
    dimensionality=number("share of a dimension that it has to itself", "dimensions"),
    cosine=number("largest cosine of its direction with a decoder of a dictionary that was trained on what the model holds", "cosine"),
    cosine_random=number("the same with as many random directions: chance", "cosine"),
)
PHASES = table(
    "One row per sparsity and importance of the second of two features in one dimension, of the best of several trainings.",
    sparsity=number("probability that a feature is zero", "probability"),
    importance=number("importance of the second feature; the first has one"),
    first=number("‖W_1‖"),
    second=number("‖W_2‖"),
    n="trainings, of which this is the best",
    state="what became of them",
    loss=number("weighted squared error on fresh data"),
)


def _figures(tables: Tables) -> list[Figure]:
    drawn = []
    if "superposition" in tables:
        toys = tables["superposition"]
        parts = []
        for name, column, control in (("features represented", "held", False), ("dimensions", "dimensions", True)):
            own = toys.groupby("sparsity", as_index=False).agg(
                value=(column, "mean"), low=(column, "min"), high=(column, "max"), n=(column, "size")
            )
            parts.append(own.assign(series=name, line=name, control=control))
        drawn.append(
            response_curves(
                pd.concat(parts, ignore_index=True),
                name="superposition-held",
                title="Sparse features share dimensions",
                caption="Mean over trainings; band: least and most of them. Dashed: the dimensions there are.",
                x=("sparsity", "probability that a feature is zero"),
                axis="features",
            )
        )
    if "superposition_phases" in tables:
        phases = tables["superposition_phases"].assign(
            sparse=lambda rows: [f"{level:g}" for level in rows["sparsity"]],
            weight=lambda rows: [f"{level:g}" for level in rows["importance"]],
        )
        drawn.append(
            grid_heatmap(
                phases,
                "second",
                across=("sparse", "probability that a feature is zero"),
                down=("weight", "importance of the second feature (the first: 1)"),
                name="superposition-phases",
                title="Two features in one dimension: how strongly the second is represented",
                legend="‖W₂‖",
                caption=f"The best training of each cell, n = {int(phases['n'].max())} trainings. Point at a cell for what became of the two.",
                scale="share",
                tooltip={"second": "‖W₂‖", "first": "‖W₁‖", "state": "state"},
            )
        )
    return drawn


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "superposition_features" in tables:
        per = tables["superposition_features"]
        per = (
            per[per["held"]]
            .groupby("sparsity", as_index=False)
            .agg(
                features=("feature", "size"),
                dimensionality=("dimensionality", "mean"),
                cosine=("cosine", "mean"),
                chance=("cosine_random", "mean"),
            )
        )
        view = (
            Table(per)
            .numbers("sparsity", "sparsity")
            .numbers("features", "represented")
            .numbers("dimensionality", "share of a dimension, mean")
        )
        view = view.numbers("cosine", "cosine with the dictionary, mean").numbers("chance", "with random directions")
        shown.append(Shown("Represented features of the best training", view.view(), terminal=True))
    if "superposition" in tables:
        view = Table(tables["superposition"]).numbers("sparsity", "sparsity").numbers("training", "training").numbers("held", "represented")
        view = view.numbers("loss", "loss").numbers("linear_loss", "linear model").numbers("dimensions_each", "dimensions each")
        shown.append(Shown("Trainings", view.view()))
    return shown


def _findings(tables: Tables) -> list[Finding]:
    found = []
    if "superposition" in tables:
        toys = tables["superposition"]
        dense, sparse = (
            toys[toys["sparsity"] == level].nsmallest(1, "loss").iloc[0] for level in (toys["sparsity"].min(), toys["sparsity"].max())
        )
        found.append(
            Finding(
                f"Of {int(dense['features'])} features in {int(dense['dimensions'])} dimensions {int(dense['held'])} are represented where each is zero with "
                f"probability {written(dense['sparsity'])}, and {int(sparse['held'])} where it is {written(sparse['sparsity'])}; the loss is there "
                f"{written(sparse['loss'])} beside {written(sparse['linear_loss'])} of a model without superposition",
                n=(toys["sparsity"] == sparse["sparsity"]).sum(),
                unit="trainings of each",
                rows=(dense, sparse),
                card=Card(
                    f"{int(sparse['held'])} features",
                    f"in {int(sparse['dimensions'])} dimensions",
                    f"at sparsity {written(sparse['sparsity'])}",
                ),
                effect=1.0,
                table="superposition",
            )
        )
    if "superposition_features" in tables:
        features = tables["superposition_features"]
        level = features["sparsity"].max()
        name, here = "superposition_features", (("sparsity", "==", level), ("held", "==", True))
        every, near = Derived(name, here), Derived(name, (*here, ("cosine", ">", 0.9)))
        chance = Derived(name, (*here, ("cosine_random", ">", 0.9)))
        if every.of(tables):
            found.append(
                Finding(
                    f"A dictionary trained on what the sparsest model holds has a latent within a cosine of nine tenths of {near.written(tables)} of its "
                    f"{every.written(tables)} represented features; as many random directions are as near to {chance.written(tables)}",
                    n=1,
                    unit="training",
                    rows=(features[(features["sparsity"] == level) & features["held"]].iloc[0],),
                    derived=(every, near, chance),
                    effect=0.5,
                    table=name,
                )
            )
    return found


SECTION = Section(
    id="superposition",
    heading="Superposition",
    intro=(
        "x̂ = ReLU(Wᵀ W x + b) with more features than dimensions (Elhage et al. 2022). Known answers: dense features leave room for the most important "
        "ones, one in each dimension; two sparse ones share a dimension as an antipodal pair; five share two as a pentagon."
    ),
    unit="trainings",
    tables={"superposition": TOYS, "superposition_features": FEATURES, "superposition_phases": PHASES},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=lambda tables: [
        Caveat("The dictionary is told how many features there are and how many are active on average; of a real model neither is known.")
    ],
)
