"""`mechscope universality`: which neurons, representations and heads of a model other models have too, beside chance and an untrained model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.errors import SettingsError
from mechscope.settings import Number, setting
from mechscope.studies.groups import OneCorpus, OneModel
from mechscope.studies.inputs import CORPUS, MODELS, fingerprints, loading
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import split_names
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.subject import Subject
    from mechscope.universality import Aligned, Rows

UNTRAINED = "random weights"
"""What tables call the control: the first model's architecture with random weights."""
MEASURES = ("neurons", "representations", "heads")


@dataclass(frozen=True, kw_only=True)
class UniversalitySettings(OneModel, OneCorpus):
    """Which models, and what of them is compared."""

    panel: ClassVar[str] = "Universality"

    others: str = setting(..., "The models that it is compared with, joined by commas: other seeds, sizes, families, fine-tuned versions.")
    documents: Number = setting(200, "Documents to read.")
    per_text: Number = setting(32, "Most tokens of a document that are compared, drawn at random.")
    max_tokens: Number = setting(256, "Most tokens of a document; lowered to what a model can read.")
    measures: str = setting("neurons,representations,heads", f"What is compared, joined by commas: {', '.join(MEASURES)}.")
    probes: Number = setting(32, "Random texts on which heads are scored.")
    draws: Number = setting(200, "How often heads are dealt to layers at random, for chance.")

    def __post_init__(self) -> None:
        """Refuse what is not known.

        Raises:
            SettingsError: A measure is not known, or no other model, or no measure, is named.
        """
        super().__post_init__()
        if strange := [one for one in split_names(self.measures) if one not in MEASURES]:
            raise SettingsError(f"setting 'measures' names {', '.join(strange)}: known are {', '.join(MEASURES)}")
        for name in ("others", "measures"):
            if not split_names(getattr(self, name)):
                raise SettingsError(f"setting {name!r} names none: give at least one")

    def measured(self, name: str) -> bool:
        """Tell whether something is compared."""
        return name in split_names(self.measures)


def _others(run: JobRun[UniversalitySettings]) -> dict[str, Subject]:
    """Load the other models, by what tables call them, and make the control."""
    from mechscope.instrument import load
    from mechscope.probing.controls import untrained
    from mechscope.report.theme import model_name

    given = run.source("others")
    found: dict[str, Subject] = {}
    if isinstance(given, str):
        for source in split_names(given):
            name = model_name(source)
            # two folders may have one name
            found[name if name not in found else source] = load(source, **loading(run.settings))
    else:
        found = dict(given)
    return {**found, UNTRAINED: untrained(run.first, seed=run.settings.seed)}


OTHERS: Input[dict[str, Subject]] = Input(
    "others",
    _others,
    fingerprints,
    lambda others: {
        "others": {name: {"source": one.source, "family": one.family, "fingerprint": one.fingerprint} for name, one in others.items()}
    },
)
"""The models that the first one is compared with, and the control."""


def _aligned(run: JobRun[UniversalitySettings]) -> Aligned:
    from mechscope.universality import align

    texts = [one.document for one in run[CORPUS].corpus.documents]
    settings = run.settings
    others = run[OTHERS]
    return align({"model": run.first, **others}, texts, max_tokens=settings.max_tokens, per_text=settings.per_text, seed=settings.seed)


ALIGNED: Input[Aligned] = Input("texts", _aligned, lambda aligned: {label: texts.hash for label, texts in aligned.texts.items()})
"""Texts as every model reads them."""


def _check(run: JobRun[UniversalitySettings]) -> None:
    aligned, settings = run[ALIGNED], run.settings
    if settings.measured("neurons") and len(aligned.texts["model"]) < 4:
        raise SettingsError(
            f"neurons are compared on half of the documents and told of the other half: {len(aligned.texts['model'])} are too few"
        )
    subjects = [run.first, *run[OTHERS].values()]
    # the first model and one other are held at a time
    held = max(_bytes(subjects[0], settings) + _bytes(one, settings) for one in subjects[1:]) * aligned.rows
    run.tell(f"holding {aligned.rows:,} tokens of two models: {held / 2**30:.2g} GiB", 0, 1)


