"""`mechscope features circuit`: which latents of dictionaries, and which errors, do a task, what they tell each other, and how much of it they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt

from mechscope.choices import Filling, MetricName, NodeMethod, NodeSource, Quadrature
from mechscope.data.splits import held_out
from mechscope.errors import SettingsError
from mechscope.settings import Count, Number, setting
from mechscope.studies.dictionary_files import DICTIONARIES, DictionaryFiles, autoencoders
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from mechscope.data.pairs import Pairs
    from mechscope.features import Node

# rows of tables that list more than the circuit: the largest
_NODES_LISTED, _EDGES_LISTED = 200, 2000


@dataclass(frozen=True, kw_only=True)
class FeaturesCircuitSettings(OneModel, DictionaryFiles, Texts):
    """How effects are estimated, and what belongs to the circuit."""

    panel: ClassVar[str] = "Circuit of latents"

    source: NodeSource | None = setting(
        None,
        "What a latent or an error becomes: its value on the corrupt text of the pair, or zero; by default corrupt where the texts have one.",
    )
    metric: MetricName | None = setting(None, "Metric; by default logit-diff where the texts have right and wrong answers, else loss.")
    method: NodeMethod = setting("integrated-gradients", "Gradients where the run is, or their mean on the way to what a node becomes.")
    points: Number = setting(10, "Points of integrated gradients.")
    quadrature: Quadrature = setting("gauss", "Where they lie.")
    node_threshold: Annotated[float, Ge(0)] = setting(
        0.1, "Effect from which a latent or an error belongs to the circuit, in the metric's units."
    )
    nodes: Number = setting(50, "Latents and errors of the circuit at most: the largest.")
    edge_threshold: Annotated[float, Ge(0)] = setting(0.01, "Effect from which an edge between them does.")
    check: Count = setting(10, "Of the circuit's nodes the largest so many are also patched exactly.")
    filling: Filling | None = setting(
        None, "What stands in the place of what is left out of a circuit: corrupt, zero or mean; by default the source."
    )
    draws: Count = setting(5, "Circuits of random latents, as many at every place: the control.")
    test_share: Annotated[float, Gt(0), Lt(1)] = setting(
        0.5, "Share of the texts that circuits are judged on and not found on; of one text none."
    )


def _source(run: JobRun[FeaturesCircuitSettings]) -> NodeSource:
    return run.settings.source or ("corrupt" if any(pair.changed for pair in run[TEXTS]) else "zero")


def _metric(run: JobRun[FeaturesCircuitSettings]) -> MetricName:
    return run.settings.metric or ("logit-diff" if all(pair.answers and pair.wrong_answers for pair in run[TEXTS]) else "loss")


def _split(run: JobRun[FeaturesCircuitSettings]) -> tuple[Pairs, Pairs, bool]:
    """Return the texts that the circuit is found on, those that it is judged on, and whether these are others."""
    texts = run[TEXTS]
    if len({pair.clean for pair in texts}) < 2:
        return texts, texts, False
    return *held_out(texts, run.settings.test_share, run.settings.seed), True


def _check(run: JobRun[FeaturesCircuitSettings]) -> None:
    from mechscope.features.node_effects import check_options

    settings, texts = run.settings, run[TEXTS]
    autoencoders(run)
    check_options(settings.method, settings.points, _source(run), _metric(run))
    check_pairs(run.first, texts, metric=_metric(run))
    if "corrupt" in (settings.source, settings.filling) and not any(pair.changed for pair in texts):
        raise SettingsError("source and filling 'corrupt' need texts with a corrupt version, and these have none: use zero")


def _options(run: JobRun[FeaturesCircuitSettings]) -> dict[str, Any]:
    settings = run.settings
    return {
        "method": settings.method,
        "points": settings.points,
        "quadrature": settings.quadrature,
        "source": _source(run),
        "metric": _metric(run),
        "execution": run.execution,
    }


def _nodes(run: JobRun[FeaturesCircuitSettings]) -> Tables:
    """Estimate what every latent and error does, and see how well: by exact patching of the largest, and of whole places."""
    import numpy as np
    import torch

    from mechscope.features import node_effects, patch_nodes, patch_places

    settings, standing, (found_on, _, _) = run.settings, autoencoders(run), _split(run)
    effects = node_effects(run.first, standing, found_on, **_options(run))
    chosen = effects.largest(settings.node_threshold, settings.nodes)
    listed = effects.largest(0.0, max(settings.nodes, _NODES_LISTED))
    table = effects.table.set_index("component", drop=False).loc[[node.name for node in listed]].reset_index(drop=True)
    table["in_circuit"] = [number < len(chosen) for number in range(len(table))]
    table["exact"] = np.nan
    patching: dict[str, Any] = {"filling": _source(run), "metric": _metric(run), "execution": run.execution}
    if checked := chosen[: settings.check]:
        exact = patch_nodes(run.first, standing, found_on, checked, **patching)
        table.loc[: len(checked) - 1, "exact"] = exact.mean(1)
    whole = patch_places(run.first, standing, found_on, **patching)
    active = {place.name: torch.from_numpy(np.unique(matrix.indices).astype(np.int64)) for place, matrix in effects.latents.items()}
    run.stage.write_tensors("active", active)
    places = {
        place.name: (truth, np.asarray(matrix.sum(1)).ravel(), effects.errors[place], len(active[place.name]))
        for (place, matrix), truth in zip(effects.latents.items(), whole, strict=True)
    }
    return {"feature_nodes": table, "feature_places": _places_table(places, _metric(run))}


def _places_table(places: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, int]], metric: str) -> pd.DataFrame:
    """Compare for every place what replacing it does with what the effects of its nodes add up to."""
    import pandas as pd

    from mechscope.stats.inference import estimate
    from mechscope.stats.skewness import ThirdMoments

    rows = []
    for place, (whole, latents, error, active) in places.items():
        row: dict[str, Any] = {"place": place, "active": active, "metric": metric, "n": len(whole)}
        for name, values in (("whole", whole), ("latents", latents), ("error", error), ("missed", whole - latents - error)):
            moments = ThirdMoments()
            moments.update_many(values)
            mean = estimate(moments)
            row |= {name: float(mean.mean), f"{name}_low": float(mean.low), f"{name}_high": float(mean.high)}
        rows.append(row)
    return pd.DataFrame(rows)


def _circuit(run: JobRun[FeaturesCircuitSettings]) -> list[Node]:
    """Return the nodes of the circuit, the largest first."""
    from mechscope.features import Node

    table = run.table("feature_nodes")
    return [Node.parse(name) for name in table.loc[table["in_circuit"].astype(bool), "component"]]


def _edges(run: JobRun[FeaturesCircuitSettings]) -> Tables:
    from mechscope.features import node_edges

    nodes = _circuit(run)
    if not nodes:
        return {}
    table = node_edges(run.first, autoencoders(run), _split(run)[0], nodes, **_options(run))
    table = table.iloc[(-table["effect"].abs()).argsort(kind="stable")].head(_EDGES_LISTED).reset_index(drop=True)
    return {"feature_edges": table.assign(in_circuit=table["effect"].abs() >= run.settings.edge_threshold)}


def _judged(run: JobRun[FeaturesCircuitSettings]) -> Tables:
    from mechscope.features import Place, faithfulness, node_means

    settings, standing, (found_on, judged_on, others) = run.settings, autoencoders(run), _split(run)
    filling = settings.filling or _source(run)
    means = node_means(run.first, standing, found_on, execution=run.execution) if filling == "mean" else None
    active = {Place.parse(name): latents.tolist() for name, latents in run.folder.tensors("active")[0].items()}
    table = faithfulness(
        run.first,
        standing,
        judged_on,
        _circuit(run),
        active=active,
        draws=settings.draws,
        filling=filling,
        means=means,
        metric=_metric(run),
        execution=run.execution,
    )
    return {"feature_faithfulness": table.assign(filling=filling, held_out=others)}


_FOUND_BY = ("source", "metric", "method", "points", "quadrature", "test_share", "seed")
_INPUTS = (MODELS, TEXTS, DICTIONARIES)
NODES = Stage(name="nodes", work=_nodes, hangs_on=(*_FOUND_BY, "node_threshold", "nodes", "check"), inputs=_INPUTS)
EDGES = Stage(name="edges", work=_edges, hangs_on=(*_FOUND_BY, "edge_threshold"), inputs=_INPUTS, after=(NODES,))
FAITHFULNESS = Stage(name="faithfulness", work=_judged, hangs_on=(*_FOUND_BY, "filling", "draws"), inputs=_INPUTS, after=(NODES,))


def _title(names: Mapping[str, str]) -> str:
    return f"A circuit of latents in {names['model']}"


JOB = Job(
    name="features-circuit",
    help="Sparse feature circuits: which latents do a task, what they tell each other, and how much of it they keep (Marks et al. 2024).",
    panel="features",
    group="features",
    example="mechscope features circuit gpt2 --dictionary runs/features/dictionaries/resid6-4096.safetensors --pairs ioi --out runs/latents-ioi",
    settings=FeaturesCircuitSettings,
    arguments=("model",),
    inputs=_INPUTS,
    stages=(NODES, EDGES, FAITHFULNESS),
    sections=("feature-circuit",),
    title=_title,
    check=_check,
)
