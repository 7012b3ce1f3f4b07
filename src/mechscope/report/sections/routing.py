"""Routing: how routers share tokens out among experts, and what fine-tuning did to that."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from mechscope.report.marks.curves import layer_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT, Scale, grid_heatmap
from mechscope.report.marks.tables import Shown, Table, strongest
from mechscope.report.section import NO_SAMPLE, Section, Tables, number, table
from mechscope.report.shared import by_model, each_model, estimated, few_texts
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label, percent
from mechscope.report.theme import number as written

_SHOWN = 40
# log₂ of a load at which colours end: a sixteenth of the even share
_LEAST = 2.0**-4
_LAYER = {"layer": "the layer", "component": "its MLP, m3"}
_EXPERT = {"layer": "its layer", "expert": "its number in the layer", "component": "its name, m3.e5"}
_MODEL = "base, tuned or model"

TABLES = {
    "routing": table(
        "One row per model and layer that has experts.",
        model=_MODEL,
        **_LAYER,
        router="what makes probabilities of its router's logits: a softmax over all experts, or each expert's sigmoid divided by their sum",
        experts="how many experts the layer has, shared ones not counted",
        slots="how many of them a token is sent to",
        n="texts",
        entropy=number("entropy of the router over all experts; mean over tokens, then over texts", "nats", "se", "low", "high"),
        uniform=number("ln of the number of experts: the entropy of a router that does not tell them apart", "nats"),
    ),
    "experts": table(
        "One row per model and expert.",
        model=_MODEL,
        **_EXPERT,
        n="texts",
        load=number(
            "share of the layer's routed tokens that come to it, times the number of experts; mean over texts",
            "of an even share",
            "se",
            "low",
            "high",
        ),
        gate_load=number("the same of the gate weights by which experts' outputs are multiplied", "of an even share", "se", "low", "high"),
        unused="whether no token of these texts came to it",
    ),
    "routing_changes": table(
        "One row per layer that has experts; of a base and a tuned model.",
        **_LAYER,
        n="texts",
        kl=number("KL(base ‖ tuned) of the routers on the same tokens; mean over tokens, then over texts", "nats", "se", "low", "high"),
        top1_agreement=number("tokens whose expert with the largest gate weight is the same in both", "share", "se", "low", "high"),
        overlap=number(
            "of the experts that the base sends a token to, those that the tuned model sends it to as well", "share", "se", "low", "high"
        ),
        entropy_change=number(
            "entropy of the router, tuned − base, paired by text; q over all layers", "nats", "se", "low", "high", "p", "q"
        ),
    ),
    "expert_changes": table(
        "One row per expert; of a base and a tuned model.",
        **_EXPERT,
        n="texts",
        load_base=number("its load in the base model, as in `experts`", "of an even share"),
        load_tuned=number("the same of the tuned model", "of an even share"),
        load_change=number("tuned − base, paired by text; q over all experts", "of an even share", "se", "low", "high", "p", "q"),
        weight_change=number("Frobenius norm of the change of its own weights over that of the base's", "of the base's norm"),
        router_change=number("the same of its row of the router", "of the base's norm"),
    ),
}


def _figures(tables: Tables) -> list[Figure]:
    drawn = list[Figure]()
    if "routing" in tables:
        drawn.append(_entropy(tables["routing"]))
    for end, whose, own in each_model(tables["experts"]) if "experts" in tables else []:
        drawn.append(
            _grid(
                own.assign(log_load=np.log2(own["load"].clip(lower=_LEAST))),
                "log_load",
                name=f"routing-load{end}",
                title=f"Load of the experts{whose}",
                legend="log₂ of the load",
                caption="0: an even share of the layer's tokens; 1: twice as many.",
                tooltip={"load": "load", "load_low": "95\u202f% from", "load_high": "to", "gate_load": "load by gate weight", "n": "texts"},
            )
        )
    if "routing_changes" in tables:
        drawn += _agreement(tables["routing_changes"])
    if "expert_changes" in tables:
        drawn += _moved(tables["expert_changes"])
    return drawn


def _entropy(routing: pd.DataFrame) -> Figure:
    """Draw the entropy of every layer's router, of each model, beside that of a router that does not tell experts apart."""
    models = list(dict.fromkeys(routing["model"]))
    layers = routing[routing["model"] == models[0]][["layer", "n", "uniform"]].set_index("layer")
    for model in models:
        own = routing[routing["model"] == model].set_index("layer")
        layers = layers.assign(**{f"{model}{end}": own[f"entropy{end}"] for end in ("", "_low", "_high")})
    series = {model: model if len(models) > 1 else "router" for model in models}
    return layer_curves(
        layers.reset_index(),
        {**series, "uniform": "ln (experts)"},
        name="routing-entropy",
        title="Entropy of the routers",
        axis="entropy, nats",
        caption="Over all experts, before the best are chosen; band: 95\u202f% over texts. ln (experts): a router that does not tell them apart.",
        counted_in="texts",
    )


