"""What the tests of several ranks let them do; each is one function that every rank runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch as patched  # patching is the name of a technique here

import numpy as np
import pandas as pd
import torch

from mechscope import ranks
from mechscope.adapt.generate import summarize
from mechscope.adapt.targets import place
from mechscope.adapt.training import tune
from mechscope.circuits.acdc import acdc
from mechscope.circuits.graph import Graph
from mechscope.circuits.pruning import prune_edges
from mechscope.data.pairs import Pairs
from mechscope.data.prompt import Encoded
from mechscope.difference import Difference, compare_weights, difference
from mechscope.errors import DataError, MechscopeError
from mechscope.features import DivergedError, Live, Plan, Rule, autoencoder, harvest, measure, train, transcoder
from mechscope.features.learner import Learner
from mechscope.instrument import load
from mechscope.instrument.execution import Execution
from mechscope.settings import resolve
from mechscope.settings.decoding import Decoding
from mechscope.settings.features import FeatureTraining, HarvestSettings, Objective
from mechscope.settings.training import TrainSettings
from mechscope.stats.spectra import weight_change
from mechscope.store.run import RunFolder
from mechscope.studies.jobs.circuit import JOB as CIRCUIT
from mechscope.studies.jobs.features_train import JOB as FEATURES
from mechscope.studies.jobs.summarization import JOB as SUMMARIZATION
from mechscope.studies.runner import run_job
from mechscope.subject import Components, Subject
from tests import families
from tests.causal.pairs import random_pairs
from tests.contract.technique import case, techniques
from tests.difference import oracle
from tests.features.planted import Planted

# eleven documents in six batches: neither two nor three ranks get as many batches each
LENGTHS = (23, 12, 17, 9, 20, 31, 14, 26, 11, 19, 22)
TOKENS = 50
# dictionaries in training: what of a step is no sum over tokens differs among them
LEARNED: dict[str, tuple[Rule, dict[str, Any]]] = {
    "relu": (Rule("relu"), {"sparsity": 0.05, "norms": "free"}),
    "gated": (Rule("gated"), {"sparsity": 0.05}),
    "topk": (Rule("topk", 3), {"dead_after": 100}),
    "batchtopk": (Rule("batchtopk", 3), {"dead_after": 100}),
    "jumprelu, target": (Rule("jumprelu"), {"sparsity": 0.1, "target": 3.0, "bandwidth": 0.05}),
    "jumprelu, l0": (Rule("jumprelu"), {"sparsity": 0.1, "penalty": "l0", "bandwidth": 0.05}),
    "matryoshka": (Rule("batchtopk", 3), {"prefixes": (12, 32), "dead_after": 100}),
}


def encoded() -> Encoded:
    """Return documents of different length."""
    return Encoded(oracle.examples(lengths=LENGTHS), {})


def measured(
    family: str = "gpt2", *, folder: Path | None = None, kill_at: tuple[int, int] | None = None, tokens: int = TOKENS
) -> Difference:
    """Measure a difference, kept in a run folder if there is one.

    Args:
        family: Which models.
        folder: Of the run.
        kill_at: A rank, and the round in which it is killed.
        tokens: Of a batch.
    """
    both = oracle.models(family, torch.float32)
    options: dict[str, Any] = {"replicates": 20}
    rounds = 0

    def kill(label: str, done: int, total: int) -> None:
        nonlocal rounds
        rounds += 1
        if kill_at == (ranks.rank(), rounds):
            os.kill(os.getpid(), signal.SIGKILL)

    if folder is None:
        return difference(both, encoded(), **options, execution=Execution(tokens_per_batch=tokens, progress=kill))
    with RunFolder.open(folder, {"seed": 0}, kind="test") as run, run.stage("difference", {"documents": encoded().hash}) as stage:
        return difference(
            both, encoded(), stage=stage, checkpoint_seconds=0, **options, execution=Execution(tokens_per_batch=tokens, progress=kill)
        )


def resumed(folder: Path, tokens: int = TOKENS) -> tuple[Difference, bool]:
    """Go on with a difference; tell whether something was there to go on with."""
    found = measured(folder=folder, tokens=tokens)
    return found, any("continues from its checkpoint" in event["message"] for event in RunFolder.read(folder).events())


def matrices() -> int:
    """Compare the weights of two models; return how many parameters this rank looked at itself."""
    with patched("mechscope.difference.weights.weight_change", wraps=weight_change) as looked:
        compare_weights(oracle.models("llama"))
    return looked.call_count


def model() -> tuple[Subject, Pairs]:
    """Return a model and pairs of different length."""
    torch.manual_seed(0)
    subject = load(families.build("llama", torch.float64), check=False)
    return subject, random_pairs(7, lengths=(9, 12, 7, 10, 8))


def searched(tokens: int) -> dict[str, np.ndarray]:
    """Search for circuits by what needs all texts at every step, and return the circuits and all numbers."""
    subject, pairs = model()
    graph = Graph.of(subject)
    greedy = acdc(subject, pairs, thresholds=(0.003, 0.03), edges=graph.names[::15], execution=Execution(tokens_per_batch=tokens))
    learned = prune_edges(subject, pairs, n_edges=len(graph) // 2, steps=12, execution=Execution(tokens_per_batch=tokens))
    return {
        "circuits": np.stack([circuit.edges for circuit in greedy.circuits]),
        "values": greedy.values,
        "clean": np.array(greedy.clean),
        "scores": greedy.scores.mean,
        "learned circuit": learned.circuit.edges,
        "learned scores": learned.scores.mean,
        "history": learned.history.to_numpy(),
    }


def contract(name: str, family: str, tokens: int) -> dict[str, np.ndarray]:
    """Run a technique of the contract."""
    return techniques()[name](case(family), Execution(tokens_per_batch=tokens))


def trained(folder: Path, documents: int = 6, batch_size: int = 6) -> pd.DataFrame:
    """Fine-tune by LoRA in all heads of a layer and return the learning curve."""
    torch.manual_seed(0)
    # without dropout, whose draws depend on how a batch is divided
    subject = load(families.build("llama", torch.float32), check=False)
    placed = place(subject, Components.parse("layers:1"), rank=2)
    settings = TrainSettings(batch_size=batch_size, max_steps=4, eval_every=1, learning_rate_lora=1e-2, patience=None)
    examples = encoded().examples
    return tune(subject, examples[:documents], examples[documents:], folder, method="lora", placed=placed, settings=settings).curve


def written(source: str) -> list[str]:
    """Let the shipped model continue some prompts."""
    subject = load(source, check=False)
    prompts = [example.input_ids[:12] for example in encoded().examples]
    return summarize(
        subject.model, subject.tokenizer, prompts, decoding=Decoding(max_new_tokens=4), execution=Execution(tokens_per_batch=30)
    )


def studied(settings: dict[str, Any], folder: Path) -> None:
    """Run a whole study."""
    run_job(SUMMARIZATION, resolve(SUMMARIZATION.settings, **settings), folder)


def circuit_of(settings: dict[str, Any], folder: Path) -> None:
    """Run `mechscope circuit`."""
    run_job(CIRCUIT, resolve(CIRCUIT.settings, **settings), folder)


def refused(folder: Path) -> str:
    """Open a folder that is somebody else's, and return the error's kind and text."""
    try:
        RunFolder.open(folder, {}, kind="test")
    except MechscopeError as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


def stages(folder: Path) -> list[Any]:
    """Go through a shared stage, one that rank 0 works on alone, and both again; return what this rank saw of them."""
    seen: list[Any] = []
    with RunFolder.open(folder, {}, kind="test") as run:
        for _ in range(2):
            with run.stage("shared", {}) as stage:
                seen.append(stage.done)
                if not stage.done:
                    scratch = stage.path("scratch")
                    seen.append(scratch.is_dir())
                    stage.write_table("numbers", pd.DataFrame({"rank": ranks.exchange(ranks.rank())}))
                    stage.checkpoint({"x": torch.tensor([ranks.rank()])}, {})
            with run.stage("alone", {}, alone=True) as stage:
                seen.append(stage.done)
                if not stage.done:
                    # without the others: this would wait for ever if it asked them
                    seen.append((ranks.exchange("me"), ranks.size()))
                    stage.write_json("note.json", "written alone")
            seen.append((sorted(run.manifest["stages"]), run.table("numbers")["rank"].tolist()))
        run.record("seeds", {"study": 0})
    return seen


def exchanged() -> dict[str, Any]:
    """Use every way of bringing parts together."""
    mine = ranks.rank()

    def fail() -> None:
        raise DataError("rank 0 met this")

    try:
        ranks.by_first(fail)
        error = "none"
    except MechscopeError as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {
        "rank": mine,
        "own": list(ranks.own(range(7))),
        "exchange": ranks.exchange(mine * 10),
        "collect": ranks.collect(mine * 10),
        "agreed": ranks.agreed(f"from {mine}"),
        "by_first": ranks.by_first(lambda: f"done by {mine}, {ranks.size()} in sight"),
        "error": error,
        "label": ranks.label(),
    }


def learned(case: str, rows: int) -> dict[str, np.ndarray]:
    """Take steps of a dictionary's training on this rank's part of every batch, and return weights, losses and the entries chosen."""
    rule, options = LEARNED[case]
    layout = autoencoder("resid0", 16, 32, rule)
    ours = Learner(layout, Objective(**options), FeatureTraining(steps=12, learning_rate=3e-3), layout.tensors(dtype=torch.float64))
    # some never speak, so that there is something to revive
    ours.tensors["encoder_bias"][:12] = -1.0
    done = []
    for seed in range(12):
        u = Planted.of(16, 24, 2).rows(rows, seed).double()
        own = u[ranks.rank() * rows // ranks.size() : (ranks.rank() + 1) * rows // ranks.size()]
        step = ours.advance(own, own, tokens=rows)
        done.append((step.loss, step.reconstruction, float(step.active.sum()), float(ours.dead.sum()), step.cut or 0.0))
    return {**{name: tensor.numpy() for name, tensor in ours.tensors.items()}, "steps": np.array(done), "silent": ours.silent.numpy()}


def diverged(rank: int) -> str:
    """Give one rank a value that is no number, and return what is said."""
    ours = Learner(autoencoder("resid0", 4, 8, Rule("topk", 2)), Objective(), FeatureTraining(steps=3), layout_tensors())
    u = torch.ones(3, 4) * (torch.nan if ranks.rank() == rank else 1.0)
    try:
        ours.advance(u, torch.ones(3, 4), tokens=3 * ranks.size())
    except DivergedError as error:
        return str(error)
    return "went on"


def layout_tensors() -> dict[str, torch.Tensor]:
    """Return the first tensors of a small autoencoder."""
    return autoencoder("resid0", 4, 8, Rule("topk", 2)).tensors()


def dictionaries(folder: Path, live: bool) -> dict[str, np.ndarray]:
    """Harvest, train and measure dictionaries in a folder, as a job does, and return weights, curves and measures."""
    torch.manual_seed(0)
    subject = load(families.build("llama"), check=False)
    texts, held_out = random_pairs(9, lengths=(14, 9, 12)), random_pairs(7, lengths=(11, 8), seed=1)
    settings = HarvestSettings(rows=30, outlier=8.0, precision="float32")
    source = (
        Live(subject, texts, "resid1,m1.in,m1", settings=settings, execution=Execution(40))
        if live
        else harvest(subject, texts, "resid1,m1.in,m1", folder / "harvest", settings=settings, execution=Execution(40))
    )
    plans = {
        "topk": Plan(autoencoder("resid1", 32, 48, Rule("topk", 4)), Objective(dead_after=100)),
        "across": Plan(transcoder(1, 32, 48, Rule("batchtopk", 4), skip=True)),
    }
    found = train(source, plans, folder / "trained", training=FeatureTraining(steps=10, batch=9, learning_rate=1e-3), keep_every=4)
    numbers: dict[str, np.ndarray] = {}
    for name, each in found.items():
        numbers |= {f"{name}/{key}": tensor.numpy() for key, tensor in each.dictionary.tensors.items()}
        numbers[f"{name}/curve"] = each.curve.to_numpy()
        measured = measure(subject, each.dictionary, held_out, execution=Execution(40))
        numbers |= {f"{name}/measures": measured.table["value"].to_numpy(), f"{name}/density": measured.latents["density"].to_numpy()}
    return numbers


def features_of(settings: dict[str, Any], folder: Path) -> None:
    """Run `mechscope features train`."""
    run_job(FEATURES, resolve(FEATURES.settings, **settings), folder)
