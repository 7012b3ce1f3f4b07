"""`mechscope features train`: dictionaries of a model's activations, trained at several places and widths at once, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Gt, Lt

from mechscope import ranks
from mechscope.choices import RuleName
from mechscope.data.splits import held_out
from mechscope.errors import SettingsError
from mechscope.settings import Number, nested, setting
from mechscope.settings.features import FeatureTraining, HarvestSettings, Objective
from mechscope.studies import concepts
from mechscope.studies.concepts import LABELLED, Concepts
from mechscope.studies.dictionaries import Judged, LatentSettings, described, stages
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import layers_of, split_names
from mechscope.studies.run import JobRun, Tables
from mechscope.studies.texts import TEXTS, Texts

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs
    from mechscope.features import Plan, TrainedDictionary
    from mechscope.features.layout import Layout


@dataclass(frozen=True, kw_only=True)
class FeaturesTrainSettings(OneModel, Texts, Concepts):
    """Which dictionaries, of what, and on which texts they are learned and measured."""

    panel: ClassVar[str] = "Dictionaries"

    places: str | None = setting(
        None, "Places that get an autoencoder, such as resid6,m3,a6.z; by default the residual stream in the middle of the model."
    )
    transcoders: str | None = setting(None, 'Layers whose MLP gets a transcoder, such as "0-5".')
    cross_layer: str | None = setting(None, 'Layers of one cross-layer transcoder, such as "0-5".')
    skip: bool = setting(False, "Give transcoders a linear skip map.")
    latents: str = setting("4096", "Latents of a dictionary; several widths joined by commas give as many dictionaries.")
    rule: RuleName = setting("topk", "Which latents are active.")
    k: Number = setting(32, "Active latents of a token, for topk and batchtopk.")
    matryoshka: str | None = setting(None, "Sizes of nested dictionaries (Matryoshka) below the whole, joined by commas.")
    live: bool = setting(False, "Keep no activations on disk: the model runs again in every round of the training.")
    documents: Number = setting(2000, "Documents or prompts: those that are learned from and those that are measured on.")
    test_share: Annotated[float, Gt(0), Lt(1)] = setting(0.1, "Share of the texts that are measured on and not learned from.")
    objective: Objective = nested(Objective)
    training: FeatureTraining = nested(FeatureTraining)
    harvest: HarvestSettings = nested(HarvestSettings)
    latent: LatentSettings = nested(LatentSettings)


def _whole(name: str, text: str) -> list[int]:
    numbers = split_names(text)
    if not numbers or not all(number.isdigit() and int(number) for number in numbers):
        raise SettingsError(f"setting {name!r} is {text!r}: give whole numbers above zero, joined by commas, such as 1024,4096")
    return [int(number) for number in numbers]


def _layouts(run: JobRun[FeaturesTrainSettings], latents: int) -> list[Layout]:
    from mechscope.features import Rule, autoencoder, cross_layer, transcoder
    from mechscope.features.places import places

    settings, anatomy = run.settings, run.first.anatomy
    rule = Rule(settings.rule, settings.k if settings.rule in ("topk", "batchtopk") else None)
    layouts = []
    alone = not (settings.transcoders or settings.cross_layer)
    for place in places(settings.places or f"resid{max(0, anatomy.n_layers // 2 - 1)}") if settings.places or alone else ():
        layouts.append(autoencoder(place, place.check(run.first).width(run.first), latents, rule))
    for layer in layers_of(settings.transcoders, anatomy) if settings.transcoders else ():
        layouts.append(transcoder(layer, anatomy.d_model, latents, rule, skip=settings.skip))
    if settings.cross_layer:
        layouts.append(cross_layer(layers_of(settings.cross_layer, anatomy), anatomy.d_model, latents, rule))
    return layouts


def _name(layout: Layout, latents: int) -> str:
    inside, outside = (",".join(str(place) for place in part) for part in (layout.inputs, layout.outputs))
    if len(layout.inputs) > 1:
        return f"cross-layer-{latents}"
    return f"{inside}-{latents}" if inside == outside else f"{inside}-{outside}-{latents}"


def plans(run: JobRun[FeaturesTrainSettings]) -> dict[str, Plan]:
    """Return the dictionaries to train, by name.

    Raises:
        SettingsError: They contradict themselves or the model.
    """
    from mechscope.features import Plan
    from mechscope.features.objective import checked

    settings, found = run.settings, dict[str, Plan]()
    if settings.skip and not settings.transcoders:
        raise SettingsError("setting 'skip' is for transcoders: name their layers with 'transcoders', or leave it out")
    for latents in _whole("latents", settings.latents):
        below = _whole("matryoshka", settings.matryoshka) if settings.matryoshka else []
        objective = replace(settings.objective, prefixes=(*below, latents) if below else ())
        for layout in _layouts(run, latents):
            name = _name(layout, latents)
            if name in found:
                raise SettingsError(f"dictionary {name} is asked for twice: name every place and width once")
            checked(objective, layout)
            found[name] = Plan(layout, objective)
    return found


def _file(run: JobRun[FeaturesTrainSettings], name: str) -> Path:
    return run.folder.path / "dictionaries" / f"{name}.safetensors"


def _split(run: JobRun[FeaturesTrainSettings]) -> tuple[Pairs, Pairs]:
    return held_out(run[TEXTS], run.settings.test_share, run.settings.seed)


def _check(run: JobRun[FeaturesTrainSettings]) -> None:
    from mechscope.data.scoring import check_fits

    check_fits(run.first, run[TEXTS])
    plans(run)
    _split(run)


def _trained(run: JobRun[FeaturesTrainSettings], texts: Pairs, wanted: Mapping[str, Plan]) -> dict[str, TrainedDictionary]:
    from mechscope.features import Live, harvest, train, train_end_to_end

    settings, scratch = run.settings, run.stage.path("features")
    if settings.objective.end != "none":
        return train_end_to_end(
            run.first,
            texts,
            wanted,
            scratch / "training",
            training=settings.training,
            tokens=settings.harvest,
            execution=run.execution,
        )
    where = tuple(dict.fromkeys(place for plan in wanted.values() for place in plan.layout.places))
    source = (
        Live(run.first, texts, where, settings=settings.harvest, execution=run.execution)
        if settings.live
        else harvest(run.first, texts, where, scratch / "activations", settings=settings.harvest, execution=run.execution)
    )
    return train(source, wanted, scratch / "training", training=settings.training, device=run.first.device, execution=run.execution)


def _train(run: JobRun[FeaturesTrainSettings]) -> Tables:
    import pandas as pd

    settings, wanted = run.settings, plans(run)
    texts, _ = _split(run)
    trained = _trained(run, texts, wanted)
    rows, curves = [], []
    for name, each in trained.items():
        ranks.by_first(partial(each.dictionary.save, _file(run, name)))
        run.stage.add(_file(run, name))
        taken = {"steps": settings.training.steps, "tokens": settings.training.steps * settings.training.batch}
        rows.append({**described(name, each.dictionary), **taken, **each.convergence.columns, "unconverged": each.convergence.reason})
        curves.append(each.curve.assign(dictionary=name))
    curve = pd.concat(curves, ignore_index=True)
    return {"dictionaries": pd.DataFrame(rows), "dictionary_training": curve[["dictionary", *(c for c in curve if c != "dictionary")]]}


def _judged(run: JobRun[FeaturesTrainSettings]) -> Judged:
    from mechscope.features import Dictionary

    names = run.table("dictionaries")["dictionary"]
    return Judged({name: Dictionary.load(_file(run, name)).to(run.first.device) for name in names}, _split(run)[1], None)


_SPLIT = ("test_share", "seed")
_PLANS = ("places", "transcoders", "cross_layer", "skip", "latents", "rule", "k", "matryoshka", "live", "objective", "training", "harvest")
TRAINING = Stage(name="training", work=_train, hangs_on=(*_PLANS, *_SPLIT), inputs=(MODELS, TEXTS))
MEASURES, LATENTS = stages(_judged, hangs_on=_SPLIT, after=(TRAINING,))
CONCEPTS, SPLITTING = concepts.stages(_judged, hangs_on=_SPLIT, inputs=(TEXTS,), after=(TRAINING,))


def _title(names: Mapping[str, str]) -> str:
    return f"Dictionaries of features of {names['model']}"


JOB = Job(
    name="features-train",
    help="Train dictionaries of features (sparse autoencoders, transcoders) at several places and widths at once, and measure them beside controls.",
    panel="features",
    group="features",
    example="mechscope features train gpt2 --data articles.jsonl --places resid6 --latents 4096,16384 --out runs/features",
    settings=FeaturesTrainSettings,
    arguments=("model",),
    inputs=(MODELS, TEXTS, LABELLED),
    stages=(TRAINING, MEASURES, CONCEPTS, SPLITTING, LATENTS),
    sections=("dictionaries", "concepts", "splitting"),
    title=_title,
    check=_check,
)
