"""`mechscope steer`: a direction from two sets of texts, added at several strengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Lt

from mechscope.choices import MetricName, VectorSite
from mechscope.data.splits import held_out
from mechscope.errors import DataError, SettingsError
from mechscope.settings import Count, Number, setting
from mechscope.studies.dictionary_files import DICTIONARIES, MaybeDictionaries, autoencoders
from mechscope.studies.groups import OneModel, PromptPairs
from mechscope.studies.inputs import MODELS, PAIRS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs, one_position, split_names
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.causal import Direction
    from mechscope.data.pairs import Pairs, PromptPair


@dataclass(frozen=True, kw_only=True)
class SteerSettings(OneModel, MaybeDictionaries, PromptPairs):
    """Where the direction comes from, where and how strongly it is added, and what is measured."""

    panel: ClassVar[str] = "Steering"

    layer: Count | None = setting(None, "The layer whose activations are read and changed.")
    latent: str | None = setting(
        None,
        "Instead of --layer: the direction that a latent of --dictionary writes, such as resid6.f1024; strengths are then values of the latent.",
    )
    site: VectorSite = setting("residual", "Where in the layer.")
    head: Count | None = setting(None, "Which head, with --site head.")
    contrast: Literal["texts", "answers"] = setting(
        "texts", "The direction from --pairs: clean minus corrupt texts, or texts followed by the right minus by the wrong answer."
    )
    positive: str | None = setting(
        None, "Texts that the direction points to, instead of --contrast: a JSONL, CSV or Parquet file with a column text."
    )
    negative: str | None = setting(None, "Texts that it points away from, with --positive.")
    positions: str = setting("last", "Tokens whose activations are averaged: last, changed, all, a segment, or numbers joined by commas.")
    strengths: str = setting("-2,-1,0,1,2", "How many times the direction is added, at every token.")
    controls: Count = setting(3, "Random directions of equal length: the control.")
    metric: MetricName = setting(
        "logit-diff", "What is measured on the pairs; loss is of a target span, kl compares with the unsteered run."
    )
    test_share: Annotated[float, Gt(0), Lt(1)] = setting(
        0.5, "Share of --pairs that are measured and not read for the direction; all of them with --positive."
    )
    neutral: str = setting(
        "newsroom",
        "Texts whose loss should stay: a file with a column text, a hub data set of documents, or newsroom (generated articles).",
    )
    neutral_texts: Number = setting(32, "How many of them.")
    prompt: str | None = setting(None, "A text that is continued at every strength.")
    new_tokens: Number = setting(40, "Tokens of a continuation; greedy.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.positive is None) != (self.negative is None):
            raise SettingsError("--positive and --negative belong together: a direction is the difference of two sets of texts")
        if (self.layer is None) == (self.latent is None):
            raise SettingsError("give either --layer (a direction from texts) or --latent (the one that a latent writes)")
        if self.latent is not None and (self.positive is not None or self.head is not None):
            raise SettingsError("--latent says what the direction is: leave --positive, --negative and --head out")
        self.numbers()

    def numbers(self) -> tuple[float, ...]:
        """Return the strengths.

        Raises:
            SettingsError: One is not a number, one occurs twice, or there is none.
        """
        try:
            strengths = tuple(float(part) for part in split_names(self.strengths))
        except ValueError as error:
            raise SettingsError(f"--strengths is {self.strengths!r}: give numbers joined by commas, such as -2,-1,0,1,2") from error
        if not strengths or len(set(strengths)) < len(strengths) or not all(abs(strength) < float("inf") for strength in strengths):
            raise SettingsError(f"--strengths is {self.strengths!r}: give one finite number or more, each once")
        return strengths


def _texts(run: JobRun[SteerSettings], source: str, limit: int | None) -> Pairs:
    from mechscope.data.text_files import read_texts

    subject, settings = run.first, run.settings
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which texts need")
    longest = min(settings.max_tokens, subject.anatomy.max_positions)
    return read_texts(source, subject.tokenizer, limit=limit, max_tokens=longest, seed=settings.seed)


def _asked(run: JobRun[SteerSettings], texts: Pairs) -> Pairs:
    """Return prompts as they are put to the model: in a chat as a user's messages."""
    from mechscope.data.chat import in_turns

    return in_turns(texts, run.first.tokenizer) if run.settings.chat else texts


