"""Routing of mixtures of experts: how a router shares tokens out among its experts, and what fine-tuning did to that.

Load is what balance losses balance (Fedus et al. 2022, "Switch Transformers"): an expert's share of a layer's routed tokens times the number of experts, 1 for
a router that sends each expert as many. A router's entropy is over all experts, before the best are chosen: ln(experts) where it does not tell them apart.
Between two models, on the same tokens: the KL divergence of their routers and whether tokens go to the same experts; and per expert, how far its own weights
and its row of the router moved, beside the change of its load: an expert may get other tokens without having changed, as what the router reads has changed.

The unit is the text: what is measured at tokens is averaged within a text first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, check_fits
from mechscope.errors import ModelError
from mechscope.instrument.attention import observed
from mechscope.instrument.execution import Execution
from mechscope.instrument.routers import Routed, Router, Routers
from mechscope.instrument.walk import run_backbone
from mechscope.shapes import by_shape
from mechscope.stats.inference import Estimate, benjamini_hochberg, estimate
from mechscope.stats.skewness import ThirdMoments
from mechscope.subject import Pair, Subject
from mechscope.subject.placement import sent

_ENDS = {"se": "standard_error", "low": "low", "high": "high"}
_TESTED = {**_ENDS, "p": "p"}
_NAMES = ("entropy", "load", "gate_load")


@dataclass(frozen=True)
class Routing:
    """How one model routes texts.

    Attributes:
        layers: One row per layer that has experts: `layer`, `component` (`m3`), `router` (softmax or sigmoid), `experts`, `slots` (experts per token), `n`
            (texts), `entropy` of the router (nats) with `_se`, `_low`, `_high`, `uniform` (ln of the number of experts, the largest entropy).
        experts: One row per expert: `layer`, `expert`, `component` (`m3.e5`), `n`, `load` (share of the layer's routed tokens times the number of
            experts) and `gate_load` (the same of gate weights), each with `_se`, `_low`, `_high`; `unused`: whether no token of these texts came to it.
    """

    layers: pd.DataFrame
    experts: pd.DataFrame

    __repr__ = by_shape


@dataclass(frozen=True)
class RoutingChange:
    """How two models route the same texts.

    Attributes:
        base: How the base model does.
        tuned: How the tuned model does.
        layers: One row per layer that has experts: `layer`, `component`, `n`, `kl` (of the tuned router from the base's, nats), `top1_agreement` (share of
            tokens whose expert with the largest gate weight is the same) and `overlap` (share of the base's experts of a token that the tuned model chose
            too), each with `_se`, `_low`, `_high`; `entropy_change` (tuned − base) with these, `_p` and `_q` (over all layers).
        experts: One row per expert: `layer`, `expert`, `component`, `n`, `load_base`, `load_tuned`, `load_change` with `_se`, `_low`, `_high`, `_p`, `_q`
            (over all experts); `weight_change` (of the expert's own weights) and `router_change` (of its row of the router), Frobenius norms relative to
            the base's.
    """

    base: Routing
    tuned: Routing
    layers: pd.DataFrame
    experts: pd.DataFrame

    __repr__ = by_shape


def routing(subject: Subject, texts: Pairs, *, execution: Execution = Execution()) -> Routing:
    """Measure how a model's routers share tokens out.

    Args:
        subject: The model.
        texts: The clean one of each pair is read.
        execution: Tokens of a batch (2,048 by default), progress.

    Raises:
        DataError: A text does not fit the model.
        ModelError: The model has no experts, or a router cannot be read.
    """
    check_fits(subject, texts)
    routers = Routers(subject)
    per_text = PerText(texts)
    per_text.run(lambda batch: _of_texts(_routed(routers, batch), batch.real), execution, tokens=2048, label="routing")
    return _tables(routers, {name: per_text[name] for name in _NAMES})


def routing_change(pair: Pair, texts: Pairs, *, execution: Execution = Execution()) -> RoutingChange:
    """Measure how two models' routers share out the same tokens, and which experts fine-tuning moved.

    Args:
        pair: The base and the tuned model.
        texts: The clean one of each pair is read.
        execution: Tokens of a batch (2,048 by default), progress.

    Raises:
        DataError: A text does not fit a model.
        ModelError: The models have no experts, or a router that cannot be read.
    """
    routers = Routers(pair.base), Routers(pair.tuned)
    for subject in (pair.base, pair.tuned):
        check_fits(subject, texts)
    per_text = PerText(texts)

    def both(batch: PairBatch) -> dict[str, np.ndarray]:
        base, tuned = (_routed(side, batch) for side in routers)
        own = [
            {f"{name}_{label}": values for name, values in _of_texts(side, batch.real).items()}
            for label, side in (("base", base), ("tuned", tuned))
        ]
        return {**own[0], **own[1], **_compared(base, tuned, batch.real)}

    per_text.run(both, execution, tokens=2048, label="routing")
    values = {label: {name: per_text[f"{name}_{label}"] for name in _NAMES} for label in ("base", "tuned")}
    base, tuned = (_tables(side, values[label]) for side, label in zip(routers, ("base", "tuned"), strict=True))
    layers = base.layers[["layer", "component", "n"]]
    for name in ("kl", "top1_agreement", "overlap"):
        layers = layers.assign(**_columns(name, _estimated(per_text[name])))
    layers = layers.assign(**_columns("entropy_change", _estimated(values["tuned"]["entropy"] - values["base"]["entropy"]), tested=True))
    change = _estimated(values["tuned"]["load"] - values["base"]["load"])
    experts = base.experts[["layer", "expert", "component", "n"]].assign(load_base=base.experts["load"], load_tuned=tuned.experts["load"])
    experts = experts.assign(**_columns("load_change", change, tested=True), **_weight_changes(pair, routers[0].layers))
    return RoutingChange(base, tuned, layers, experts)


@torch.no_grad()
def _routed(routers: Routers, batch: PairBatch) -> dict[int, Routed]:
    with observed(routers.subject), routers.watched() as routed:
        run_backbone(routers.subject, batch.clean, batch.real)
    return routed


def _of_texts(routed: Mapping[int, Routed], real: Bool[Tensor, "batch token"]) -> dict[str, np.ndarray]:
    """Return of each text the entropy of every layer and the loads of every expert, layer after layer."""
    entropies, loads, gates = [], [], []
    for layer in sorted(routed):
        own = routed[layer]
        entropies.append(_mean(-(own.log_probability.exp() * own.log_probability).nan_to_num(0.0).sum(-1), real))
        of_tokens = _by_expert(own, torch.ones_like(own.weights, dtype=torch.float64) / own.chosen.shape[-1])
        weights = _by_expert(own, own.weights.double())
        number = of_tokens.shape[-1]
        loads.append(number * _mean(of_tokens, real))
        gate = _mean(weights, real)
        gates.append(number * gate / gate.sum(-1, keepdim=True))
    return {
        "entropy": torch.stack([entropy.cpu() for entropy in entropies]).numpy(),
        "load": torch.cat([load.T.cpu() for load in loads]).numpy(),
        "gate_load": torch.cat([gate.T.cpu() for gate in gates]).numpy(),
    }


def _by_expert(routed: Routed, values: Float[Tensor, "batch token slot"]) -> Float[Tensor, "batch token expert"]:
    return torch.zeros_like(routed.log_probability).scatter_add_(-1, routed.chosen.long(), values)


def _mean(values: Float[Tensor, "batch token ..."], real: Bool[Tensor, "batch token"]) -> Float[Tensor, "batch ..."]:
    """Average over the real tokens of each text."""
    where = sent(real, values.device)
    kept = values.masked_fill(~where.view(*where.shape, *[1] * (values.ndim - 2)), 0.0)
    return kept.sum(1) / where.sum(1).view(-1, *[1] * (values.ndim - 2))


def _compared(base: Mapping[int, Routed], tuned: Mapping[int, Routed], real: Bool[Tensor, "batch token"]) -> dict[str, np.ndarray]:
    """Return of each text and layer how the two models' routers agree."""
    rows: dict[str, list[Tensor]] = {"kl": [], "top1_agreement": [], "overlap": []}
    for layer in sorted(base):
        one, two = base[layer], tuned[layer]
        log_p, log_q = one.log_probability, sent(two.log_probability, one.log_probability.device)
        chosen, others = one.chosen, sent(two.chosen, one.chosen.device)
        first, second = (_largest(side).to(chosen.device) for side in (one, two))
        rows["kl"].append(_mean((log_p.exp() * (log_p - log_q)).nan_to_num(0.0).sum(-1), real))
        rows["top1_agreement"].append(_mean((first == second).double(), real))
        rows["overlap"].append(_mean((chosen[..., None] == others[..., None, :]).any(-1).double().mean(-1), real))
    return {name: torch.stack([row.cpu() for row in each]).numpy() for name, each in rows.items()}


def _largest(routed: Routed) -> Tensor:
    """Return the expert with the largest gate weight of each token."""
    return routed.chosen.gather(-1, routed.weights.argmax(-1, keepdim=True))[..., 0]


def _estimated(values: Float[np.ndarray, "row text"]) -> Estimate:
    moments = ThirdMoments(values.shape[:1])
    moments.update_many(values.T)
    return estimate(moments)


def _columns(name: str, means: Estimate, *, tested: bool = False) -> dict[str, np.ndarray]:
    columns = {name: means.mean, **{f"{name}_{end}": getattr(means, whole) for end, whole in (_TESTED if tested else _ENDS).items()}}
    return {**columns, f"{name}_q": benjamini_hochberg(means.p)} if tested else columns


def _tables(routers: Routers, values: Mapping[str, Float[np.ndarray, "row text"]]) -> Routing:
    means = {name: _estimated(each) for name, each in values.items()}
    own = sorted(routers.layers.items())
    layers = pd.DataFrame(
        {
            "layer": [layer for layer, _ in own],
            "component": [f"m{layer}" for layer, _ in own],
            "router": [router.kind for _, router in own],
            "experts": [router.experts.number for _, router in own],
            "slots": [router.slots for _, router in own],
            "n": means["entropy"].n.astype(int),
            **_columns("entropy", means["entropy"]),
            "uniform": [float(np.log(router.experts.number)) for _, router in own],
        }
    )
    named = [(layer, expert) for layer, router in own for expert in range(router.experts.number)]
    experts = pd.DataFrame(
        {
            "layer": [layer for layer, _ in named],
            "expert": [expert for _, expert in named],
            "component": [f"m{layer}.e{expert}" for layer, expert in named],
            "n": means["load"].n.astype(int),
            **_columns("load", means["load"]),
            **_columns("gate_load", means["gate_load"]),
            "unused": (values["load"] == 0).all(1),
        }
    )
    return Routing(layers, experts)


def _weight_changes(pair: Pair, routers: Mapping[int, Router]) -> dict[str, np.ndarray]:
    """Return how far every expert's own weights and its row of the router moved, relative to the base's norm."""
    prefixes = tuple(f"{name}." for router in routers.values() for name in (router.experts.name, router.name))
    base, tuned = ({name: value for name, value in subject.weights() if name.startswith(prefixes)} for subject in (pair.base, pair.tuned))
    if others := sorted(base.keys() ^ tuned.keys()):
        raise ModelError(f"the experts of base and tuned do not have the same parameters: {', '.join(others[:3])}")

    def moved(prefix: str, number: int) -> Float[np.ndarray, " expert"]:
        squares = np.zeros((2, number))
        for name in (name for name, value in base.items() if name.startswith(prefix) and value.ndim and len(value) == number):
            own = base[name].double().flatten(1) if base[name].ndim > 1 else base[name].double()[:, None]
            other = sent(tuned[name], own.device).double().reshape(own.shape)
            squares += torch.stack([(other - own).square().sum(1), own.square().sum(1)]).cpu().numpy()
        return np.sqrt(np.divide(squares[0], squares[1], out=np.full(number, np.nan), where=squares[1] > 0))

    own = [routers[layer] for layer in sorted(routers)]
    return {
        "weight_change": np.concatenate([moved(f"{router.experts.name}.", router.experts.number) for router in own]),
        "router_change": np.concatenate([moved(f"{router.name}.", router.experts.number) for router in own]),
    }
