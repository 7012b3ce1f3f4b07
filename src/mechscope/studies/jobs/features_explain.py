"""`mechscope features explain`: what latents, neurons and heads stand for, in words, and how well the words tell where they are active."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mechscope.errors import RunError, SettingsError
from mechscope.settings import Number, Rate, nested, setting
from mechscope.settings.addresses import check_address
from mechscope.settings.features import ExplainSettings
from mechscope.studies.dictionary_files import DICTIONARIES, LeftOutTokens, MaybeDictionaries, left_out
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS, fingerprints, loading
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import split_names
from mechscope.studies.run import Input, JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts

if TYPE_CHECKING:
    from mechscope.features.explain import Explainer
    from mechscope.features.observed import Observed
    from mechscope.subject import Subject

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FeaturesExplainSettings(OneModel, MaybeDictionaries, LeftOutTokens, Texts):
    """What is explained, by whom."""

    panel: ClassVar[str] = "Explaining"

    components: str | None = setting(
        None,
        "What to explain, joined by commas: latents of --dictionary (resid6.f12), neurons (m3.n1024), heads (a3.h5). By default the latents that carry most.",
    )
    latents_explained: Number = setting(30, "Latents of each dictionary that are explained where no components are named.")
    explainer: Literal["baseline", "local", "endpoint"] = setting(
        "baseline", "Who explains: the best set of n-grams, a Hugging Face model that runs here, or a model behind an endpoint."
    )
    explainer_model: str | None = setting(None, "The model that explains: a hub id or directory for local, its name there for endpoint.")
    endpoint: str | None = setting(
        None,
        "Address of an endpoint that speaks OpenAI's chat completions, such as http://localhost:8000/v1: texts are sent there, and only there.",
    )
    timeout: Rate = setting(60.0, "Seconds to wait for an answer of the endpoint.")
    scorers: str = setting("detection,fuzzing,simulation,intruder", "By what explanations are scored, joined by commas.")
    explain: ExplainSettings = nested(ExplainSettings)

    def __post_init__(self) -> None:
        """Refuse an explainer without a model, a model without its explainer, and what is no address.

        Raises:
            SettingsError: They do not go together, or the endpoint's address is none.
        """
        super().__post_init__()
        if (self.explainer == "baseline") != (self.explainer_model is None):
            raise SettingsError(
                "setting 'explainer_model' names the model that explains: give it with explainer local or endpoint, and with these only"
            )
        if (self.explainer == "endpoint") != (self.endpoint is not None):
            raise SettingsError("setting 'endpoint' is the address of explainer endpoint: give both, or neither")
        if self.endpoint is not None:
            check_address(self.endpoint)
        if self.components is None and self.dictionary is None:
            raise SettingsError("nothing is named to explain: give --components, or --dictionary for its strongest latents")


class _Finished(MutableMapping[str, Any]):
    """What is finished of units, each in a file of a folder that outlives a kill."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Any] = {}
        for file in sorted(folder.glob("*.json")):
            try:
                key, value = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise RunError(f"{file} is damaged: delete it, and what it held is asked again") from error
            self._held[key] = value

    def __setitem__(self, key: str, value: Any) -> None:
        from mechscope.store.files import write_json

        write_json([key, value], self._folder / f"{len(self._held):06}.json")
        self._held[key] = value

    def __getitem__(self, key: str) -> Any:
        return self._held[key]

    def __delitem__(self, key: str) -> None:
        raise RunError("what is finished stays")

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _named(run: JobRun[FeaturesExplainSettings]) -> dict[str, list[str]]:
    """Return the components that are named, by kind: those of a dictionary by `latents NAME`, `neurons`, `heads`.

    Raises:
        SettingsError: One is not understood, does not exist, or could be of several dictionaries.
    """
    from mechscope.features import Latent
    from mechscope.features.explain import kind_of

    found: dict[str, list[str]] = {}
    for name in split_names(run.settings.components or ""):
        try:
            kind = kind_of(name)
        except KeyError:
            raise SettingsError(
                f"component {name!r} cannot be explained: name latents (resid6.f12), neurons (m3.n1024) or heads (a3.h5)"
            ) from None
        if kind == "latents":
            latent = Latent.parse(name)
            own = [key for key, each in run[DICTIONARIES].items() if each.layout.outputs[0] == latent.place]
            if not own:
                raise SettingsError(
                    f"component {name!r} is a latent of none of the dictionaries that are named: name the one that writes {latent.place} (--dictionary)"
                )
            if len(own) > 1:
                raise SettingsError(
                    f"component {name!r} could be a latent of {' or '.join(own)}, which both write {latent.place}: name one of them alone (--dictionary)"
                )
            if latent.index >= (count := run[DICTIONARIES][own[0]].latents):
                raise SettingsError(f"component {name!r} does not exist: dictionary {own[0]} has latents 0-{count - 1}")
            kind = f"latents {own[0]}"
        if name in found.setdefault(kind, []):
            raise SettingsError(f"component {name!r} is named twice")
        found[kind].append(name)
    return found


