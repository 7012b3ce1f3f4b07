"""Tables that were measured, not invented: each job whose tables no test invents, run on a tiny model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from mechscope.features import Dictionary, Rule, autoencoder, transcoder
from mechscope.instrument import load
from mechscope.settings import resolve
from mechscope.studies.calibration.rates import rates_table
from mechscope.studies.calibration.truth import Truth
from mechscope.studies.job import Job
from mechscope.studies.runner import run_job
from tests import families
from tests.causal.pairs import random_pairs, telling_pairs
from tests.features.labelled_files import labelled_file
from tests.features.oracle import dictionary
from tests.features.test_explain_backends import completion, endpoint
from tests.features.test_harvest import texts
from tests.features.test_shift import labelled_rows
from tests.matrix.plain import build
from tests.studies.jobs.running import run, subject
from tests.studies.jobs.test_edit import edit_files
from tests.studies.jobs.test_features_diff import run as compare_by_dictionaries
from tests.studies.jobs.test_universality import DOCUMENTS
from tests.subject.saved import save

# settings of a run that ends within a second or two
_JOBS: dict[str, dict[str, Any]] = {
    "attention_lens": {"layers": "1-2", "steps": 3, "tokens_per_step": 30},
    "attribute_positions": {"documents": 3},
    "attribute_sources": {"components": "a1.h0,a2.h3", "documents": 3},
    "backward_lens": {"documents": 3, "matrices": "mlp_down,mlp_up", "layers": "1-2", "top": 4},
    "das": {
        "pairs": random_pairs(12),
        "layers": "0,2",
        "epochs": 2,
        "dimensions": 3,
        "controls": 2,
        "position": "changed",
        "test_share": 0.5,
    },
    "features_train": {
        "pairs": random_pairs(24),
        "places": "resid1",
        "transcoders": "2",
        "latents": "40",
        "k": 4,
        "steps": 6,
        "batch": 8,
        "rows": 60,
        "test_share": 0.4,
        "latents_shown": 3,
        "examples": 2,
    },
    "flow": {"segments": "beginning,changed fact,last"},
    "gradient_directions": {"documents": 3, "layers": "1-2", "rank": 2, "top": 4},
    "knockout": {"keys": "2,4", "queries": "last", "each_head": True, "components": "layers:1"},
    "patchscope": {"documents": 2, "new_tokens": 2, "top": 3},
    "paths": {"receivers": "a2.h1<k>, logits"},
    "spectrum": {"bands": 5, "sites": "head_output,residual", "documents": 4},
    "steer": {"pairs": random_pairs(12), "layer": 1, "strengths": "-1,2", "prompt": "w3 w4 w5", "new_tokens": 3},
    "suppress": {"bands": 4, "suppressed": "0", "layers": "1", "controls": 2},
    "trace": {"segment": "beginning", "site": "mlp", "samples": 2, "window": 2},
}
# jobs that read dictionaries: one of random directions at each of these places
_OF_DICTIONARIES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "features_circuit": (
        ("resid0", "m1"),
        {"pairs": telling_pairs(subject(), 16), "points": 2, "node_threshold": 0.01, "nodes": 10, "check": 2, "draws": 2, "documents": 16},
    ),
}
# jobs that read a file: the setting that names it, and what it holds
_FILES: tuple[tuple[str, str, Any, dict[str, Any]], ...] = (
    ("counterfactual", "runs", {"two": {"m2": "zero"}, "half": {"a2.h0": 0.5}}, {}),
    (
        "scrub",
        "hypothesis",
        {"m2": None, "a1.h1,a1.h2": ["x", "y", "x", "y", "x", "z"]},
        {"pairs": random_pairs(6, lengths=(9,)), "samples": 2},
    ),
)
_KINDS: tuple[Literal["null", "coverage", "planted"], ...] = ("null", "coverage", "planted")
_TRUTHS = [Truth(claim="it_changed", world="nothing did", kind=kind, draw=str, unit="document", right=("supported",)) for kind in _KINDS]


@cache
def measured_tables() -> dict[str, pd.DataFrame]:
    """Return the tables of all these jobs by name."""
    tables: dict[str, pd.DataFrame] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, setting, content, settings in _FILES:
            file = Path(folder) / f"{name}.json"
            file.write_text(json.dumps(content), encoding="utf-8")
            tables |= run(_job(name), None, **{setting: str(file)}, **settings).tables
        file = Path(folder) / "random.safetensors"
        random_dictionary().save(file)
        tables |= run(_job("features_dashboard"), None, dictionary=str(file), pairs=random_pairs(24), drawn=20, before=3, after=1).tables
        for name, (places, settings) in _OF_DICTIONARIES.items():
            files = []
            for place in places:
                layout = autoencoder(place, subject().anatomy.d_model, 30, Rule("relu"))
                files.append(str(Path(folder) / f"{place}.safetensors"))
                Dictionary.plain(layout, layout.tensors(seed=1)).save(files[-1])
            tables |= run(_job(name), None, dictionary=",".join(files), **settings).tables
        graph = _graph(Path(folder))
        nodes = run(_job("features_graph"), None, **graph).graph_nodes
        latent = nodes["node"][nodes["kept"] & (nodes["kind"] == "latent")].iloc[0]
        file = Path(folder) / "groups.json"
        groups = {"prompt": graph["prompt"], "groups": [{"name": "a token and a latent", "nodes": ["embed@1", latent]}]}
        file.write_text(json.dumps(groups), encoding="utf-8")
        tables |= run(_job("features_graph"), None, groups=str(file), **graph).tables
        judge = {
            "explainer": "endpoint",
            "explainer_model": "small",
            "scorers": "detection",
            "components": "m1.n3,m1.n4",
            "active_share": 0.05,
        }
        with endpoint(lambda body: completion("[1, 0, 1, 0, 1]")) as (url, _):
            tables |= run(_job("features_explain"), None, pairs=texts((24,) * 80), documents=80, window=6, endpoint=url, **judge).tables
        tables |= _compared(Path(folder))
        probed: dict[str, Any] = {
            "data": str(labelled_file(Path(folder), 60)),
            "labels": "topic",
            "shuffles": 5,
            "folds": 3,
            "erase": "resid0",
        }
        both = {"model": subject(), "tuned": load(families.build("gpt2", seed=1), tokenizer=families.tokenizer())}
        tables |= run_job(_job("probe"), _job("probe").resolve(**dict.fromkeys(both, "given in memory"), **probed), None, given=both).tables
        for number, seed in ((0, 0), (5, 1), (20, 0)):
            save(Path(folder) / "series" / f"checkpoint-{number}", seed=seed)
        course = {"series": str(Path(folder) / "series"), "job": "ablate", "options": "--pairs induction --limit 8"}
        tables |= run_job(_job("dynamics"), _job("dynamics").resolve(**course), None).tables
        tables |= run(
            _job("edit"), None, **edit_files(Path(folder)), limit=2, layers="1", texts=12, held_out=2, steps=2, controls=2, sequence="1,2"
        ).tables
        labelled = Path(folder) / "labelled.jsonl"
        labelled.write_text("\n".join(json.dumps(row) for row in labelled_rows(160)), encoding="utf-8")
        shifted: dict[str, Any] = {
            "data": str(labelled),
            "dictionary": str(Path(folder) / "resid0.safetensors"),
            "texts": 160,
            "latents": 8,
            "draws": 2,
        }
        tables |= run(_job("features_shift"), None, **shifted).tables
    for name, settings in _JOBS.items():
        tables |= run(_job(name), None, **settings).tables
    tables |= run(_job("ablate"), None, components="a1.h2,a2.h0", mode="together", random_sets=3).tables
    positions = _job("positions")
    read = resolve(positions.settings, model="given in memory", offsets=4, components="layers:0-1")
    tables |= run_job(positions, read, None, given={"model": subject()}).tables
    mixtures = {name: load(build("qwen2_moe", seed, torch.float32)) for name, seed in (("model", 0), ("tuned", 1))}
    routed: dict[str, Any] = {"model": "given in memory", "tuned": "given in memory", "pairs": "given in memory"}
    job = _job("routing")
    tables |= run_job(job, resolve(job.settings, **routed), None, given={**mixtures, "pairs": random_pairs(8)}).tables
    toys = _job("superposition")
    few: dict[str, Any] = {"features": 4, "dimensions": 2, "sparsities": "0,0.9", "seeds": 2, "steps": 60, "dictionary_steps": 20}
    tables |= run_job(toys, toys.resolve(**few), None).tables
    compared = _job("universality")
    asked = compared.resolve(
        **dict.fromkeys(("model", "others", "data"), "given in memory"), template="{document} w3 {summary}", probes=6, draws=20
    )
    alike = {
        "model": subject(),
        "others": {"other": load(families.build("gpt2", seed=1), tokenizer=families.tokenizer())},
        "data": DOCUMENTS,
    }
    tables |= run_job(compared, asked, None, given=alike).tables
    truth, judged = _job("groundtruth"), _job("benchmark_circuits")
    tables |= run_job(truth, truth.resolve(name="counting", pairs=4), None).tables
    tables |= run_job(judged, judged.resolve(programs="induction", methods="eap,exact", pairs=6, draws=50), None).tables
    # its dictionaries' own tables are those of the job above
    tables = {**compare_by_dictionaries(None).tables, **tables}
    return {
        **tables,
        "calibration": rates_table(_TRUTHS, [{"undecided": 40}, {"inside": 38, "outside": 2, "withheld": 10}, {"supported": 12}]),
    }


def random_dictionary(latents: int = 40) -> Dictionary:
    """Return random directions of the tiny model's residual stream."""
    layout = autoencoder("resid1", subject().anatomy.d_model, latents, Rule("topk", 8))
    return Dictionary.plain(layout, layout.tensors(seed=1))


