"""What a summarization study loads: the models it is given, those that it made, their pairs, the texts of the circuit, and where LoRA is placed.

What an earlier stage of the study makes is an input of later ones: it is loaded when the first stage that needs it is reached.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from mechscope.errors import DataError, SettingsError
from mechscope.studies.contest import Places, circuit_places
from mechscope.studies.controls import check_controls
from mechscope.studies.inputs import HELD_OUT, MODELS, fingerprints, loading, record_models
from mechscope.studies.paper_2505_17073.settings import StudySettings
from mechscope.studies.run import Input, JobRun
from mechscope.studies.selection import CHOSEN, check_selection

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mechscope.studies.circuit_request import CircuitRequest
    from mechscope.subject import Components, Pair, Subject

log = logging.getLogger(__name__)

# strategies of a bake-off that need no more than layers
_BY_LAYERS = ("standard", "targeted_layers", "more_rank", "random_layers", "last_layers", "full", "none")

GIVEN: Input[Mapping[str, Subject]] = replace(MODELS, name="given", record=lambda models: {})
"""The base, and the tuned model if there is one: what is loaded before anything is trained."""

BASE: Input[Subject] = Input("base", lambda run: run[GIVEN]["base"], lambda subject: fingerprints({"base": subject}))
"""The base model."""


def _study_models(run: JobRun[StudySettings]) -> Mapping[str, Subject]:
    from mechscope.instrument import load

    given, settings = run[GIVEN], run.settings
    if "tuned" in given:
        return given
    folder, base = run.folder.path / "models", given["base"]
    tuned = load(folder / "tuned", tokenizer=base.tokenizer, **loading(settings))
    lora = load(folder / "lora", base=settings.base, tokenizer=base.tokenizer, **loading(settings))
    return {"base": base, "tuned": tuned, "lora": lora}


STUDY_MODELS: Input[Mapping[str, Subject]] = Input("models", _study_models, fingerprints, record_models)
"""All models of the study: `base`, `tuned` and, where they were trained here, `lora`."""

BOTH: Input[Mapping[str, Subject]] = Input(
    "both", lambda run: {label: run[STUDY_MODELS][label] for label in ("base", "tuned")}, fingerprints
)
"""The two models that are read and compared."""


def _pairs(run: JobRun[StudySettings]) -> dict[str, Pair]:
    from mechscope.subject import pair

    models, resize = run[STUDY_MODELS], run.settings.resize
    pairs = {"": pair(models["base"], models["tuned"], resize=resize)}
    if "lora" in models:
        pairs |= {f"{name}–LoRA": pair(models[name], models["lora"], resize=resize) for name in ("base", "tuned")}
    return pairs


PAIRS_OF_MODELS: Input[dict[str, Pair]] = Input(
    "pairs",
    _pairs,
    lambda pairs: {
        name: {**fingerprints({"base": both.base, "tuned": both.tuned}), "vocab_size": both.vocab_size} for name, both in pairs.items()
    },
)
"""Base and tuned model, under the empty name; beside them the paper's further pairs, by name."""


def _plain_base(run: JobRun[StudySettings]) -> Subject:
    from mechscope.instrument import load

    base = run[GIVEN]["base"]
    return load(run.settings.base, tokenizer=base.tokenizer, **loading(run.settings)) if base.is_adapter else base


PLAIN_BASE: Input[Subject] = Input("base", _plain_base, lambda subject: fingerprints({"base": subject}))
"""The base without any adapter inside: training starts from plain weights."""


def _request(run: JobRun[StudySettings]) -> CircuitRequest | None:
    """Make the pairs of the circuit: held-out documents with their summaries, clean and without their salient sentence.

    The circuit is what brings a document's salient content into its summary.
    """
    from mechscope.data.salience import salience_pairs
    from mechscope.studies.circuit_request import CircuitRequest

    settings, documents, base = run.settings, run[HELD_OUT], run[GIVEN]["base"]
    longest = min(settings.max_tokens, base.anatomy.max_positions)
    try:
        texts = salience_pairs(documents.corpus, base.tokenizer, template=documents.template, max_tokens=longest, seed=settings.seed).first(
            settings.circuit_documents
        )
    except DataError as error:
        # the rest of the study does not need it
        log.warning(
            "the circuit of summarizing is left out: %s", error, extra={"weakens": "circuit_edges", "withheld": "which circuit summarizes"}
        )
        return None
    return CircuitRequest.of(texts, settings.discovery, seed=settings.seed)