def _check(run: JobRun[FeaturesExplainSettings]) -> None:
    from mechscope.data.scoring import check_fits
    from mechscope.features.explain import LocalModel, halves, scorers_of
    from mechscope.features.explain.backends import check_key
    from mechscope.features.observed import check_heads, check_neurons

    scorers_of(run.settings.scorers)
    check_fits(run.first, run[TEXTS])
    for dictionary in run[DICTIONARIES].values():
        dictionary.check(run.first, other_model=run.settings.other_model)
    named = _named(run)
    if (local := run[EXPLAINER]) is not None:
        LocalModel(local, run.first.tokenizer)
    if run.settings.endpoint is not None:
        check_key()
    check_neurons(run.first, named.get("neurons", ()))
    check_heads(run.first, named.get("heads", ()))
    halves(run[TEXTS], run.settings.seed)


def _observed(run: JobRun[FeaturesExplainSettings]) -> Iterator[tuple[str, Observed]]:
    """Yield what is to be explained, kind by kind, with the dictionary of latents."""
    from mechscope.features import Latent, top_examples
    from mechscope.features.explain import halves
    from mechscope.features.observed import Heads, Latents, Neurons

    settings, texts, subject, tokens = run.settings, run[TEXTS], run.first, left_out(run.settings)
    named = _named(run)
    for name, dictionary in run[DICTIONARIES].items():
        moved = dictionary.to(subject.device)
        if settings.components is None:
            # by the half that explanations are made of
            half, _ = halves(texts, run.execution.seed)
            found = top_examples(subject, moved, half, count=1, tokens=tokens, other_model=True, execution=run.execution)
            latents = found.strongest(settings.latents_explained)
        else:
            latents = [Latent.parse(each).index for each in named.get(f"latents {name}", ())]
        if latents:
            yield name, Latents(subject, moved, texts, latents=latents, tokens=tokens, other_model=True, execution=run.execution)
    for kind, observed in (("neurons", Neurons), ("heads", Heads)):
        if kind in named:
            yield "", observed(subject, named[kind], texts, tokens=tokens, share=settings.explain.active_share, execution=run.execution)


def _local(run: JobRun[FeaturesExplainSettings]) -> Subject | None:
    """Load the model that explains where it runs here; None for another explainer."""
    from mechscope.instrument import load

    if run.settings.explainer != "local" or run.settings.explainer_model is None:
        return None
    return load(run.settings.explainer_model, **loading(run.settings))


EXPLAINER: Input[Subject | None] = Input(
    "explainer",
    _local,
    lambda model: None if model is None else fingerprints({"explainer": model}),
    lambda model: {} if model is None else {"explainer": {"source": model.source, "fingerprint": model.fingerprint}},
)


def _explainer(run: JobRun[FeaturesExplainSettings]) -> Explainer:
    from mechscope.features.explain import Baseline, Endpoint, LocalModel

    settings, tokenizer = run.settings, run.first.tokenizer
    if settings.explainer_model is None:
        return Baseline(tokenizer, longest=settings.explain.longest)
    if (local := run[EXPLAINER]) is not None:
        return LocalModel(local, tokenizer)
    assert settings.endpoint is not None
    # said where everyone sees it, not only in the log
    logger.warning("texts are sent to %s; all that is sent is in log.jsonl of the run folder", settings.endpoint)
    return Endpoint(settings.endpoint, settings.explainer_model, tokenizer, timeout=settings.timeout, seed=settings.seed)


def _explain(run: JobRun[FeaturesExplainSettings]) -> Tables:
    from mechscope.features.explain import explain, gather, scorers_of
    from mechscope.subject.spelling import Spelling

    settings = run.settings
    evidence = [
        each
        for name, observed in _observed(run)
        for each in gather(observed, run[TEXTS], settings=settings.explain, dictionary=name, execution=run.execution)
    ]
    if not evidence:
        raise SettingsError("nothing is left to explain: no latent of the dictionaries is active on these texts")
    found = explain(
        evidence, _explainer(run), scorers=scorers_of(settings.scorers), kept=_Finished(run.stage.path("finished")), execution=run.execution
    )
    spelling = Spelling(run.first.tokenizer)
    told = found.explanations.assign(texts=len(run[TEXTS]), strongest=found.explanations["strongest"].map(spelling.tokens))
    tables = {
        "explanations": told,
        "explanation_scores": found.scores,
        "explanation_summary": found.summary,
        "explanation_questions": found.sent,
    }
    return {name: table for name, table in tables.items() if len(table)}


EXPLANATIONS = Stage(
    name="explanations",
    work=_explain,
    hangs_on=(
        "components",
        "latents_explained",
        "explainer",
        "explainer_model",
        "endpoint",
        "scorers",
        "explain",
        "first",
        "outlier",
        "seed",
    ),
    inputs=(MODELS, TEXTS, DICTIONARIES, EXPLAINER),
    alone=True,
)


def _title(names: Mapping[str, str]) -> str:
    return f"What parts of {names['model']} stand for"


JOB = Job(
    name="features-explain",
    help="Explain latents, neurons or heads in words, and score the explanations on held-out texts beside those of other units.",
    panel="features",
    group="features",
    example="mechscope features explain gpt2 --dictionary runs/features/dictionaries/resid6-4096.safetensors --data articles.jsonl",
    settings=FeaturesExplainSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS, DICTIONARIES, EXPLAINER),
    stages=(EXPLANATIONS,),
    sections=("explanations",),
    title=_title,
    check=_check,
)