def _graph(folder: Path) -> dict[str, Any]:
    """Write transcoders of the first two layers and texts, and return the settings of a graph through them."""
    for layer in range(2):
        layout = transcoder(layer, families.WIDTH, 30, Rule("topk", 5))
        dictionary(layout, seed=layer).save(folder / "transcoders" / f"t{layer}.safetensors")
    (folder / "texts.jsonl").write_text('{"document": "w5 w9 w30 w6 w44 w12 w13 w14 w15", "summary": "w7 w8"}\n', encoding="utf-8")
    return {
        "prompt": "w5 w9 w30 w7 w9 w12",
        "dictionary": str(folder / "transcoders"),
        "data": str(folder / "texts.jsonl"),
        "template": "w3 {document} w4 {summary}",
        "logits": 3,
        "node_share": 0.97,
        "interventions": 7,
        "examples": 2,
    }


def _compared(folder: Path) -> Mapping[str, pd.DataFrame]:
    """Return what is measured of a dictionary against another, and of what its latents stand for."""
    files = []
    for width in (40, 48):
        files.append(str(folder / f"width{width}.safetensors"))
        random_dictionary(width).save(files[-1])
    concepts = str(labelled_file(folder))
    settings: dict[str, Any] = {"dictionary": files[0], "against": files[1], "concepts": concepts, "pairs": random_pairs(24)}
    return run(_job("features_measure"), None, latents_shown=0, **settings).tables


def _job(name: str) -> Job[Any]:
    job: Job[Any] = import_module(f"mechscope.studies.jobs.{name}").JOB
    return job