REQUEST: Input[CircuitRequest | None] = Input("circuit_pairs", _request, lambda request: None if request is None else request.fingerprint)
"""The texts of the circuit and how it is found; None where no document has a salient sentence."""


def _places(run: JobRun[StudySettings]) -> Places:
    named, named_layers = circuit_places(run[GIVEN]["base"], run.settings.contest)
    circuit, layers = _from_circuit(run)
    # what the user names comes before what the study measures
    return Places(run[CHOSEN].layers, run[CHOSEN].heads, named or circuit, named_layers or layers, searched=run.settings.circuit)


def _from_circuit(run: JobRun[StudySettings]) -> tuple[Components, Components]:
    """Return the heads and MLPs of the tuned model's circuit, and the layers whose edges changed most; no heads and MLPs where these are all or none."""
    from mechscope.adapt.places import critical_layers
    from mechscope.difference.selection import default_number
    from mechscope.studies.circuits import read_circuits
    from mechscope.subject import Components

    if not run.settings.circuit or run[REQUEST] is None:
        return Components(), Components()
    circuits = read_circuits(run.folder, ["base", "tuned"])
    (base, _), (tuned, circuit) = circuits["base"], circuits["tuned"]
    critical = critical_layers(base.graph, base.mean, tuned.mean, number=default_number(base.graph.n_layers))
    components = circuit.components()
    if len(components) in (0, base.graph.n_layers * (base.graph.n_heads + 1)):
        log.warning(
            "the circuit takes in %s, so LoRA cannot be placed by it",
            "every head and MLP" if components else "no head or MLP",
            extra={"weakens": "bakeoff_summary", "withheld": "whether LoRA in the circuit pays"},
        )
        return Components(), critical
    return components, critical


PLACES: Input[Places] = Input("places", _places, lambda places: places.fingerprint)
"""Where LoRA is placed: the most changed layers and heads, and the circuit that is named, else the one that was found."""


def check_study(run: JobRun[StudySettings]) -> None:
    """Refuse settings that do not fit the model, before the first forward pass.

    Raises:
        SettingsError: There are not as many layers or heads, components do not exist, a control cannot be used, or a placement cannot be had.
        DataError: A circuit's file cannot be used.
    """
    from mechscope.adapt.arms import plan
    from mechscope.difference.selection import default_number
    from mechscope.subject import Components

    settings, base = run.settings, run[GIVEN]["base"]
    if settings.tuned is None and "base" in run.given:
        raise SettingsError(
            "a study that fine-tunes its models loads them from files: give the base as a directory or hub id, or give tuned as well"
        )
    if settings.tuned is None and base.is_adapter:
        raise SettingsError(f"base {settings.base!r} is an adapter: merge it into a model first, or name its base")
    check_selection(settings, base.anatomy)
    # what the study trains itself is not there yet: the stage of controls compares them with it
    check_controls(run, base, run[GIVEN].get("tuned"))
    if settings.circuit:
        run[REQUEST]
    if settings.bakeoff:
        circuit, critical = circuit_places(base, settings.contest)
        # which layers, heads and circuit are selected is not known yet: how many layers is
        layers, one = (
            Components.of_layers(range(settings.selected_layers or default_number(base.anatomy.n_layers))),
            Components.of_heads([(0, 0)]),
        )
        if run.settings.circuit:
            circuit, critical = circuit or one, critical or layers
        competition = Places(layers, one, circuit, critical).competition(settings)
        by_layers = tuple(strategy for strategy in competition.strategies if strategy in _BY_LAYERS)
        if by_layers:
            plan(run[PLAIN_BASE], replace(competition, strategies=by_layers))
