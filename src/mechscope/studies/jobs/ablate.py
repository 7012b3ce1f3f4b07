"""`mechscope ablate`: heads, MLPs or other places taken out, one at a time or together, on prompt pairs or on documents with their summaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mechscope.choices import AblationSource, MetricName
from mechscope.errors import SettingsError
from mechscope.settings import Count, Number, Settings, setting
from mechscope.studies.dictionary_files import DICTIONARIES, MaybeDictionaries, autoencoders
from mechscope.studies.groups import PAIRS, DocumentFormat, OneModel, PairFormat
from mechscope.studies.inputs import MODELS, prompt_pairs, read_documents, record_pairs
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs, split_names
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs


@dataclass(frozen=True, kw_only=True)
class MaybePairs(PairFormat):
    """Prompt pairs to ablate on."""

    panel: ClassVar[str] = "Pairs"

    pairs: str | None = setting(
        None,
        f"{PAIRS} Only the clean side is read unless --source is corrupt: rows of a file then need no corrupt text, and no answers with --metric loss.",
    )


@dataclass(frozen=True, kw_only=True)
class InsteadOfPairs(Settings):
    """Documents to ablate on."""

    panel: ClassVar[str] = "Data"

    data: str | None = setting(None, "Instead of pairs: documents with summaries, ablated with the loss on the summary.")
    documents: Number = setting(32, "Documents to run on, with --data.")


@dataclass(frozen=True, kw_only=True)
class AblateSettings(OneModel, MaybeDictionaries, InsteadOfPairs, MaybePairs):
    """What is ablated and how it is judged."""

    panel: ClassVar[str] = "Ablation"

    sites: str = setting(
        "head,mlp", "What is ablated, joined by commas: head, mlp, attention, expert, …, or latent: all latents of --dictionary."
    )
    components: str | None = setting(
        None,
        'Only these, e.g. "a3.h5,m3", "layers:2,3", experts ("m3.e5") or, with --dictionary, latents such as "resid6.f1024"; by default all.',
    )
    source: AblationSource = setting("mean", "What an ablated component's value is replaced by.")
    mode: Literal["each", "keep", "together"] = setting(
        "each",
        "Leave one out, keep only one, or take all of --components out together, beside random sets with as many heads in each layer.",
    )
    random_sets: Count = setting(40, "With --mode together: random sets of heads.")
    metric: MetricName | None = setting(None, "Metric; by default loss with --data and logit-diff with --pairs.")
    tokens_per_batch: Number | None = setting(1024, "Most tokens of a batch of texts, padding included; decides the memory.")

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            SettingsError: Pairs and data are both given, or neither; documents are to have a corrupt text; or nothing is named to be taken out together.
        """
        super().__post_init__()
        if (self.pairs is None) is (self.data is None):
            raise SettingsError("give either pairs (a file or a task) or data (documents with summaries) to ablate on")
        if self.data is not None and self.source == "corrupt":
            raise SettingsError("source 'corrupt' needs pairs with a corrupt text, and documents have none: use mean, resample or zero")
        if self.mode == "together" and self.components is None:
            raise SettingsError("mode 'together' takes out what components name, and they name nothing: give some, such as \"a1.h2,a3.h0\"")

    @property
    def judged_by(self) -> MetricName:
        """The metric, given or by default."""
        return self.metric or ("loss" if self.data is not None else "logit-diff")


def _texts(run: JobRun[AblateSettings]) -> Pairs:
    settings = run.settings
    if settings.data is None:
        return prompt_pairs(run, corrupt=settings.source == "corrupt")
    documents = DocumentFormat(max_tokens=settings.max_tokens, chat=settings.chat, seed=settings.seed)
    return read_documents(documents, run.source("data"), settings.documents, run.first).pairs


TEXTS: Input[Pairs] = Input("texts", _texts, lambda texts: texts.hash, record_pairs)


def _sites(settings: AblateSettings) -> list[str]:
    """Return the sites; where experts or latents are named theirs are among them, and alone where nothing else is."""
    from mechscope.subject import Components

    sites, chosen = split_names(settings.sites), Components.parse(settings.components or "")
    further = [*(("expert",) if chosen.experts else ()), *(("latent",) if chosen.latents else ())]
    if further:
        return list(dict.fromkeys([*(sites if chosen.without_latents.without_experts else ()), *further]))
    return sites


def _check(run: JobRun[AblateSettings]) -> None:
    from mechscope.causal.ablation import ablated_places
    from mechscope.causal.places import places_of
    from mechscope.subject import Components

    settings, anatomy = run.settings, run.first.anatomy
    if settings.mode == "together":
        places_of(Components.parse(settings.components or ""), anatomy, experts=True)
    else:
        ablated_places(anatomy, _sites(settings), settings.components, autoencoders(run))
    check_pairs(run.first, run[TEXTS], metric=settings.judged_by)


def _effects(run: JobRun[AblateSettings]) -> Tables:
    from mechscope.causal import ablate, mean_of
    from mechscope.causal.places import site_named

    settings, subject, texts = run.settings, run.first, run[TEXTS]
    if settings.mode == "together":
        return _together(run)
    sites, standing = _sites(settings), autoencoders(run)
    averaged = [site_named(site) for site in sites if site != "latent"]
    effects = ablate(
        subject,
        texts,
        sites=sites,
        source=mean_of(subject, texts, averaged, standing=standing) if settings.source == "mean" else settings.source,
        mode=settings.mode,
        metric=settings.judged_by,
        components=settings.components,
        standing=standing,
        execution=run.execution,
    )
    run.folder.record("notes", effects.notes)
    return {"effects": effects.table}


def _together(run: JobRun[AblateSettings]) -> Tables:
    from mechscope.studies.causal import ablation_table
    from mechscope.subject import Components

    settings = run.settings
    table = ablation_table(
        run.first,
        run[TEXTS],
        Components.parse(settings.components or ""),
        source=settings.source,
        random_sets=settings.random_sets,
        metric=settings.judged_by,
        execution=run.execution,
    )
    return {"ablated_together": table}


def _hangs_on(settings: AblateSettings) -> tuple[str, ...]:
    names = ("sites", "components", "source", "mode", "metric", "seed", *(("random_sets",) if settings.mode == "together" else ()))
    # values are drawn among the texts of a batch
    return (*names, "tokens_per_batch") if settings.source == "resample" else names


EFFECTS = Stage(name="effects", work=_effects, hangs_on=_hangs_on, inputs=(MODELS, TEXTS, DICTIONARIES))


def _title(names: Mapping[str, str]) -> str:
    return f"Ablating {names['model']}"


JOB = Job(
    name="ablate",
    help="Ablation: take heads, MLPs, experts or latents of dictionaries out, one at a time or together, and see what it costs.",
    panel="intervene",
    example="mechscope ablate gpt2 --pairs ioi --source mean --out runs/ablate-ioi",
    settings=AblateSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS, DICTIONARIES),
    stages=(EFFECTS,),
    sections=("effects", "ablated-together"),
    title=_title,
    check=_check,
)