def _bytes(subject: Subject, settings: UniversalitySettings) -> int:
    """Return the memory that a row of a model takes."""
    anatomy = subject.anatomy
    width = anatomy.d_model * settings.measured("representations") + _neurons(subject) * settings.measured("neurons")
    # standardised halves and rotated copies of neurons stand beside them
    return 4 * anatomy.n_layers * width * (3 if settings.measured("neurons") else 1)


def _neurons(subject: Subject) -> int:
    config = subject.plain.config
    return int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * subject.anatomy.d_model)


def _activations(run: JobRun[UniversalitySettings]) -> Tables:
    import pandas as pd

    from mechscope.universality import read_rows, same_neurons, same_representations, similarity_grid

    settings, aligned = run.settings, run[ALIGNED]
    sites: list[Any] = [
        *(["neuron"] if settings.measured("neurons") else []),
        *(["residual"] if settings.measured("representations") else []),
    ]
    if not sites:
        return {}

    def read(label: str, subject: Subject) -> Rows:
        return read_rows(subject, aligned.texts[label], aligned.places[label], sites, execution=run.execution)

    own, text_of = read("model", run.first), aligned.text_of
    tables: dict[str, list[pd.DataFrame]] = {}
    for label, subject in run[OTHERS].items():
        theirs = read(label, subject)
        found = {}
        if settings.measured("neurons"):
            neurons = same_neurons(own.layers("neuron"), theirs.layers("neuron"), text_of, seed=settings.seed)
            found["universal_neurons"] = neurons.assign(n=len(aligned.texts["model"]) - len(aligned.texts["model"]) // 2)
        if settings.measured("representations"):
            found["universal_layers"] = same_representations(own.layers("residual"), theirs.layers("residual"), text_of)
            found["universal_grid"] = similarity_grid(own.layers("residual"), theirs.layers("residual")).assign(
                n=len(aligned.texts["model"])
            )
        for name, table in found.items():
            table.insert(0, "other", label)
            table.insert(1, "control", label == UNTRAINED)
            tables.setdefault(name, []).append(table)
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def _heads(run: JobRun[UniversalitySettings]) -> Tables:
    import pandas as pd

    from mechscope.heads.pattern_roles import pattern_roles
    from mechscope.universality import same_heads

    settings = run.settings
    own = pattern_roles(run.first, n=settings.probes, execution=run.execution)
    found: dict[str, list[pd.DataFrame]] = {"universal_heads": [], "universal_matches": []}
    for label, subject in run[OTHERS].items():
        theirs = pattern_roles(subject, n=settings.probes, execution=run.execution)
        for name, table in zip(found, same_heads(own, theirs, draws=settings.draws, seed=settings.seed), strict=True):
            table.insert(0, "other", label)
            table.insert(1, "control", label == UNTRAINED)
            found[name].append(table)
    return {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}


def _title(names: Mapping[str, str]) -> str:
    return f"What {names['model']} shares with other models"


JOB = Job(
    name="universality",
    help="Ask which neurons, representations and heads of a model other models have too, beside chance and an untrained model.",
    panel="compare",
    example="mechscope universality gpt2 --others distilgpt2,EleutherAI/pythia-160m --data articles.jsonl --out runs/shared",
    settings=UniversalitySettings,
    arguments=("model",),
    inputs=(MODELS, CORPUS, OTHERS, ALIGNED),
    stages=(
        Stage(
            name="shared_activations",
            work=_activations,
            hangs_on=("measures", "per_text", "max_tokens", "seed"),
            inputs=(MODELS, OTHERS, ALIGNED),
        ),
        Stage(
            name="shared_heads",
            work=_heads,
            hangs_on=("probes", "draws", "seed"),
            inputs=(MODELS, OTHERS),
            when=lambda settings: settings.measured("heads"),
        ),
    ),
    sections=("universality",),
    title=_title,
    check=_check,
    function="compare_models",
)