def _agreement(changes: pd.DataFrame) -> list[Figure]:
    return [
        layer_curves(
            changes,
            {"kl": "KL"},
            name="routing-kl",
            title="How far routers moved",
            axis="KL(base ‖ tuned), nats",
            caption="On the same tokens; band: 95\u202f% over texts.",
            zero=True,
            counted_in="texts",
        ),
        layer_curves(
            changes,
            {"top1_agreement": "first expert", "overlap": "all chosen experts"},
            name="routing-agreement",
            title="Tokens that go to the same experts",
            axis="share",
            caption="In both models, on the same tokens; the first expert has the largest gate weight; band: 95\u202f% over texts.",
            share=True,
            counted_in="texts",
        ),
    ]


def _moved(changes: pd.DataFrame) -> list[Figure]:
    told = {
        "load_base": "load, base",
        "load_tuned": "load, tuned",
        "weight_change": "change of weights",
        "router_change": "change of the router's row",
    }
    return [
        _grid(
            changes,
            "load_change",
            name="routing-load-change",
            title="Change of load",
            legend="tuned − base, of an even share",
            caption="An expert may get other tokens without having changed, as what the router reads has changed.",
            tooltip={**told, "load_change_q": "q", "n": "texts"},
        ),
        _grid(
            changes,
            "weight_change",
            name="routing-weight-change",
            title="Which experts fine-tuning moved",
            legend="change of an expert's weights, of the base's norm, √ scale",
            caption=f"Frobenius norm of all of its own weights together. {NO_SAMPLE}",
            scale="magnitude",
            tooltip=told,
        ),
    ]


def _grid(
    experts: pd.DataFrame,
    value: str,
    *,
    name: str,
    title: str,
    legend: str,
    caption: str,
    scale: Scale = "change",
    tooltip: Mapping[str, str],
) -> Figure:
    """Draw one number per layer (down) and expert (across)."""
    cells = experts.assign(place=[f"m{layer}" for layer in experts["layer"]], number=experts["expert"].astype(str))
    cells = cells.sort_values(["layer", "expert"], ascending=[False, True], kind="stable")
    return grid_heatmap(
        cells,
        value,
        across=("number", "expert"),
        down=("place", "layer"),
        name=name,
        title=title,
        legend=legend,
        caption=caption,
        scale=scale,
        tooltip=tooltip,
    )


def _views(tables: Tables) -> list[Shown]:
    shown = list[Shown]()
    if "routing_changes" in tables:
        rows = (
            Table(tables["routing_changes"])
            .words("component", "layer")
            .numbers("kl", "KL of the routers, nats", ends=("kl_low", "kl_high"))
        )
        rows = rows.numbers("top1_agreement", "same first expert", ends=("top1_agreement_low", "top1_agreement_high"))
        rows = rows.numbers("overlap", "same experts", ends=("overlap_low", "overlap_high"))
        rows = rows.numbers(
            "entropy_change", "change of entropy", ends=("entropy_change_low", "entropy_change_high"), sign=True, bold="entropy_change_q"
        )
        shown.append(Shown("How routing changed", rows.numbers("n", "texts").view(), terminal=True, table="routing_changes"))
    if "expert_changes" in tables:
        changes = tables["expert_changes"]
        rows = Table(strongest(changes, "weight_change", _SHOWN)).words("component", "expert").numbers("weight_change", "change of weights")
        rows = rows.numbers("router_change", "of the router's row").numbers("load_base", "load, base").numbers("load_tuned", "tuned")
        rows = rows.numbers("load_change", "change of load", ends=("load_change_low", "load_change_high"), sign=True, bold="load_change_q")
        said = f"The experts whose weights changed most, at most {_SHOWN} of {written(len(changes))}; bold: q < {Q_SIGNIFICANT}."
        shown.append(Shown("Which experts fine-tuning moved", rows.view(), said, table="expert_changes"))
    for _, whose, own in each_model(tables["routing"]) if "routing" in tables else []:
        rows = Table(own).words("component", "layer").numbers("entropy", "entropy, nats", ends=("entropy_low", "entropy_high"))
        rows = rows.numbers("uniform", "at most").numbers("experts", "experts").numbers("slots", "per token").words("router", "router")
        shown.append(Shown(f"Routers{whose}", rows.numbers("n", "texts").view(), terminal=True, table="routing"))
    for _, whose, own in each_model(tables["experts"]) if "experts" in tables else []:
        top = own.sort_values("load", ascending=False, kind="stable").head(_SHOWN)
        rows = Table(top).words("component", "expert").numbers("load", "load", ends=("load_low", "load_high"))
        rows = rows.numbers("gate_load", "by gate weight", ends=("gate_load_low", "gate_load_high")).numbers("n", "texts")
        said = f"The most loaded, at most {_SHOWN} of {written(len(own))} experts; 1 is an even share of the layer's tokens."
        shown.append(Shown(f"Experts{whose}", rows.view(), said, folded=True, table="experts"))
    return shown


