"""What a run folder holds, as the report reads it: tables, settings and manifest, nothing else.

A study may have been a difference only, a bake-off only, or both; an absent (or empty) table is None and its section is left out. A table that
is there but lacks a column is refused by name, since a page with silent gaps would be worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechscope.errors import RunError
from mechscope.store.run import RunFolder
from mechscope.store.tables import read_table

REQUIRED: dict[str, tuple[str, ...]] = {
    "heads": (
        *("rows", "layer", "head", "component", "n", "entropy_base", "entropy_tuned", "entropy_change", "entropy_change_low"),
        *("entropy_change_high", "entropy_change_q", "kl_base_tuned", "kl_base_tuned_se", "kl_tuned_base"),
        *("distance_base", "distance_tuned", "sink_base", "sink_tuned", "z_cosine_distance", "weight_change"),
    ),
    "layers": (
        *("rows", "layer", "n", "kl_base_tuned", "kl_tuned_base", "entropy_change", "share_focused", "activation_norm_base"),
        *("activation_norm_tuned", "activation_abs_base", "activation_abs_tuned", "cosine_distance", "cka", "rsa", "weight_change"),
    ),
    "weights": (
        "name",
        "layer",
        "kind",
        "rows",
        "columns",
        "change",
        "relative_change",
        "effective_rank",
        "stable_rank",
        "sv1",
        "intruders",
    ),
    "outputs": (
        *(
            "rows",
            "n",
            "kl_base_tuned",
            "kl_base_tuned_low",
            "kl_base_tuned_high",
            "kl_tuned_base",
            "kl_tuned_base_low",
            "kl_tuned_base_high",
        ),
        *("loss_base", "loss_tuned", "loss_change", "loss_change_low", "loss_change_high", "loss_change_p"),
    ),
    "pairs": ("pair", "rows", "layer", "n", "kl_base_tuned"),
    "rouge": ("model", "metric", "mean", "low", "high", "n"),
    "selection": ("rule", "component", "kind", "layer", "head", "rank", "score", "chosen", "frequency", "n_resamples"),
    "cross_model": ("component", "site", "layer", "head", "n", "by", "into", "effect", "low", "high", "normalised", "normalised_low"),
    "ablation": ("component", "kind", "effect", "low", "high", "p_random"),
    "effects": (*("component", "site", "layer", "head", "positions", "metric", "n", "value", "effect", "se", "low", "high", "p", "q"),),
    "layer_sets": ("component", "selected", "share", "n"),
    "importance": ("level", "by", "into", "rho", "low", "high", "p", "n"),
    "bakeoff": (
        *("protocol", "strategy", "seed", "components", "rank", "trainable_parameters", "trainable_share", "best_loss", "best_step"),
        *("tokens_to_best", "steps_to_standard_best", "rouge1", "rougeL"),
    ),
    "bakeoff_summary": (
        *("protocol", "strategy", "metric", "mean", "low", "high", "n_seeds", "n_documents"),
        *("vs_standard", "vs_standard_low", "vs_standard_high", "vs_random", "vs_random_low", "vs_random_high"),
    ),
    "learning_curves": ("protocol", "strategy", "seed", "step", "tokens", "validation_loss"),
    "summaries": ("id", "document", "reference"),
    "claims": ("claim", "statement", "paper", "measured", "value", "low", "high", "verdict", "note"),
    "circuit_edges": ("model", "edge", "sender", "receiver", "score", "in_circuit"),
    "circuit_nodes": ("model", "node", "score"),
    "circuit_curve": ("model", "fraction", "edges", "faithfulness", "low", "high", "random", "random_low", "random_high"),
    "circuit_summary": ("model", "measure", "value", "low", "high", "random", "random_low", "random_high"),
    "circuit_components": ("model", "component", "score", "attends_to", "top_tokens"),
    "circuit_overlap": ("what", "fraction", "jaccard", "null", "null_low", "null_high", "self_base", "self_tuned"),
    "circuit_shift": (
        *("edge", "sender", "receiver", "sender_layer", "receiver_layer", "base", "tuned", "shift", "low", "high", "q"),
        *("in_base", "in_tuned"),
    ),
    "circuit_gain": ("edges", "fraction", "kind", "share", "low", "high"),
    "circuit_time": ("model", "order", "faithfulness", "edges", "jaccard_base", "jaccard_previous"),
    "lens_tokens": ("text", "position", "token"),
    "lens_grid": ("model", "lens", "text", "component", "layer", "position", "probability", "entropy", "kl", "rank"),
    "lens_summary": ("model", "lens", "site", "layer", "head", "component", "n", "log_probability", "kl"),
    "lens_change": ("site", "layer", "head", "component", "log_probability_change", "log_probability_change_q"),
    "logit_attribution": ("model", "component", "kind", "layer", "head", "effect"),
    "logit_attribution_change": ("component", "base", "tuned", "change", "q"),
    "head_roles": ("model", "role", "layer", "head", "component", "score"),
    "role_definitions": ("role", "definition"),
    "head_role_changes": ("role", "layer", "head", "component", "base", "tuned", "change", "low", "high", "q"),
    "attention_tokens": ("text", "position", "token"),
    "attention_edges": ("model", "text", "component", "query", "key", "weight"),
    "weight_heads": ("model", "layer", "head", "component"),
    "weight_tokens": ("model", "matrix", "component", "source", "target", "value"),
    "weight_singular": ("model", "matrix", "component", "index", "value", "side", "tokens"),
    "composition": ("model", "kind", "source", "target", "score", "z"),
    "weight_changes": ("layer", "head", "component"),
    "neurons": ("model", "layer", "component"),
    "neuron_changes": ("layer", "component", "mean_base", "mean_tuned", "mean_change", "rank"),
    "head_cards": ("model", "component", "attends_to", "top_tokens"),
    "neuron_contexts": ("model", "component", "activation", "token", "context"),
}
"""Tables that the page shows and the columns it needs of each."""


@dataclass(frozen=True)
class Contents:
    """The readable part of a run folder.

    Attributes:
        path: The folder.
        tables: Every table of `REQUIRED` that is there and has rows.
        settings: The resolved settings (`study.yaml`).
        manifest: What the result depends on (`manifest.json`).
    """

    path: Path
    tables: Mapping[str, pd.DataFrame]
    settings: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Contents:
        """Read the run folder at `path`.

        Raises:
            RunError: there is no run folder, it holds no table yet, or a table is damaged or lacks a column.
        """
        run = RunFolder.read(path)
        folder = run.path
        tables = {}
        for name, columns in REQUIRED.items():
            file = folder / "tables" / f"{name}.parquet"
            if not file.exists():
                continue
            table = read_table(file)
            missing = [column for column in columns if column not in table]
            if missing:
                raise RunError(f"{file} lacks {', '.join(missing)}: it was not written by this version of mechscope; run the study again")
            if len(table):
                tables[name] = table.reset_index(drop=True)
        if not tables:
            raise RunError(
                f"{folder} holds no table to report on: run `mechscope diff`, `mechscope circuit` or `mechscope study` with --out {folder} first"
            )
        return cls(folder, tables, run.settings, run.manifest)

    def table(self, name: str) -> pd.DataFrame | None:
        """Return a table, or None where the run has none."""
        return self.tables.get(name)


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the leaves of nested mappings with their paths, in order; a list of scalars is one leaf."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, str(i)))
    else:
        yield path, value


def problems(manifest: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return every counted problem of the data: where the manifest has it, what it is, how many."""
    found = []
    for path, value in leaves(manifest):
        if "problems" in path[:-1] and isinstance(value, int) and not isinstance(value, bool):
            at = path.index("problems")
            found.append((" · ".join(path[:at]), " ".join(path[at + 1 :]).replace("_", " "), value))
    return found