NEUTRAL: Input[Pairs] = Input(
    "neutral", lambda run: _texts(run, run.settings.neutral, run.settings.neutral_texts), lambda texts: texts.hash
)
"""Texts whose loss says what steering breaks."""


def _sets(run: JobRun[SteerSettings]) -> tuple[Pairs, ...]:
    """Return the texts that the direction points to and those it points away from; none where it is a latent's."""
    settings = run.settings
    if settings.latent is not None:
        return ()
    if settings.positive is not None and settings.negative is not None:
        positive, negative = (_asked(run, _texts(run, source, None)) for source in (settings.positive, settings.negative))
        return positive, negative
    read, _ = held_out(run[PAIRS], settings.test_share, settings.seed)
    if settings.contrast == "texts":
        return read, read.swapped()
    right, wrong = (tuple(_answered(pair, right=right) for pair in read) for right in (True, False))
    return replace(read, pairs=right, source=f"{read.source}, right"), replace(read, pairs=wrong, source=f"{read.source}, wrong")


def _answered(pair: PromptPair, *, right: bool) -> PromptPair:
    """Return a text followed by its first right or wrong answer."""
    answers = pair.answers if right else pair.wrong_answers
    if not answers:
        raise DataError(
            f"pair {pair.id!r} names no {'right' if right else 'wrong'} answer, which --contrast answers needs: add it, or use --contrast texts"
        )
    ids = (*pair.clean, answers[0])
    return replace(pair, clean=ids, corrupt=ids)


SETS: Input[tuple[Pairs, ...]] = Input("sets", _sets, lambda sets: [texts.hash for texts in sets])
"""The texts that the direction points to, and those it points away from."""


def _measured(run: JobRun[SteerSettings]) -> Pairs:
    """Return the pairs that the direction was not taken from."""
    pairs = run[PAIRS]
    return (
        pairs
        if run.settings.positive is not None or run.settings.latent is not None
        else held_out(pairs, run.settings.test_share, run.settings.seed)[1]
    )


def _prompt(run: JobRun[SteerSettings]) -> tuple[int, ...]:
    """Return the tokens of the text that is continued; none without one."""
    from mechscope.data.pairs import Pairs
    from mechscope.data.text_files import text_pair

    settings, subject = run.settings, run.first
    if settings.prompt is None:
        return ()
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which --prompt needs")
    room = subject.anatomy.max_positions - settings.new_tokens
    if room < 2:
        raise SettingsError(f"--new-tokens is {settings.new_tokens}, the model reads {subject.anatomy.max_positions}: ask for fewer")
    prompt = text_pair(settings.prompt, subject.tokenizer, max_tokens=room, name="--prompt")
    (asked,) = _asked(run, Pairs((prompt,), "--prompt"))
    if len(asked.clean) > room:
        raise SettingsError(
            f"--prompt has {len(asked.clean)} tokens as a user's message, which leaves too little room for --new-tokens: shorten one"
        )
    return asked.clean


def _check(run: JobRun[SteerSettings]) -> None:
    from mechscope.causal.steering import check_vector_place

    settings = run.settings
    if settings.layer is None:
        _of_latent(run)
    else:
        check_vector_place(run.first, settings.site, settings.layer, settings.head)
    check_pairs(run.first, _measured(run), metric=settings.metric)
    for texts in run[SETS]:
        check_pairs(run.first, texts, metric=None, positions=(settings.positions,))
    check_pairs(run.first, run[NEUTRAL], metric="loss")
    _prompt(run)


def _of_latent(run: JobRun[SteerSettings]) -> Direction:
    """Return what a latent writes, per unit of its value."""
    from mechscope.causal import Direction
    from mechscope.causal.places import latent_places

    (place, *others) = latent_places(autoencoders(run), run.settings.latent)
    if others:
        raise SettingsError(f"--latent is {run.settings.latent!r}: give one latent")
    return Direction.from_vector(place.standing.decoders[place.latent], site=place.site, layer=place.layer, head=None, name=str(place))


