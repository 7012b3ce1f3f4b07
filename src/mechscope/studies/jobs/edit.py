"""`mechscope edit`: change what a model knows, fact by fact, and measure what else changed, beside controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mechscope.errors import DataError, SettingsError
from mechscope.settings import Count, Number, Rate, setting
from mechscope.studies.groups import OneModel
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import layers_of, split_names
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.data.pairs import Pairs
    from mechscope.edit import Delta, Make, Request, Requests, Setting
    from mechscope.subject import Subject

_SPREAD = ("memit", "alphaedit")
_EDIT = "the edit"


@dataclass(frozen=True, kw_only=True)
class EditSettings(OneModel):
    """Which facts, where and how they are written, and what they are measured beside."""

    panel: ClassVar[str] = "Editing"

    edits: str = setting(
        ...,
        "Facts to change: a JSONL file in CounterFact's format (subject, prompt with {} for it, target_new; target_true, paraphrase_prompts, "
        "neighborhood_prompts if known).",
    )
    method: Literal["rome", "memit", "alphaedit", "finetune"] = setting(
        "rome", "How: rome (one layer), memit or alphaedit (spread over layers), finetune (bounded; the baseline)."
    )
    layers: str | None = setting(
        None,
        'Layers that are edited: one ("5"), or several of memit and alphaedit ("3-5"). By default the one whose MLP causal tracing finds to recall most '
        "at the subject's last token, which needs target_true.",
    )
    data: str = setting(
        "newsroom", "Ordinary texts, for the keys that shall stay and for the loss: a file with a column text, a hub data set, or newsroom."
    )
    texts: Number = setting(100, "Texts that keys are read from; more than that for their loss.")
    held_out: Number = setting(20, "Further texts, whose loss before and after an edit is compared.")
    max_tokens: Number = setting(128, "Most tokens of such a text.")
    limit: Number | None = setting(None, "Edits at most.")
    beginnings: Count = setting(10, "Starts of texts that stand before the prompt while a value is looked for.")
    steps: Number = setting(25, "Steps of the search at most.")
    weight: Rate | None = setting(
        None, "Of memit: how many tokens of the texts one edit is weighed against; by default a tenth of the width of the MLP."
    )
    free: Rate = setting(0.1, "Of alphaedit: directions that keys use less than this share of the mean are free.")
    bound: Rate = setting(5e-4, "Of finetune: most that a weight moves.")
    controls: Count = setting(10, "Edits that are also made with C = I, in a random layer, and at another subject's key; 0 for none.")
    sequence: str = setting("1,10,50", "Make edits one upon the other too, and measure after so many; empty for not.")
    keys: str | None = setting(None, "Folder in which what keys a model sees is kept for other runs; by default this run's.")
    merge: bool = setting(
        False, "Also write the model with the edits of the sequence in its weights, as a folder that from_pretrained reads."
    )

    @property
    def counts(self) -> tuple[int, ...]:
        """After how many edits of the sequence is measured; raises SettingsError where that is not understood."""
        parts = split_names(self.sequence)
        if not all(part.isdecimal() and int(part) for part in parts):
            raise SettingsError(f"setting 'sequence' is {self.sequence!r}: write numbers of edits joined by commas, such as 1,10,50")
        return tuple(map(int, parts))


def _requests(run: JobRun[EditSettings]) -> Requests:
    from mechscope.edit import Requests, check_requests, read_requests

    source, subject = run.source("edits"), run.first
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which edits need: load it with one")
    requests = source if isinstance(source, Requests) else read_requests(source, limit=run.settings.limit)
    check_requests(requests, subject.tokenizer, subject.anatomy.max_positions)
    return requests


REQUESTS: Input[Requests] = Input(
    "edits",
    _requests,
    lambda requests: requests.hash,
    lambda requests: {"edits": {"source": requests.source, "edits": len(requests), "hash": requests.hash}},
)
"""Facts to change."""


def _ordinary(run: JobRun[EditSettings]) -> Pairs:
    from mechscope.data.text_files import read_texts

    settings, subject = run.settings, run.first
    longest = min(settings.max_tokens, subject.anatomy.max_positions)
    number = settings.texts + settings.held_out
    texts = read_texts(settings.data, subject.tokenizer, limit=number, max_tokens=longest, seed=settings.seed)
    if len(texts) <= settings.held_out:
        raise DataError(f"{settings.data} has {len(texts)} texts, of which {settings.held_out} are held out: give more, or lower held_out")
    return texts


ORDINARY: Input[Pairs] = Input(
    "texts", _ordinary, lambda texts: texts.hash, lambda texts: {"data": {"source": texts.source, "texts": len(texts), "hash": texts.hash}}
)
"""Ordinary texts: the last of them are held out."""


def _check(run: JobRun[EditSettings]) -> None:
    from mechscope.edit import Spelled, down_map

    settings, subject = run.settings, run.first
    _ = run[REQUESTS], run[ORDINARY], settings.counts
    if settings.merge and not settings.counts:
        raise SettingsError("merge writes the model with the edits of the sequence: name how many in sequence")
    layers = layers_of(settings.layers, subject.anatomy)
    for layer in layers:
        down_map(subject, layer)
    if settings.layers is None:
        Spelled(subject.tokenizer).traced(run[REQUESTS])
    elif len(layers) > 1 and settings.method not in _SPREAD:
        raise SettingsError(
            f"{settings.method} edits one layer, {settings.layers!r} names {len(layers)}: name one, or use memit or alphaedit"
        )


def _traced(run: JobRun[EditSettings]) -> Tables:
    from mechscope.causal import causal_trace
    from mechscope.edit import Spelled

    pairs = Spelled(run.first.tokenizer).traced(run[REQUESTS])
    window = min(3, run.first.anatomy.n_layers)
    effects = causal_trace(run.first, pairs, site="mlp", window=window, samples=4, execution=run.execution)
    run.folder.record("notes", effects.notes)
    return {"trace": effects.table}


def _layers(run: JobRun[EditSettings]) -> tuple[int, ...]:
    """Return the layers that were named, or the one that tracing found."""
    if run.settings.layers is not None:
        return layers_of(run.settings.layers, run.first.anatomy)
    rows = run.table("trace")
    last = rows[(rows["positions"] == "last subject token") & rows["effect"].notna()]
    if last.empty:
        raise DataError("causal tracing measured nothing at the subjects' last tokens: name the layer")
    return (int(last["layer"].to_numpy()[last["effect"].to_numpy().argmax()]),)


def _edited(run: JobRun[EditSettings]) -> Tables:
    import pandas as pd

    from mechscope.data.pairs import Pairs
    from mechscope.edit import Search, Setting, edit_alone, edit_in_sequence, kept_key_moments, save_edited, summary

    settings, subject, requests, ordinary = run.settings, run.first, run[REQUESTS], run[ORDINARY]
    seen, held = (Pairs(ordinary.pairs[part], ordinary.source) for part in (slice(-settings.held_out), slice(-settings.held_out, None)))
    layers = _layers(run)
    others = _other_layers(subject, layers, settings.seed)
    folder = Path(settings.keys) if settings.keys is not None else run.folder.path / "keys"
    moments = kept_key_moments(folder, subject, seen, layers={*layers, *others}, execution=run.execution)
    search = Search(steps=settings.steps)
    setting = Setting.of(subject, moments, seen, number=settings.beginnings, seed=settings.seed, search=search)
    alone, deltas = edit_alone(subject, requests, _make(settings, setting, layers), texts=held, execution=run.execution)
    arms: dict[str, tuple[pd.DataFrame, Sequence[int]]] = {_EDIT: (alone, layers)}
    some = replace(requests, requests=requests.requests[: settings.controls])
    for name, changed, where in _controls(settings, setting, some, layers, others):
        arms[name] = (edit_alone(subject, some, _make(settings, changed, where), texts=held, execution=run.execution)[0], where)
    about = {own.id: own for own in requests.requests}
    tables = {
        "edits": pd.concat([_named(table, name, settings, where, about) for name, (table, where) in arms.items()], ignore_index=True),
        "edit_measures": pd.concat(
            [_named(summary(table, seed=settings.seed), name, settings, where) for name, (table, where) in arms.items()], ignore_index=True
        ),
    }
    _save(run, "edits", deltas)
    if settings.counts:
        counts = {*settings.counts, len(requests)} if max(settings.counts) > len(requests) else settings.counts
        make = _make(settings, setting, layers)
        sequence, stacked = edit_in_sequence(subject, requests, make, counts=counts, texts=held, execution=run.execution)
        tables["edit_sequence"] = _named(sequence, _EDIT, settings, layers).drop(columns="arm")
        _save(run, "sequence", stacked)
        if settings.merge:
            save_edited(subject, run.folder.path / "edited", *stacked)
            run.stage.add(run.folder.path / "edited")
    return tables


def _make(settings: EditSettings, setting: Setting, layers: Sequence[int]) -> Make:
    from mechscope.edit import alphaedit, finetune, memit, rome

    def make(subject: Subject, request: Request, earlier: Sequence[Request]) -> Delta:
        match settings.method:
            case "memit":
                return memit(subject, [request], setting, layers=layers, weight=settings.weight)
            case "alphaedit":
                return alphaedit(subject, [request], setting, layers=layers, free=settings.free, earlier=earlier)
            case "finetune":
                return finetune(subject, request, setting, layer=layers[0], steps=settings.steps, bound=settings.bound, rate=settings.bound)
            case _:
                return rome(subject, request, setting, layer=layers[0])

    return make


def _other_layers(subject: Subject, layers: Sequence[int], seed: int) -> tuple[int, ...]:
    """Return as many layers at random that are not edited, as far as there are such that can be; none where there are none."""
    import numpy as np

    blocks = subject.anatomy.blocks
    left = [layer for layer in range(subject.anatomy.n_layers) if layer not in layers and blocks[layer].last_map is not None]
    drawn = np.random.default_rng(seed).permutation(left)[: len(layers)]
    return tuple(sorted(map(int, drawn)))


def _controls(
    settings: EditSettings, setting: Setting, requests: Requests, layers: Sequence[int], others: Sequence[int]
) -> list[tuple[str, Setting, Sequence[int]]]:
    """Return the control arms: their names, what their edits share, and their layers."""
    if not len(requests):
        return []
    arms: list[tuple[str, Setting, Sequence[int]]] = []
    if settings.method in ("rome", "memit"):
        arms.append(("C = identity", replace(setting, moments=setting.moments.as_identity()), layers))
    if others:
        arms.append(("random layer", setting, others))
    names = [own.subject for own in requests.requests]
    turned = {own.id: names[(at + 1) % len(names)] for at, own in enumerate(requests.requests)}
    if all(turned[own.id] != own.subject for own in requests.requests):
        arms.append(("other subject", replace(setting, subjects=turned), layers))
    return arms


def _named(
    table: pd.DataFrame, arm: str, settings: EditSettings, layers: Sequence[int], about: Mapping[str, Request] | None = None
) -> pd.DataFrame:
    named = {"arm": arm, "method": settings.method, "layers": ",".join(map(str, layers))}
    known: dict[str, list[Any]] = {}
    if about is not None:
        known = {key: [getattr(about[own], key) for own in table["id"]] for key in ("subject", "new", "true")}
    made = table.assign(**named, **known)
    first = [*named, *(["id"] if about is not None else []), *known]
    return made[[*first, *(column for column in table if column not in first)]]


def _save(run: JobRun[EditSettings], name: str, deltas: Sequence[Delta]) -> None:
    folder = run.folder.path / name
    for at, delta in enumerate(deltas, start=1):
        delta.save(folder / f"{at:04d}.safetensors")
    if deltas:
        run.stage.add(folder)


TRACED = Stage(name="trace", work=_traced, hangs_on=("seed",), inputs=(MODELS, REQUESTS), when=lambda settings: settings.layers is None)
_HANGS_ON = (
    "method",
    "layers",
    "texts",
    "held_out",
    "beginnings",
    "steps",
    "weight",
    "free",
    "bound",
    "controls",
    "sequence",
    "merge",
    "seed",
)
EDITED = Stage(name="edit", work=_edited, hangs_on=_HANGS_ON, inputs=(MODELS, REQUESTS, ORDINARY), after=(TRACED,), alone=True)


def _title(names: Mapping[str, str]) -> str:
    return f"Facts edited in {names['model']}"


JOB = Job(
    name="edit",
    help="Change facts in a model's weights and measure what else changed: other ways of asking, neighbours, ordinary text; beside controls.",
    panel="intervene",
    example="mechscope edit gpt2 edits.jsonl --method rome --layers 5 --out runs/edit",
    settings=EditSettings,
    arguments=("model", "edits"),
    inputs=(MODELS, REQUESTS, ORDINARY),
    stages=(TRACED, EDITED),
    sections=("edit", "trace"),
    title=_title,
    check=_check,
    function="edit_facts",
)
