"""What fine-tuning added, by dictionaries: which are trained, on which texts, and their training on one harvest, both models' and every control's at once."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechscope.data.splits import held_out
from mechscope.errors import ModelError, SettingsError
from mechscope.studies.controls import load_control, named_controls
from mechscope.studies.dictionaries import described
from mechscope.studies.pairs import split_names
from mechscope.studies.run import JobRun, Tables

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs
    from mechscope.features import Dictionary, Plan
    from mechscope.features.diffing import Comparison, Plant, Recipe
    from mechscope.features.places import Place
    from mechscope.features.rows import Reader
    from mechscope.studies.control_tables import Control
    from mechscope.studies.feature_settings import DictionaryComparison
    from mechscope.subject import Pair, Subject

log = logging.getLogger(__name__)

OWN_CONTROLS = ("same", "half", "planted", "shuffled")
# steps between two states: with a dictionary for every control a step takes seconds
_KEPT_EVERY = 100
# what takes longer than this is said without being asked
_LONG = 600.0


@dataclass(frozen=True)
class Texts:
    """Texts that are learned from, those of the other half (None where they are not apart), and those that are judged on."""

    learned: Pairs
    other: Pairs | None
    judged: Pairs


@dataclass(frozen=True)
class Request:
    """What is compared, by which dictionaries, and in which run.

    Attributes:
        run: The run: its folder, stages, seed.
        settings: Which dictionaries, and what they are judged by.
        pair: The two models.
        learned: Texts to learn from; half of them where the other half is a control.
        judged: Texts to judge on, with a target.
    """

    run: JobRun[Any]
    settings: DictionaryComparison
    pair: Pair
    learned: Pairs
    judged: Pairs

    @property
    def controls(self) -> tuple[Control, ...]:
        """Other trainings."""
        return named_controls(self.run.settings)

    @property
    def texts(self) -> Texts:
        """The texts, those of the other half apart where it is a control."""
        if "half" not in own_controls(self.settings):
            return Texts(self.learned, None, self.judged)
        first, other = held_out(self.learned, 0.5, self.run.settings.seed + 1)
        return Texts(first, other, self.judged)


def own_controls(settings: DictionaryComparison) -> tuple[str, ...]:
    """Return the controls that are made of the two models themselves.

    Raises:
        SettingsError: One is not known.
    """
    named = split_names(settings.own_controls)
    if named == ["none"]:
        return ()
    if not named or (wrong := [name for name in named if name not in OWN_CONTROLS]):
        said = repr(wrong[0]) if named else "nothing"
        raise SettingsError(f"setting 'own_controls' names {said}: give some of {', '.join(OWN_CONTROLS)}, or none")
    return tuple("shuffled pairs" if name == "shuffled" else name for name in OWN_CONTROLS if name in named)


def places_of(request: Request) -> tuple[Place, ...]:
    """Return where the models are compared; `SettingsError` where a place does not exist, is one model's, or is written by no one."""
    from mechscope.features.places import places

    anatomy = request.pair.base.anatomy
    where = places(request.settings.places or f"resid{max(0, anatomy.n_layers // 2 - 1)}")
    for place in where:
        if place.model:
            raise SettingsError(f"setting 'places' names {place}: name the place alone, it is read in both models")
        if place.site == "mlp_input":
            raise SettingsError(
                f"setting 'places' names {place}, which an MLP reads and no one writes: name what is written, such as m{place.layer}"
            )
        place.check(request.pair.base)
    if len(set(where)) < len(where):
        raise SettingsError(f"setting 'places' names a place twice: {request.settings.places}")
    return where


def compared(request: Request) -> tuple[Comparison, ...]:
    """Return the dictionaries that are trained."""
    from mechscope.features.diffing import comparisons

    others = {f"other{number}": (control.name, control.kind) for number, control in enumerate(request.controls)}
    return comparisons(own_controls(request.settings), others, difference=request.settings.difference)