def _steered(run: JobRun[SteerSettings]) -> Tables:
    from mechscope.causal import difference_of_means, sweep_strength

    settings = run.settings
    if settings.layer is None:
        direction = _of_latent(run)
    else:
        positive, negative = run[SETS]
        direction = difference_of_means(
            run.first,
            positive,
            negative,
            site=settings.site,
            layer=settings.layer,
            positions=one_position(settings.positions),
            head=settings.head,
            execution=run.execution,
        )
    place = {"site": direction.site, "layer": direction.layer, "head": direction.head, "name": direction.name}
    run.stage.write_tensors("direction", {"direction": direction.vector}, meta=place)
    run.folder.record("notes", {"direction": direction.name, "length": float(direction.vector.double().norm())})
    table = sweep_strength(
        run.first,
        direction,
        _measured(run),
        run[NEUTRAL],
        strengths=settings.numbers(),
        metric=settings.metric,
        controls=settings.controls,
        execution=run.execution,
    )
    return {"steer": table}


def _continued(run: JobRun[SteerSettings]) -> Tables:
    """Continue a text under the direction and one random direction, at every strength and at none."""
    import pandas as pd

    from mechscope.adapt.generate import end_tokens, summarize
    from mechscope.causal import Direction, steer
    from mechscope.data.chat import chat_template
    from mechscope.settings.decoding import Decoding

    subject, settings, prompt = run.first, run.settings, _prompt(run)
    tensors, meta = run.folder.tensors("direction")
    direction = Direction(tensors["direction"].to(subject.device), meta["site"], meta["layer"], meta["head"], meta["name"])
    strengths = settings.numbers()
    drawn = [(-1, direction, strength) for strength in sorted({0.0, *strengths})]
    if settings.controls:
        drawn += [(0, direction.random_like(settings.seed), strength) for strength in sorted(strengths) if strength]
    rows, decoding = [], Decoding(max_new_tokens=settings.new_tokens)
    ends = end_tokens(subject.tokenizer, chat_template("{document}", subject.tokenizer)) if settings.chat else ()
    for number, (draw, each, strength) in enumerate(drawn):
        with subject.active(), steer(subject, each, strength):
            (written,) = summarize(subject.model, subject.tokenizer, [prompt], decoding=decoding, ends=ends)
        rows.append({"direction": each.name, "draw": draw, "strength": strength, "text": settings.prompt, "continuation": written})
        run.tell("continuing the prompt", number + 1, len(drawn))
    return {"steer_texts": pd.DataFrame(rows)}


def _title(names: Mapping[str, str]) -> str:
    return f"Steering {names['model']}"


SWEEP = Stage(
    name="steer",
    work=_steered,
    hangs_on=("site", "layer", "latent", "head", "contrast", "positions", "strengths", "controls", "metric", "test_share", "seed"),
    inputs=(MODELS, PAIRS, SETS, NEUTRAL, DICTIONARIES),
)
CONTINUATIONS = Stage(
    name="steer_texts",
    work=_continued,
    hangs_on=("prompt", "chat", "new_tokens", "strengths", "controls", "seed"),
    inputs=(MODELS,),
    after=(SWEEP,),
    when=lambda settings: settings.prompt is not None,
    alone=True,
)

JOB = Job(
    name="steer",
    help="Steering: add a direction of the activations at several strengths; what it does, and what it costs on other text (Turner et al. 2023).",
    panel="intervene",
    example='mechscope steer gpt2 --pairs pairs.jsonl --layer 6 --strengths -4,-2,0,2,4 --prompt "I think that" --out runs/steer',
    settings=SteerSettings,
    arguments=("model",),
    inputs=(MODELS, PAIRS, SETS, NEUTRAL, DICTIONARIES),
    stages=(SWEEP, CONTINUATIONS),
    sections=("steer",),
    title=_title,
    check=_check,
)
