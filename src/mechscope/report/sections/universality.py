"""Universality: neurons, representations and heads that other models have too, beside chance and an untrained model."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT, grid_heatmap
from mechscope.report.marks.histograms import histogram_lines
from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.shared import counted_in, few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label
from mechscope.report.theme import number as written

# excess correlation from which Gurnee et al. 2024 call a neuron universal
_UNIVERSAL = 0.5
_TOP = 40
_BINS = np.linspace(-0.5, 1.0, 61)

_WHICH = {
    "other": "the model that the first one is compared with; random weights is the first one's architecture untrained",
    "control": "whether that is the untrained one",
}
NEURONS = table(
    "One row per neuron of the first model and other model.",
    **_WHICH,
    component="the neuron",
    layer="its layer",
    feature="its number in the layer",
    partner="the neuron of the other model that fires most alike, chosen on half of the texts",
    partner_layer="that one's layer",
    correlation=number("their correlation over tokens of the other half", "Pearson's r"),
    rotated=number("the same of the best among the other model's neurons turned by a random rotation within layers", "Pearson's r"),
    excess=number("correlation − rotated", "Pearson's r"),
    n="texts of that half",
)
LAYERS = table(
    "One row per layer of the first model and other model: the residual stream behind it, and that of the layer at the same relative depth.",
    **_WHICH,
    layer="the layer",
    other_layer="the other model's",
    n="texts",
    rows="tokens",
    cka=number("debiased linear CKA", "share"),
    cka_shuffled=number("the same with each text beside another: chance", "share"),
    procrustes=number("share of the variance that a rotation and a scale explain", "share"),
    svcca=number("mean canonical correlation of the directions that keep 99\u202f% of the variance", "share"),
    withheld="why that is not given, in words; empty where it is",
)
GRID = table(
    "One row per layer of the first model and layer of another, twelve of each at most.",
    **_WHICH,
    layer="the layer",
    other_layer="the other model's",
    n="texts",
    cka=number("debiased linear CKA of their residual streams", "share"),
)
HEADS = table(
    "One row per role and other model.",
    **_WHICH,
    role="the role",
    heads="heads that were matched",
    n="random texts that judge",
    agreement=number("correlation over heads of how far partners stand above chance in the role", "Pearson's r"),
    chance=number("the same, mean where the other model's heads are dealt to its layers at random", "Pearson's r"),
    chance_high=number("its 97.5\u202f% quantile", "Pearson's r"),
    p=number("share of such draws, this one counted, that agree at least as well", "share"),
    q=number("p by Benjamini–Hochberg over the roles", "share"),
)
MATCHES = table(
    "One row per matched head and other model.",
    **_WHICH,
    component="the head",
    layer="its layer",
    partner="its partner",
    partner_layer="that one's layer",
    role="the role in which it stands highest above chance",
    excess=number("how far, on the texts that judge", "of the role"),
    partner_excess=number("how far its partner does", "of the role"),
)


def _histogram(neurons: pd.DataFrame) -> Figure:
    middles = (_BINS[1:] + _BINS[:-1]) / 2
    parts = []
    for other, own in neurons.groupby("other", sort=False):
        counts, _ = np.histogram(own["excess"].dropna().clip(_BINS[0], _BINS[-1]), _BINS)
        parts.append(pd.DataFrame({"series": label(other), "control": bool(own["control"].iloc[0]), "excess": middles, "count": counts}))
    return histogram_lines(
        pd.concat(parts, ignore_index=True),
        name="universal-neurons",
        title="Neurons that another model has too",
        caption=(
            "Correlation of each neuron with its partner in the other model, less that of the best neuron of a rotated basis; partners are chosen on half of "
            f"the texts, and this is the other half: n = {int(neurons['n'].max())} texts. Dashed: the untrained model."
        ),
        x=("excess", "excess correlation"),
        axis="neurons",
        ruled=(_UNIVERSAL,),
    )


def _figures(tables: Tables) -> list[Figure]:
    drawn = [_histogram(tables["universal_neurons"])] if "universal_neurons" in tables else []
    if "universal_grid" in tables:
        for at, (other, own) in enumerate(tables["universal_grid"].groupby("other", sort=False)):
            cells = own.assign(layer=[f"layer {layer}" for layer in own["layer"]], other_layer=[str(layer) for layer in own["other_layer"]])
            drawn.append(
                grid_heatmap(
                    cells,
                    "cka",
                    across=("other_layer", f"layer of {label(other)}"),
                    down=("layer", "layer of the model"),
                    name=f"universal-grid-{at + 1}",
                    title=f"Representations: CKA with {label(other)}",
                    legend="CKA",
                    caption=counted_in("Debiased linear CKA of the residual streams at the same characters of the same texts.", own),
                    scale="share",
                    tooltip={"cka": "CKA"},
                )
            )
    return drawn


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "universal_neurons" in tables:
        top = tables["universal_neurons"]
        top = top[~top["control"].astype(bool)].nlargest(_TOP, "excess")
        view = Table(top).words("other", "other model").words("component", "neuron").words("partner", "its partner")
        view = view.numbers("correlation", "correlation").numbers("rotated", "rotated").numbers("excess", "excess").numbers("n", "texts")
        shown.append(Shown("Neurons with the largest excess", view.view(), terminal=True))
    if "universal_layers" in tables:
        view = Table(tables["universal_layers"]).words("other", "other model").numbers("layer", "layer").numbers("other_layer", "its layer")
        view = view.numbers("cka", "CKA").numbers("cka_shuffled", "shuffled").numbers("procrustes", "Procrustes").numbers("svcca", "SVCCA")
        shown.append(Shown("Layers at the same relative depth", view.numbers("n", "texts").view(), terminal=True))
    if "universal_heads" in tables:
        view = Table(tables["universal_heads"]).words("other", "other model").words("role", "role").numbers("agreement", "agreement")
        view = view.numbers("chance", "chance").numbers("chance_high", "97.5\u202f% of chance").numbers("q", "q").numbers("heads", "heads")
        shown.append(Shown("Heads matched by what they do", view.numbers("n", "texts").view(), terminal=True))
    return shown


def _findings(tables: Tables) -> list[Finding]:
    return [*_of_neurons(tables), *_of_layers(tables), *_of_heads(tables)]


def _of_neurons(tables: Tables) -> list[Finding]:
    if "universal_neurons" not in tables:
        return []
    neurons, name = tables["universal_neurons"], "universal_neurons"
    known = neurons[neurons["excess"].notna()]
    shares = {other: float((own["excess"] > _UNIVERSAL).mean()) for other, own in known.groupby("other", sort=False)}
    control = next((str(other) for other, own in known.groupby("other", sort=False) if own["control"].iloc[0]), "")
    found = []
    for other in shares:
        if other == control:
            continue
        here = (("other", "==", other),)
        many, every = Derived(name, (*here, ("excess", ">", _UNIVERSAL))), Derived(name, (*here, ("excess", ">", -2.0)))
        derived, beside = [many, every], ""
        if control:
            chance = Derived(name, (("other", "==", control), ("excess", ">", _UNIVERSAL)))
            of = Derived(name, (("other", "==", control), ("excess", ">", -2.0)))
            beside = f", beside {chance.written(tables)} of {of.written(tables)} in the untrained model"
            derived += [chance, of]
        found.append(
            Finding(
                f"{many.written(tables)} of {every.written(tables)} neurons have a partner in {label(other)} whose correlation exceeds that of a "
                f"rotated basis by more than one half{beside}",
                n=neurons["n"].iloc[0],
                derived=tuple(derived),
                effect=shares[other],
                card=Card(
                    f"{many.written(tables)} of {every.written(tables)}",
                    f"neurons have a partner in {label(other)}",
                    "excess correlation above one half",
                ),
                table=name,
            )
        )
    return found


def _of_layers(tables: Tables) -> list[Finding]:
    if "universal_layers" not in tables:
        return []
    layers, found = tables["universal_layers"], []
    for other, own in layers.groupby("other", sort=False):
        low, high = own.nsmallest(1, "cka").iloc[0], own.nlargest(1, "cka").iloc[0]
        at_chance = own.assign(size=own["cka_shuffled"].abs()).nlargest(1, "size").drop(columns="size").iloc[0]
        found.append(
            Finding(
                f"Layers at the same relative depth of {label(other)} have a CKA of {written(low['cka'])} (layer {int(low['layer'])}) to "
                f"{written(high['cka'])} (layer {int(high['layer'])}); with texts exchanged {written(at_chance['cka_shuffled'])} at most in size",
                n=own["n"].iloc[0],
                rows=(low, high, at_chance),
                effect=float(high["cka"]) if not own["control"].iloc[0] else 0.0,
                folded=bool(own["control"].iloc[0]),
                table="universal_layers",
            )
        )
    return found


def _of_heads(tables: Tables) -> list[Finding]:
    if "universal_heads" not in tables:
        return []
    heads, found, name = tables["universal_heads"], [], "universal_heads"
    for other, own in heads[heads["q"].notna()].groupby("other", sort=False):
        here = (("other", "==", other), ("q", ">", -1.0))
        alike, every = Derived(name, (*here, ("q", "<", Q_SIGNIFICANT))), Derived(name, here)
        best = own.nsmallest(1, "p").iloc[0]
        found.append(
            Finding(
                f"In {alike.written(tables)} of {every.written(tables)} roles heads at the same relative depth of {label(other)} agree better than its "
                f"heads dealt to layers at random (q < {Q_SIGNIFICANT}); best in {label(best['role'])}: "
                f"{written(best['agreement'])} beside {written(best['chance'])}",
                n=own["n"].iloc[0],
                unit="random texts",
                rows=(best,),
                derived=(alike, every),
                effect=alike.of(tables) / every.of(tables) if not own["control"].iloc[0] else 0.0,
                folded=bool(own["control"].iloc[0]),
                table=name,
            )
        )
    return found


def _caveats(tables: Tables) -> list[Caveat]:
    said = [
        Caveat(
            "One other model is one draw: what is shared with it may be due to what the two have in common (data, tokenizer, initial weights)."
        )
    ]
    if "universal_neurons" in tables:
        said.append(Caveat("Tokens of one text are not independent: the texts are.", "universal_neurons"))
    return [*said, *few_texts(tables, "universal_neurons", "universal_layers", "universal_heads")]


SECTION = Section(
    id="universality",
    heading="What other models share",
    intro=(
        "The same texts are read by several models, and compared where all of them end a token. A neuron's partner is chosen on half of the texts and "
        "judged on the other, beside a rotated basis (Gurnee et al. 2024); representations are compared by CKA, a rotation, and canonical correlations; "
        "heads by what they do on random texts. The first model's architecture with random weights is the control of all three."
    ),
    tables={
        "universal_neurons": NEURONS,
        "universal_layers": LAYERS,
        "universal_grid": GRID,
        "universal_heads": HEADS,
        "universal_matches": MATCHES,
    },
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
