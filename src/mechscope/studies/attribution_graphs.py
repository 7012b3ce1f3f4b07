"""Tables of an attribution graph: nodes, edges, logits, scores beside a control, its latents, and interventions that test it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mechscope.errors import SettingsError
from mechscope.studies.declared import read_mapping
from mechscope.studies.dictionaries import example_rows

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.data.pairs import Pairs
    from mechscope.features import Dictionary
    from mechscope.features.graphs import AttributionGraph, Pruned
    from mechscope.instrument import Execution
    from mechscope.subject import Subject

# a supernode: its name and its nodes
Groups = Sequence[tuple[str, Sequence[str]]]
# nodes of a graph: latents, errors, tokens, logits
_LATENT = re.compile(r"m\d+\.f\d+@\d+")
_NODE = re.compile(rf"{_LATENT.pattern}|m\d+\.error@\d+|embed@\d+|logits\.t\d+@\d+")


def read_groups(file: str, prompt: str) -> list[tuple[str, list[str]]]:
    """Read the groups that a page saved.

    Args:
        file: The JSON file: `{"prompt": …, "groups": [{"name": …, "nodes": [… "m3.f17@5"]}]}`.
        prompt: The prompt of this graph.

    Raises:
        SettingsError: It is no such file, belongs to no prompt or another, names what is no node, or a group without a latent.
    """
    held = read_mapping(file, "the groups")
    listed = held.get("groups")
    if not isinstance(listed, list) or not all(
        isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("nodes"), list) for each in listed
    ):
        raise SettingsError(
            f'{file} holds no groups: expected {{"groups": [{{"name": "capital", "nodes": ["m3.f17@5"]}}]}}, as the page saves them'
        )
    if "prompt" not in held:
        raise SettingsError(f'{file} does not say of which prompt its groups are: write "prompt" beside "groups", as the page saves them')
    if held["prompt"] != prompt:
        raise SettingsError(
            f"{file} was saved for the prompt {held['prompt']!r}, this graph is of {prompt!r}: nodes of one are none of the other's"
        )
    found = [(each["name"], [str(node) for node in each["nodes"]]) for each in listed]
    names = [name for name, _ in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"{file} has two groups {twice[0]!r}: give them different names")
    for name, nodes in found:
        for node in nodes:
            if not _NODE.fullmatch(node):
                raise SettingsError(f"{file} names {node!r} in group {name!r}, which is no node of a graph: write nodes as m3.f17@5")
        if not any(map(_LATENT.fullmatch, nodes)):
            raise SettingsError(f"{file} has a group {name!r} without a latent, and nothing else can be scaled: add one, such as m3.f17@5")
    return found


def nodes_table(graph: AttributionGraph, left: Pruned, subject: Subject) -> pd.DataFrame:
    """Return all nodes with their influence and whether they are in the pruned graph."""
    import numpy as np

    nodes = graph.nodes
    token = np.where(nodes["kind"] == "logit", nodes["index"], np.array(graph.ids)[nodes["position"]])
    table = nodes.drop(columns="index").assign(
        token=subject.spelling.tokens(token.tolist()), influence=left.influence, cumulative=left.cumulative, kept=left.nodes
    )
    first = ["node", "kind", "component", "layer", "position", "token"]
    return table[[*first, *(name for name in table if name not in first)]]


def edges_table(graph: AttributionGraph, left: Pruned) -> pd.DataFrame:
    """Return the edges of the pruned graph, those of most influence first."""
    import numpy as np
    import pandas as pd

    edges, names = left.edges.tocoo(), graph.nodes["node"].to_numpy()
    through = np.asarray(left.edge_influence.tocsr()[edges.row, edges.col]).ravel()
    inputs = np.asarray(abs(graph.edges).sum(axis=1)).ravel()
    table = pd.DataFrame(
        {
            "source": names[edges.col],
            "target": names[edges.row],
            "weight": edges.data.astype(np.float64),
            "share": np.abs(edges.data) / inputs[edges.row],
            "influence": through,
        }
    )
    return table.sort_values(["influence", "source", "target"], ascending=[False, True, True], kind="stable").reset_index(drop=True)


def logits_table(graph: AttributionGraph, subject: Subject) -> pd.DataFrame:
    """Return the logits, and what latents, errors, tokens and constants add to each: they sum to its value."""
    import numpy as np
    import pandas as pd

    at = graph.where("logit")
    own, edges = graph.nodes.iloc[at], graph.edges[at]
    parts = {
        f"of_{kind}s": np.asarray(edges[:, graph.where(kind)].sum(axis=1, dtype=np.float64)).ravel()
        for kind in ("latent", "error", "token")
    }
    return pd.DataFrame(
        {
            "node": own["node"].to_numpy(),
            "token": subject.spelling.tokens(own["index"].tolist()),
            "probability": own["probability"].to_numpy(),
            "value": own["value"].to_numpy(),
            **parts,
            "of_constants": own["bias"].to_numpy(),
            "of_others": own["rest"].to_numpy(),
        }
    )


def scores_row(graph: AttributionGraph, left: Pruned, prompt: str, control: str) -> dict[str, Any]:
    """Return how much of a graph latents explain, and its size."""
    from mechscope.features.graphs import scores

    found, kinds = scores(graph.edges, graph.weights, graph.nodes), graph.nodes["kind"]
    kept = {kind: int((left.nodes & (kinds == kind)).sum()) for kind in ("latent", "error")}
    return {
        "control": control,
        "prompt": prompt,
        "replacement": found.replacement,
        "completeness": found.completeness,
        "tokens": len(graph.ids),
        "latents": int((kinds == "latent").sum()),
        "active": graph.latents,
        "kept_latents": kept["latent"],
        "kept_errors": kept["error"],
        "kept_edges": int(left.edges.nnz),
        "without": ",".join(f"m{layer}" for layer in graph.without),
    }


def latents_of(graph: AttributionGraph, left: Pruned, dictionaries: Mapping[str, Dictionary]) -> dict[str, tuple[str, int]]:
    """Return the latents of the pruned graph by name: their dictionary and their number in it."""
    starts = {
        dictionary.layout.outputs[group.writes[0]].name: (name, start)
        for name, dictionary in dictionaries.items()
        for group, (start, _) in zip(dictionary.layout.groups, dictionary.layout.spans, strict=True)
    }
    own = graph.nodes[left.nodes & (graph.nodes["kind"] == "latent")]
    found = {}
    for component, index in zip(own["component"], own["index"], strict=True):
        name, start = starts[component.partition(".")[0]]
        found[component] = (name, start + int(index))
    return found


def details(
    subject: Subject,
    dictionaries: Mapping[str, Dictionary],
    latents: Mapping[str, tuple[str, int]],
    texts: Pairs | None,
    *,
    examples: int,
    execution: Execution,
) -> dict[str, pd.DataFrame]:
    """Return what is shown of latents: the tokens that they promote at all places they write, and the texts in which they are active most."""
    import pandas as pd

    from mechscope.features import promoted_tokens, top_examples

    listed, found = [], []
    for name, dictionary in dictionaries.items():
        own = {component: latent for component, (owner, latent) in latents.items() if owner == name}
        if not own:
            continue
        for component, (up, down) in zip(own, promoted_tokens(subject, dictionary, list(own.values())), strict=True):
            spelled = (subject.spelling.tokens(up), subject.spelling.tokens(down))
            listed.append({"component": component, "dictionary": name, "promotes": spelled[0], "suppresses": spelled[1]})
        if texts is not None:
            examples_of = top_examples(subject, dictionary, texts, count=examples, other_model=True, execution=execution)
            for component, latent in own.items():
                found += [{"component": component, **row} for row in example_rows(examples_of, latent, texts, subject.spelling)]
    tables = {"graph_latents": pd.DataFrame(listed)} if listed else {}
    return tables | ({"graph_examples": pd.DataFrame(found)} if found else {})


def interventions(
    graph: AttributionGraph, left: Pruned, groups: Groups, *, count: int, factor: float, execution: Execution
) -> dict[str, pd.DataFrame]:
    """Change latents in the model and set what happens beside what the graph predicts."""
    import numpy as np

    from mechscope.features.graphs.interventions import agreement, changes_of, tried

    changes = changes_of(graph, left.nodes, left.influence, count=count, factor=factor, groups=groups, seed=execution.seed)
    if not changes:
        return {}
    targets = np.flatnonzero(left.nodes & graph.nodes["kind"].isin(("latent", "logit")).to_numpy())
    table = tried(graph, changes, targets, execution=execution)
    if table.empty:
        return {}
    return {"graph_interventions": table, "graph_agreement": agreement(table, str(graph.nodes["node"][graph.where("logit")[0]]))}
