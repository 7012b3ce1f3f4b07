"""What fine-tuning added, by dictionaries: which are trained, on which texts, and their training on one harvest, both models' and every control's at once."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechscope.errors import ModelError, SettingsError
from mechscope.studies.controls import load_control, named_controls
from mechscope.studies.dictionaries import described
from mechscope.studies.inputs import CORPUS, PAIR
from mechscope.studies.pairs import held_out, split_names
from mechscope.studies.run import JobRun, Tables

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs
    from mechscope.features import Dictionary, Plan
    from mechscope.features.diffing import Comparison, Plant, Recipe
    from mechscope.features.places import Place
    from mechscope.features.rows import Reader
    from mechscope.subject import Subject

log = logging.getLogger(__name__)

OWN_CONTROLS = ("same", "half", "planted", "shuffled")
# what takes longer than this is said without being asked
_LONG = 600.0


def own_controls(settings: Any) -> tuple[str, ...]:
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


def places_of(run: JobRun[Any]) -> tuple[Place, ...]:
    """Return where the models are compared; `SettingsError` where a place does not exist, is one model's, or is written by no one."""
    from mechscope.features.places import places

    anatomy = run[PAIR].base.anatomy
    where = places(run.settings.places or f"resid{max(0, anatomy.n_layers // 2 - 1)}")
    for place in where:
        if place.model:
            raise SettingsError(f"setting 'places' names {place}: name the place alone, it is read in both models")
        if place.site == "mlp_input":
            raise SettingsError(
                f"setting 'places' names {place}, which an MLP reads and no one writes: name what is written, such as m{place.layer}"
            )
        place.check(run[PAIR].base)
    if len(set(where)) < len(where):
        raise SettingsError(f"setting 'places' names a place twice: {run.settings.places}")
    return where


def compared(run: JobRun[Any]) -> tuple[Comparison, ...]:
    """Return the dictionaries that are trained."""
    from mechscope.features.diffing import comparisons

    others = {f"other{number}": (control.name, control.kind) for number, control in enumerate(named_controls(run.settings))}
    return comparisons(own_controls(run.settings), others, difference=run.settings.difference)


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


def plans(run: JobRun[Any]) -> dict[str, Plan]:
    """Return the plans of the dictionaries, by the names of their files.

    Raises:
        SettingsError: They contradict themselves or the models.
    """
    from mechscope.features import Plan, Rule
    from mechscope.features.objective import checked

    settings, where, base = run.settings, places_of(run), run[PAIR].base
    widths, found = [place.width(base) for place in where], dict[str, Plan]()
    for name, comparison in file_names(compared(run)).items():
        # of differences there is one decoder, whose norm says nothing
        two = len(comparison.views) > 1
        rule = Rule("batchtopk", settings.k, by_norm=two) if settings.rule == "batchtopk" else Rule(settings.rule)
        layout = comparison.layout(where, widths, settings.latents, rule)
        found[name] = Plan(layout, checked(replace(settings.objective, norms="free" if two else "unit"), layout))
    return found


@dataclass(frozen=True)
class _Texts:
    """Texts that are learned from, those of the other half (None where they are not apart), and those that are judged on."""

    learned: Pairs
    other: Pairs | None
    judged: Pairs


def texts_of(run: JobRun[Any]) -> _Texts:
    """Return the documents, split."""
    learned, judged = held_out(run[CORPUS].pairs, run.settings.test_share, run.settings.seed)
    if "half" not in own_controls(run.settings):
        return _Texts(learned, None, judged)
    other, first = held_out(learned, 0.5, run.settings.seed + 1)
    return _Texts(first, other, judged)


def check(run: JobRun[Any]) -> None:
    """Refuse what does not fit, before anything expensive.

    Raises:
        MechscopeError: Models that are equal, settings, texts or places that do not fit.
    """
    from mechscope.data.scoring import check_fits
    from mechscope.features.diffing.classes import check_thresholds

    both = run[PAIR]
    if both.base.fingerprint == both.tuned.fingerprint:
        raise ModelError(
            f"base and tuned model have the same weights ({both.tuned.source!r}): nothing was added; give the fine-tuned model"
        )
    check_thresholds(run.settings.exclusive)
    plans(run)
    for subject in (both.base, both.tuned):
        check_fits(subject, run[CORPUS].pairs)
    _plant(run, texts_of(run).learned)


def models_of(run: JobRun[Any]) -> dict[str, Subject]:
    """Return the two models and further trainings, by the names that places have."""
    both = run[PAIR]
    others = {f"other{number}": load_control(run, both.base, control).tuned for number, control in enumerate(named_controls(run.settings))}
    return {"base": both.base, "tuned": both.tuned, **others}