def file_names(several: tuple[Comparison, ...]) -> dict[str, Comparison]:
    """Return comparisons by the names of their files.

    Raises:
        SettingsError: Two would share a file.
    """
    named = {re.sub(r"[^A-Za-z0-9_.]+", "-", each.name): each for each in several}
    if len({name.lower() for name in named}) < len(several):
        raise SettingsError(
            f"the controls {', '.join(each.name for each in several if each.control)} would share a file: name them differently"
        )
    return named


def plans(request: Request) -> dict[str, Plan]:
    """Return the plans of the dictionaries, by the names of their files.

    Raises:
        SettingsError: They contradict themselves or the models.
    """
    from mechscope.features import Plan, Rule
    from mechscope.features.objective import checked

    settings, where, base = request.settings, places_of(request), request.pair.base
    widths, found = [place.width(base) for place in where], dict[str, Plan]()
    for name, comparison in file_names(compared(request)).items():
        # of differences there is one decoder, whose norm says nothing
        two = len(comparison.views) > 1
        rule = Rule("batchtopk", settings.k, by_norm=two) if settings.rule == "batchtopk" else Rule(settings.rule)
        layout = comparison.layout(where, widths, settings.latents, rule)
        # what is found again in the other half must not hang on the first weights either
        seed = request.run.settings.seed + 1 if comparison.control == "half" else None
        # equal models with equal decoders would learn the same at every step: none could be new, whatever training does by chance
        apart = comparison.control == "same"
        found[name] = Plan(layout, checked(replace(settings.objective, norms="free" if two else "unit"), layout), seed=seed, apart=apart)
    return found


def check(request: Request) -> None:
    """Refuse what does not fit, before anything expensive.

    Raises:
        MechscopeError: Models that are equal, settings, texts or places that do not fit.
    """
    from mechscope.data.scoring import check_fits
    from mechscope.features.diffing.classes import check_thresholds

    both = request.pair
    if both.base.fingerprint == both.tuned.fingerprint:
        raise ModelError(
            f"base and tuned model have the same weights ({both.tuned.source!r}): nothing was added; give the fine-tuned model"
        )
    check_thresholds(request.settings.exclusive)
    plans(request)
    for subject in (both.base, both.tuned):
        for texts in (request.learned, request.judged):
            check_fits(subject, texts)
    _plant(request, request.texts.learned)


def models_of(request: Request) -> dict[str, Subject]:
    """Return the two models and further trainings, by the names that places have."""
    both = request.pair
    others = {f"other{number}": load_control(request.run, both.base, control).tuned for number, control in enumerate(request.controls)}
    return {"base": both.base, "tuned": both.tuned, **others}


def _file(request: Request, name: str) -> Path:
    return request.run.folder.path / "dictionaries" / f"{name}.safetensors"


