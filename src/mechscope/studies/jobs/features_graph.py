"""`mechscope features graph`: the attribution graph of a prompt, through transcoders: which latents lead to its likeliest next tokens, tested in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mechscope.errors import DataError, SettingsError
from mechscope.settings import Count, Number, nested, setting
from mechscope.settings.graph import GraphSettings, PruningSettings
from mechscope.studies.dictionary_files import DICTIONARIES, DictionaryFiles
from mechscope.studies.groups import MaybeCorpus, OneModel
from mechscope.studies.inputs import DOCUMENTS, MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.features import Dictionary
    from mechscope.features.graphs import AttributionGraph, Pruned


@dataclass(frozen=True, kw_only=True)
class FeaturesGraphSettings(OneModel, DictionaryFiles, MaybeCorpus):
    """Which prompt, through which dictionaries, and how it is tested."""

    panel: ClassVar[str] = "Graph"

    prompt: str = setting(..., "The prompt whose next token is explained.")
    groups: str | None = setting(
        None, "Supernodes: a file that the page of this prompt's graph saved; they are drawn, and changed in the model."
    )
    interventions: Count = setting(
        20, "Latents of most influence that are changed in the model, and as many others at random; 0 for groups alone."
    )
    factor: float = setting(0.0, "What a changed latent writes is multiplied by this: 0 ablates.")
    control: bool = setting(True, "Also make the graph of the same latents with their decoders shuffled.")
    examples: Number = setting(5, "Texts of --data that are shown of a latent, where it is active most.")
    data: str | None = setting(
        None, "Documents in which latents are looked up, for what they stand for: a file, a hub data set, or newsroom."
    )
    graph: GraphSettings = nested(GraphSettings)
    pruning: PruningSettings = nested(PruningSettings)


def _ids(run: JobRun[FeaturesGraphSettings]) -> tuple[int, ...]:
    tokenizer = run.first.tokenizer
    if tokenizer is None:
        raise DataError(f"model {run.first.source!r} has no tokenizer, which a prompt needs: load it with one")
    ids = tuple(map(int, tokenizer(run.settings.prompt)["input_ids"]))
    if not run.settings.graph.first < len(ids) <= run.first.anatomy.max_positions:
        raise SettingsError(
            f"the prompt has {len(ids)} tokens: more than the {run.settings.graph.first} at the beginning at which MLPs count as constants are needed, and "
            f"{run.first.source!r} reads {run.first.anatomy.max_positions:,} at most"
        )
    return ids


def _groups(run: JobRun[FeaturesGraphSettings]) -> list[tuple[str, list[str]]]:
    from mechscope.studies.attribution_graphs import read_groups

    return [] if run.settings.groups is None else read_groups(run.settings.groups, run.settings.prompt)


GROUPS: Input[list[tuple[str, list[str]]]] = Input("groups", _groups, lambda groups: groups)
"""Supernodes."""


def _through(run: JobRun[FeaturesGraphSettings], dictionaries: Mapping[str, Dictionary]) -> tuple[AttributionGraph, Pruned]:
    from mechscope.features.graphs import attribution_graph, pruned

    settings = run.settings
    graph = attribution_graph(
        run.first, dictionaries, _ids(run), settings=settings.graph, other_model=settings.other_model, execution=run.execution
    )
    shares = {"node_share": settings.pruning.node_share, "edge_share": settings.pruning.edge_share}
    return graph, pruned(graph.edges, graph.weights, graph.nodes, **shares)


def _made(run: JobRun[FeaturesGraphSettings]) -> tuple[AttributionGraph, Pruned]:
    dictionaries = run[DICTIONARIES]
    return _through(run, dictionaries)


MADE: Input[tuple[AttributionGraph, Pruned]] = Input("graph", _made, lambda made: None)
"""The graph and what is left of it, which the stages share; other inputs decide it."""


def _check(run: JobRun[FeaturesGraphSettings]) -> None:
    from mechscope.features.graphs.replacement import checked, require_apart

    _ids(run)
    dictionaries = run[DICTIONARIES]
    for name, dictionary in dictionaries.items():
        checked(dictionary, name, run.first, other_model=run.settings.other_model)
    require_apart(dictionaries)


def _graph(run: JobRun[FeaturesGraphSettings]) -> Tables:
    import numpy as np
    import pandas as pd
    import torch

    from mechscope.features.graphs import shuffled
    from mechscope.studies.attribution_graphs import edges_table, logits_table, nodes_table, scores_row

    graph, left = run[MADE]
    rows = [scores_row(graph, left, run.settings.prompt, "")]
    dictionaries = run[DICTIONARIES]
    if run.settings.control and dictionaries:
        others = {name: shuffled(each, seed=run.settings.seed) for name, each in dictionaries.items()}
        rows.append(scores_row(*_through(run, others), run.settings.prompt, "shuffled decoders"))
    edges = graph.edges.tocsr()
    parts = {"starts": edges.indptr.astype(np.int64), "sources": edges.indices.astype(np.int64), "weights": edges.data}
    run.stage.write_tensors(
        "graph",
        {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()},
        meta={"nodes": graph.nodes["node"].tolist()},
    )
    return {
        "graph_scores": pd.DataFrame(rows),
        "graph_logits": logits_table(graph, run.first),
        "graph_nodes": nodes_table(graph, left, run.first),
        "graph_edges": edges_table(graph, left),
    }


def _details(run: JobRun[FeaturesGraphSettings]) -> Tables:
    from mechscope.studies.attribution_graphs import details, latents_of

    graph, left = run[MADE]
    dictionaries = {name: each.to(run.first.device) for name, each in run[DICTIONARIES].items()}
    documents = run[DOCUMENTS]
    return details(
        run.first,
        dictionaries,
        latents_of(graph, left, dictionaries),
        None if documents is None else documents.pairs,
        examples=run.settings.examples,
        execution=run.execution,
    )


def _interventions(run: JobRun[FeaturesGraphSettings]) -> Tables:
    import pandas as pd

    from mechscope.studies.attribution_graphs import interventions

    graph, left = run[MADE]
    groups, settings = run[GROUPS], run.settings
    tables = interventions(graph, left, groups, count=settings.interventions, factor=settings.factor, execution=run.execution)
    grouped = [{"group": name, "node": node} for name, nodes in groups for node in nodes]
    return {**tables, **({"graph_groups": pd.DataFrame(grouped)} if grouped else {})}


def _export(run: JobRun[FeaturesGraphSettings]) -> None:
    from mechscope.features.formats.circuit_tracer_graph import write_circuit_tracer_graph

    graph, left = run[MADE]
    folder, spelling = run.folder.path / "circuit_tracer", run.first.spelling
    dictionaries, groups = run[DICTIONARIES], run[GROUPS]
    write_circuit_tracer_graph(
        graph,
        left,
        folder,
        slug="graph",
        prompt=run.settings.prompt,
        tokens=spelling.tokens(graph.ids),
        likeliest=spelling.tokens(graph.nodes["index"][graph.where("logit")].tolist()),
        scan=",".join(dictionaries),
        node_share=run.settings.pruning.node_share,
        groups=groups,
    )
    run.stage.add(folder)


_WHAT = ("prompt", "graph", "other_model")
GRAPH = Stage(name="graph", work=_graph, hangs_on=(*_WHAT, "pruning", "control", "seed"), inputs=(MODELS, DICTIONARIES), alone=True)
LATENTS = Stage(
    name="latents", work=_details, hangs_on=(*_WHAT, "pruning", "examples"), inputs=(MODELS, DICTIONARIES, DOCUMENTS), alone=True
)
INTERVENTIONS = Stage(
    name="interventions",
    work=_interventions,
    hangs_on=(*_WHAT, "pruning", "interventions", "factor", "seed"),
    inputs=(MODELS, DICTIONARIES, GROUPS),
    alone=True,
)
EXPORT = Stage(name="export", work=_export, hangs_on=(*_WHAT, "pruning"), inputs=(MODELS, DICTIONARIES, GROUPS), alone=True)


def _title(names: Mapping[str, str]) -> str:
    return f"An attribution graph of {names['model']}"


JOB = Job(
    name="features-graph",
    help="Make the attribution graph of a prompt through transcoders: which latents lead to its likeliest next tokens, tested by changing them in the model.",
    panel="features",
    group="features",
    example='mechscope features graph gpt2 --prompt "The capital of France is" --dictionary runs/transcoders/dictionaries --out runs/graph',
    settings=FeaturesGraphSettings,
    arguments=("model",),
    inputs=(MODELS, DICTIONARIES, DOCUMENTS, GROUPS),
    stages=(GRAPH, LATENTS, INTERVENTIONS, EXPORT),
    sections=("graph",),
    title=_title,
    check=_check,
)