def _file(run: JobRun[Any], name: str) -> Path:
    return run.folder.path / "dictionaries" / f"{name}.safetensors"


def train_all(run: JobRun[Any]) -> Tables:
    """Harvest once, train every dictionary on it at once, and keep them in the run folder."""
    import pandas as pd

    from mechscope.features import Live, harvest, train
    from mechscope.features.diffing import Views, model_places
    from mechscope.features.diffing.cost import cost_of

    settings, wanted, where, texts, models = run.settings, plans(run), places_of(run), texts_of(run), models_of(run)
    scratch = run.stage.path("features")

    def source(name: str, some: Pairs, names: list[str]) -> Any:
        given = {each: models[each] for each in names}
        options: dict[str, Any] = {"settings": settings.harvest, "execution": run.execution}
        if settings.live:
            return Live(given, some, model_places(where, names), **options)
        return harvest(given, some, model_places(where, names), scratch / name, **options)

    def views(first: Any, other: Any) -> Views:
        return Views(first, texts.learned, _recipe(run, first, texts.learned), other=other)

    probe = Live(models, texts.learned, model_places(where, list(models)), settings=settings.harvest, execution=run.execution)
    everything = texts.learned if texts.other is None else replace(texts.learned, pairs=(*texts.learned.pairs, *texts.other.pairs))
    cost = cost_of(
        probe.reader,
        everything,
        list(wanted.values()),
        settings.training,
        sum(len(comparison.views) for comparison in compared(run)),
        rows=settings.harvest.rows,
        bytes_each=4 if settings.harvest.precision == "float32" else 2,
        live=settings.live,
        execution=run.execution,
    )
    log.log(
        logging.WARNING if cost.reading + cost.training > _LONG else logging.INFO,
        "%d dictionaries of %s latents: %s; a run that is stopped goes on where it was",
        len(wanted),
        f"{settings.latents:,}",
        cost,
    )
    first = source("activations", texts.learned, list(models))
    other = None if texts.other is None else source("other-half", texts.other, ["base", "tuned"])
    trained = train(
        views(first, other), wanted, scratch / "training", training=settings.training, device=run.first.device, execution=run.execution
    )
    rows, curves, named = [], [], file_names(compared(run))
    for file, each in trained.items():
        _file(run, file).parent.mkdir(parents=True, exist_ok=True)
        each.dictionary.save(_file(run, file))
        run.stage.add(_file(run, file))
        taken = {"steps": settings.training.steps, "tokens": settings.training.steps * settings.training.batch}
        name = named[file].name
        rows.append({**described(name, each.dictionary), **taken, **each.convergence.columns, "unconverged": each.convergence.reason})
        curves.append(each.curve.assign(dictionary=name))
    curve = pd.concat(curves, ignore_index=True)
    return {"dictionaries": pd.DataFrame(rows), "dictionary_training": curve[["dictionary", *(c for c in curve if c != "dictionary")]]}


def _plant(run: JobRun[Any], texts: Pairs) -> Plant | None:
    from mechscope.features.diffing import Plant

    if "planted" not in own_controls(run.settings):
        return None
    given = run.settings.plant
    return Plant.chosen(texts, directions=given.directions, share=given.share, strength=given.strength, seed=run.settings.seed)


def _recipe(run: JobRun[Any], source: Any, texts: Pairs) -> Recipe:
    from mechscope.features.diffing import Recipe
    from mechscope.features.diffing.comparisons import views_of

    settings, where = run.settings, places_of(run)
    rms = {place: 1 / source.affine(replace(place, model="base")).scale for place in where}
    return Recipe(where, views_of(compared(run)), _plant(run, texts), rms, settings.seed)


@dataclass(frozen=True)
class Trained:
    """The dictionaries by comparison, how their views are made, and what reads the models as training did."""

    dictionaries: dict[str, Dictionary]
    recipe: Recipe
    reader: Reader


def trained_of(run: JobRun[Any], models: Mapping[str, Subject]) -> Trained:
    from mechscope.features import Dictionary, TokenSettings
    from mechscope.features.diffing import Recipe, model_places
    from mechscope.features.rows import Reader

    named = file_names(compared(run))
    found = {each.name: Dictionary.load(_file(run, file)).to(run.first.device) for file, each in named.items()}
    about = next(iter(found.values())).about
    recipe, harvest = Recipe.from_json(about["source"]["recipe"]), run.settings.harvest
    reader = Reader(models, model_places(recipe.places, list(models)), TokenSettings(first=harvest.first, outlier=harvest.outlier))
    reader.limits = {place: about["limits"][place.name] for place in reader.places if place.name in about["limits"]}
    return Trained(found, recipe, reader)