def _findings(tables: Tables) -> list[Finding]:
    found = _changes(tables)
    for whose, own in by_model(tables["routing"]) if "routing" in tables else []:
        least, most = own.nsmallest(1, "entropy").iloc[0], own.nlargest(1, "entropy").iloc[0]
        found.append(
            Finding(
                f"The routers of {whose} are most decided at {label(least['component'])}, with an entropy of {estimated(least, 'entropy')} nats, and least at "
                f"{label(most['component'])}, with {estimated(most, 'entropy')}; one that does not tell experts apart has {written(most['uniform'])}",
                n=least["n"],
                rows=(least, most),
                effect=float(1 - least["entropy"] / least["uniform"]) if least["uniform"] > 0 else 0.0,
                table="routing",
            )
        )
    for whose, own in by_model(tables["experts"]) if "experts" in tables else []:
        top = own.nlargest(1, "load").iloc[0]
        here = (("model", "==", top["model"]),)
        unused, every = Derived("experts", (*here, ("unused", "==", True))), Derived("experts", here)
        found.append(
            Finding(
                f"The most loaded expert of {whose} is {label(top['component'])}, with {estimated(top, 'load')} times an even share of its layer's tokens; "
                f"{unused.written(tables)} of {every.written(tables)} experts get no token of these texts",
                n=top["n"],
                rows=(top,),
                derived=(unused, every),
                effect=float(top["load"]) - 1,
                card=Card(
                    f"{written(top['load'])} ×",
                    f"an even share of tokens comes to {label(top['component'])}",
                    f"the most loaded expert of {whose}",
                ),
                table="experts",
            )
        )
    return found


def _changes(tables: Tables) -> list[Finding]:
    """Say where routing changed most, and which expert's weights moved most."""
    found = list[Finding]()
    if "routing_changes" in tables:
        top = tables["routing_changes"].nlargest(1, "kl").iloc[0]
        found.append(
            Finding(
                f"Fine-tuning moved the router of {label(top['component'])} most: KL {estimated(top, 'kl')} nats, with the same first expert for "
                f"{estimated(top, 'top1_agreement', share=True)} of tokens",
                n=top["n"],
                rows=(top,),
                effect=float(top["kl"]),
                card=Card(
                    percent(top["top1_agreement"]),
                    "of tokens keep their first expert",
                    f"at {label(top['component'])}, where routing moved most",
                ),
                table="routing_changes",
            )
        )
    if "expert_changes" in tables and tables["expert_changes"]["weight_change"].notna().any():
        changes = tables["expert_changes"]
        top = changes.nlargest(1, "weight_change").iloc[0]
        surely, every = Derived("expert_changes", (("load_change_q", "<", Q_SIGNIFICANT),)), Derived("expert_changes")
        found.append(
            Finding(
                f"The load of {surely.written(tables)} of {every.written(tables)} experts changed (q < {Q_SIGNIFICANT}). The weights of "
                f"{label(top['component'])} moved most, by {written(top['weight_change'])} of their norm; its load changed by "
                f"{estimated(top, 'load_change', sign=True)} of an even share",
                n=top["n"],
                rows=(top,),
                derived=(surely, every),
                effect=float(top["weight_change"]),
                table="expert_changes",
            )
        )
    return found


def _caveats(tables: Tables) -> list[Caveat]:
    said = [
        Caveat("Loads are those of these texts: experts that get few tokens of them may get many of others."),
        Caveat(
            "A router's probabilities are its logits' only: what a family adds to them to choose experts (correction biases, limits to groups) shows in loads."
        ),
    ]
    if "expert_changes" in tables:
        said.append(Caveat("A change of load is not a change of the expert: what the router reads changes with every layer before it."))
    return [*few_texts(tables, "routing", "routing_changes"), *said]


SECTION = Section(
    id="routing",
    heading="Routing",
    intro=(
        "Each token is sent to a few experts of a layer. An expert's load is its share of the layer's routed tokens times the number of experts: 1 is an even "
        "share. A router's entropy is over all experts, before the best are chosen. Experts that every token passes (shared ones) are not routed to and "
        "not counted."
    ),
    tables=TABLES,
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="parts",
)
