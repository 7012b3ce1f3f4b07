"""`mechscope das`: which directions of a representation carry a variable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from mechscope.choices import Among, VectorSite
from mechscope.data.splits import held_out
from mechscope.settings import Count, Number, Rate, setting
from mechscope.studies.groups import OneModel, PromptPairs
from mechscope.studies.inputs import MODELS, PAIRS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs, layers_of, one_position
from mechscope.studies.run import JobRun, Tables

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs


@dataclass(frozen=True, kw_only=True)
class DasSettings(OneModel, PromptPairs):
    """Where a subspace is sought, how it is learned, and what it is judged on."""

    panel: ClassVar[str] = "Alignment search"

    reads: Literal["corrupt", "clean"] = setting(
        "corrupt",
        "The text that is read; a part of its representation is exchanged for the other text's, after which the answers should be right. With corrupt the "
        "pairs of other commands serve as they are; with clean the answers must be those of the corrupt text's variable.",
    )
    site: VectorSite = setting("residual", "What is exchanged a part of.")
    layers: str | None = setting(None, 'Layers, each with a subspace of its own: e.g. "0-3,5"; by default all.')
    head: Count | None = setting(None, "Which head, with --site head.")
    position: str = setting("last", "Tokens that are exchanged: last, changed, all, a segment, or numbers joined by commas.")
    dimensions: Number = setting(8, "Dimensions of the subspace.")
    boundless: bool = setting(False, "Learn the number of dimensions too, instead of --dimensions.")
    controls: Count = setting(3, "Random subspaces of equal size, per layer: the control.")
    among: Among = setting(
        "vocabulary", "An exchange succeeds if an answer is the likeliest of the whole vocabulary, or of right and wrong answers."
    )
    test_share: Annotated[float, Gt(0), Lt(1)] = setting(0.3, "Share of the pairs that are judged on and not learned from.")
    epochs: Number = setting(100, "Passes over the pairs that are learned from; the table says whether the training converged.")
    learning_rate: Rate = setting(0.01, "Of Adam, falling linearly to zero.")
    size_penalty: Annotated[float, Ge(0)] = setting(1.0, "With --boundless: what all dimensions together cost, in nats.")


def _split(run: JobRun[DasSettings]) -> tuple[Pairs, Pairs]:
    """Return the pairs that are learned from and those that are judged on; their clean texts are the ones that are read."""
    pairs = run[PAIRS]
    if run.settings.reads == "corrupt":
        turned = tuple(replace(pair, clean=pair.corrupt, corrupt=pair.clean) for pair in pairs)
        pairs = replace(pairs, pairs=turned)
    return held_out(pairs, run.settings.test_share, run.settings.seed)


def _check(run: JobRun[DasSettings]) -> None:
    from mechscope.causal.interchange import judged_by

    settings = run.settings
    # the loss and the judgement both need a right answer, as `probability` does
    check_pairs(run.first, run[PAIRS], metric="probability", positions=(settings.position,))
    _, test = _split(run)
    judged_by(test, settings.among)
    layers_of(settings.layers, run.first.anatomy)


def _aligned(run: JobRun[DasSettings]) -> Tables:
    from mechscope.causal import das

    settings = run.settings
    train, test = _split(run)
    table = das(
        run.first,
        train,
        test,
        layers=layers_of(settings.layers, run.first.anatomy),
        site=settings.site,
        position=one_position(settings.position),
        dimensions=settings.dimensions,
        boundless=settings.boundless,
        head=settings.head,
        controls=settings.controls,
        among=settings.among,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        size_penalty=settings.size_penalty,
        execution=run.execution,
    )
    run.folder.record("notes", {"pairs learned from": len(train), "pairs judged on": len(test)})
    return {"das": table}


def _title(names: Mapping[str, str]) -> str:
    return f"Subspaces of {names['model']} that carry a variable"


# a batch is a step of the training, so its size decides too
_DECIDING = (
    *("reads", "site", "layers", "head", "position", "dimensions", "boundless", "controls", "among", "test_share"),
    *("epochs", "learning_rate", "size_penalty", "seed", "tokens_per_batch"),
)

JOB = Job(
    name="das",
    help="Distributed alignment search: learn which directions of a representation carry a variable, beside random directions (Geiger et al. 2024).",
    panel="intervene",
    example="mechscope das gpt2 --pairs greater_than --layers 6-9 --dimensions 4 --among answers --out runs/das",
    settings=DasSettings,
    arguments=("model",),
    inputs=(MODELS, PAIRS),
    stages=(Stage(name="das", work=_aligned, hangs_on=_DECIDING, inputs=(MODELS, PAIRS)),),
    sections=("das",),
    title=_title,
    check=_check,
)