def train_all(request: Request) -> Tables:
    """Harvest once, train every dictionary on it at once, and keep them in the run folder."""
    import pandas as pd

    from mechscope.features import Live, harvest, train
    from mechscope.features.diffing import Views, model_places, require_change
    from mechscope.features.diffing.cost import cost_of

    settings, wanted, where, texts, models = request.settings, plans(request), places_of(request), request.texts, models_of(request)
    scratch = request.run.stage.path("features")

    def source(name: str, some: Pairs, names: list[str]) -> Any:
        given = {each: models[each] for each in names}
        options: dict[str, Any] = {"settings": settings.harvest, "execution": request.run.execution}
        if settings.live:
            return Live(given, some, model_places(where, names), **options)
        return harvest(given, some, model_places(where, names), scratch / name, **options)

    def views(first: Any, other: Any) -> Views:
        return Views(first, texts.learned, _recipe(request, first, texts.learned), other=other)

    probe = Live(models, texts.learned, model_places(where, list(models)), settings=settings.harvest, execution=request.run.execution)
    require_change(probe.reader, texts.learned, where, request.run.execution)
    everything = texts.learned if texts.other is None else replace(texts.learned, pairs=(*texts.learned.pairs, *texts.other.pairs))
    cost = cost_of(
        probe.reader,
        everything,
        list(wanted.values()),
        settings.training,
        sum(len(comparison.views) for comparison in compared(request)),
        rows=settings.harvest.rows,
        bytes_each=4 if settings.harvest.precision == "float32" else 2,
        live=settings.live,
        execution=request.run.execution,
    )
    log.log(
        logging.WARNING if cost.reading + cost.training > _LONG else logging.INFO,
        "%d dictionaries of %s latents: %s; a run that is stopped goes on where it was",
        len(wanted),
        f"{settings.latents:,}",
        cost,
    )
    base = request.pair.base
    if base.dtype.itemsize < 4:
        # measured: SmolLM2-135M behind block 15, root mean square of the change around the mean
        log.warning(
            "the models were read in %s, whose rounding adds up over the layers (bfloat16: to 2 %% of the activations in the middle of SmolLM2-135M); "
            "smaller differences say nothing",
            str(base.dtype).removeprefix("torch."),
            extra={"weakens": "feature_comparisons"},
        )
    first = source("activations", texts.learned, list(models))
    other = None if texts.other is None else source("other-half", texts.other, ["base", "tuned"])
    trained = train(
        views(first, other),
        wanted,
        scratch / "training",
        training=settings.training,
        keep_every=_KEPT_EVERY,
        device=request.pair.base.device,
        execution=request.run.execution,
    )
    rows, curves, named = [], [], file_names(compared(request))
    for file, each in trained.items():
        _file(request, file).parent.mkdir(parents=True, exist_ok=True)
        each.dictionary.save(_file(request, file))
        request.run.stage.add(_file(request, file))
        taken = {"steps": settings.training.steps, "tokens": settings.training.steps * settings.training.batch}
        name = named[file].name
        rows.append({**described(name, each.dictionary), **taken, **each.convergence.columns, "unconverged": each.convergence.reason})
        curves.append(each.curve.assign(dictionary=name))
    curve = pd.concat(curves, ignore_index=True)
    return {"dictionaries": pd.DataFrame(rows), "dictionary_training": curve[["dictionary", *(c for c in curve if c != "dictionary")]]}


def _plant(request: Request, texts: Pairs) -> Plant | None:
    from mechscope.features.diffing import Plant

    if "planted" not in own_controls(request.settings):
        return None
    given = request.settings.plant
    return Plant.chosen(texts, directions=given.directions, share=given.share, strength=given.strength, seed=request.run.settings.seed)


def _recipe(request: Request, source: Any, texts: Pairs) -> Recipe:
    from mechscope.features.diffing import Recipe
    from mechscope.features.diffing.comparisons import views_of

    where = places_of(request)
    rms = {place: 1 / source.affine(replace(place, model="base")).scale for place in where}
    return Recipe(where, views_of(compared(request)), _plant(request, texts), rms, request.run.settings.seed)


@dataclass(frozen=True)
class Trained:
    """The dictionaries by comparison, how their views are made, and what reads the models as training did."""

    dictionaries: dict[str, Dictionary]
    recipe: Recipe
    reader: Reader


def trained_of(request: Request, models: Mapping[str, Subject]) -> Trained:
    from mechscope.features import Dictionary, TokenSettings
    from mechscope.features.diffing import Recipe, model_places
    from mechscope.features.rows import Reader, limits_at

    named = file_names(compared(request))
    found = {each.name: Dictionary.load(_file(request, file)).to(request.pair.base.device) for file, each in named.items()}
    about = next(iter(found.values())).about
    recipe, harvest = Recipe.from_json(about["source"]["recipe"]), request.settings.harvest
    reader = Reader(models, model_places(recipe.places, list(models)), TokenSettings(first=harvest.first, outlier=harvest.outlier))
    reader.limits = limits_at(reader.places, about["limits"])
    return Trained(found, recipe, reader)
