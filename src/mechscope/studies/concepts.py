"""What latents stand for, and how dictionaries relate to one another: scores on texts of which something is known, and latents found again in others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope.errors import DataError
from mechscope.settings import Number, Settings, nested, setting
from mechscope.settings.features import ConceptSettings
from mechscope.studies.dictionaries import Judged, control_rows, controls_of, same_places
from mechscope.studies.inputs import MODELS
from mechscope.studies.job import Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.data.labels import Labelled
    from mechscope.features import Dictionary


@dataclass(frozen=True, kw_only=True)
class Concepts(Settings):
    """On which texts it is measured what latents stand for."""

    panel: ClassVar[str] = "Concepts"

    concepts: str | None = setting(
        None,
        "Texts of which something is known, to measure what latents stand for (sparse probing, SCR, TPP, absorption): newsroom, or files with a column text or "
        "document joined by commas, which are told apart by columns of few values and by which file a text is of.",
    )
    labelled_texts: Number = setting(400, "Such texts at most.")
    concept: ConceptSettings = nested(ConceptSettings)


def _labelled(run: JobRun[Any]) -> Labelled | None:
    from mechscope.data.labels import read_labelled

    settings, subject = run.settings, run.first
    if settings.concepts is None:
        return None
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which labelled texts need: load it with one")
    longest = min(settings.max_tokens, subject.anatomy.max_positions)
    return read_labelled(settings.concepts, subject.tokenizer, limit=settings.labelled_texts, max_tokens=longest, seed=settings.seed)


LABELLED: Input[Labelled | None] = Input(
    "labelled",
    _labelled,
    lambda found: "" if found is None else found.hash,
    lambda found: {} if found is None else {"labelled": {"source": found.texts.source, "texts": len(found.texts), "hash": found.hash}},
)
"""Texts of which something is known, or None."""


def stages(
    judged: Callable[[JobRun[Any]], Judged], *, hangs_on: tuple[str, ...], inputs: tuple[Input[Any], ...], after: tuple[Stage, ...] = ()
) -> tuple[Stage, Stage]:
    """Return the stages that score concepts and that look for the latents of dictionaries in others, for a job with the settings `Concepts`.

    Args:
        judged: Returns the job's dictionaries.
        hangs_on: Settings that decide which they are and what is read.
        inputs: What is loaded beside model and labelled texts and decides the result.
        after: Stages that make the dictionaries.
    """
    concepts = Stage(
        name="concepts",
        work=lambda run: _score(run, judged(run)),
        hangs_on=(*hangs_on, "concept", "seed"),
        inputs=(MODELS, LABELLED, *inputs),
        after=after,
        when=lambda settings: settings.concepts is not None,
    )
    splitting = Stage(
        name="splitting",
        work=lambda run: _split(run, judged(run)),
        hangs_on=(*hangs_on, "seed"),
        inputs=(MODELS, *inputs),
        after=after,
        alone=True,
    )
    return concepts, splitting


def _score(run: JobRun[Any], judged: Judged) -> Tables:
    import pandas as pd

    from mechscope.features import concept_scores_of_sets

    labelled = run[LABELLED]
    if labelled is None:
        return {}
    made_of = control_rows(run, judged)
    found = concept_scores_of_sets(
        run.first,
        {
            name: {"": dictionary, **controls_of(dictionary, made_of.pop(name), seed=run.settings.seed)}
            for name, dictionary in judged.dictionaries.items()
        },
        labelled,
        settings=run.settings.concept,
        tokens=judged.tokens,
        other_model=True,
        execution=run.execution,
    )
    rows = [table.assign(dictionary=name, control=control) for name, of_set in found.items() for control, table in of_set.items()]
    table = pd.concat(rows, ignore_index=True)
    first = ["dictionary", "control"]
    return {"dictionary_concepts": table[[*first, *(name for name in table if name not in first)]]}


def _split(run: JobRun[Any], judged: Judged) -> Tables:
    import pandas as pd

    from mechscope.features import splitting

    rows = []
    for name, other, one, two, parts in _pairs(judged):
        latents, others = (None, None) if parts is None else (range(*parts[0]), range(*parts[1]))
        found = splitting(one, two, latents=latents, others=others, seed=run.settings.seed)
        rows.append(found.assign(dictionary=name, against=other)[["dictionary", "against", *found]])
    return {"dictionary_splitting": pd.concat(rows, ignore_index=True)} if rows else {}


Parts = tuple[tuple[int, int], tuple[int, int]]


def _pairs(judged: Judged) -> Iterator[tuple[str, str, Dictionary, Dictionary, Parts | None]]:
    """Yield what is compared: the parts of nested dictionaries, each with the next; dictionaries of the same places, the narrower with the wider one."""
    for name, dictionary in judged.dictionaries.items():
        plan = dictionary.about.get("plans", {}).get(name, {}) if isinstance(dictionary.about.get("plans"), dict) else {}
        ends = (0, *plan.get("objective", {}).get("prefixes", ()))
        for (start, middle), (_, stop) in pairwise(pairwise(ends)):
            first, second = f"{name}, latents {start} to {middle - 1}", f"{name}, latents {middle} to {stop - 1}"
            yield first, second, dictionary, dictionary, ((start, middle), (middle, stop))
    named = list(judged.dictionaries.items())
    for name, one in named:
        for other, two in named:
            # with --against what is asked for; else by width
            asked = name not in judged.against and other in judged.against if judged.against else one.latents < two.latents
            if asked and same_places(one, two):
                yield name, other, one, two, None
