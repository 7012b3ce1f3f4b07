"""Texts that a job reads without changing anything: a text, documents or prompts; and their means, with intervals over texts.

A statement about a model on texts has the text as its unit: what is measured at many tokens is averaged within a text first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from mechscope.choices import LensSite, LogitMetric
from mechscope.errors import DataError, SettingsError
from mechscope.settings import Number, setting
from mechscope.studies.groups import MaybeCorpus
from mechscope.studies.inputs import read_documents, read_prompt_pairs
from mechscope.studies.pairs import split_names
from mechscope.studies.run import Input, JobRun

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.data.pairs import Pairs
    from mechscope.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Texts(MaybeCorpus):
    """The texts that are read: one source of three."""

    panel: ClassVar[str] = "Data"

    text: str | None = setting(None, "A text to read. Give one of --text, --data, --pairs.")
    data: str | None = setting(None, "Documents with summaries to read: a file, a hub data set, or newsroom.")
    pairs: str | None = setting(None, "Prompts with answers to read: a JSONL file or a generated task, as for `mechscope patch`.")
    documents: Number = setting(32, "Documents or prompts to read.")
    max_tokens: Number = setting(512, "Most tokens of a text; lowered to what the model can read.")
    tokens_per_batch: Number | None = setting(2048, "Most tokens of a batch of texts, padding included; decides the memory.")

    def __post_init__(self) -> None:
        """Refuse none and several sources.

        Raises:
            SettingsError: There is not one source.
        """
        super().__post_init__()
        if sum(source is not None for source in (self.text, self.data, self.pairs)) != 1:
            raise SettingsError("give one of text (a text), data (documents with summaries) or pairs (prompts with answers) to read")


def _texts(run: JobRun[Any]) -> Pairs:
    """Read or make the texts; each is cut to what the model can read, and of a bare text every token is predicted."""
    from mechscope.data.chat import in_turns
    from mechscope.data.pairs import Pairs, PromptPair

    settings, subject = run.settings, run.first
    if settings.pairs is not None:
        source = run.source("pairs")
        if isinstance(source, Pairs):
            return source.first(settings.documents)
        return read_prompt_pairs(
            source,
            subject,
            limit=settings.documents,
            max_tokens=settings.max_tokens,
            on_problem=settings.on_problem,
            seed=settings.seed,
            chat=settings.chat,
        ).first(settings.documents)
    if settings.data is not None:
        return read_documents(settings, run.source("data"), settings.documents, subject).pairs
    if subject.tokenizer is None:
        raise DataError(f"model {subject.source!r} has no tokenizer, which a text needs: load it with one")
    ids = tuple(subject.tokenizer(settings.text)["input_ids"][: min(settings.max_tokens, subject.anatomy.max_positions)])
    if len(ids) < 2:
        raise DataError(f"the text {settings.text!r} has {len(ids)} tokens: give at least two, so that one is predicted")
    text = Pairs((PromptPair("text", ids, ids, target=(1, len(ids))),), "text")
    return in_turns(text, subject.tokenizer) if settings.chat else text


TEXTS: Input[Pairs] = Input(
    "texts",
    _texts,
    lambda texts: texts.hash,
    lambda texts: {"data": {"source": texts.source, "texts": len(texts), "problems": texts.problems, "hash": texts.hash}},
)
"""What is read."""


def sites_of(text: str) -> tuple[LensSite, ...]:
    """Read sites of a lens as a command line gives them, joined by commas.

    Raises:
        SettingsError: A site is not known, or none is named.
    """
    named = split_names(text)
    if not named:
        raise SettingsError(f"setting 'sites' is empty: name some of {', '.join(get_args(LensSite))}")
    for site in named:
        if site not in get_args(LensSite):
            raise SettingsError(f"setting 'sites' names {site!r}: the lens reads {', '.join(get_args(LensSite))}")
    return tuple(site for site in get_args(LensSite) if site in named)


def metric_of(texts: Pairs) -> LogitMetric:
    """Return what is attributed: the logit difference where all texts have right and wrong answers, else the logit of what comes next."""
    return "logit-diff" if all(pair.answers and pair.wrong_answers for pair in texts) else "target-logit"


def check_attributed(subject: Subject, texts: Pairs, metric: LogitMetric) -> None:
    """Refuse texts that a model cannot read, or that lack the answers or target that a metric of logits needs, without a run of the model.

    Raises:
        DataError: A text does not fit; the message names it.
    """
    from mechscope.data.scoring import check_fits
    from mechscope.lens.question import Question

    check_fits(subject, texts)
    for batch in texts.batches():
        Question.of(metric, batch)


def check_top(subject: Subject, top: int) -> None:
    """Refuse to list more tokens than a model has.

    Raises:
        SettingsError: There are not that many.
    """
    if top > subject.anatomy.vocab_size:
        raise SettingsError(f"setting 'top' is {top}: the vocabulary has {subject.anatomy.vocab_size:,} tokens")


def means_over_texts(table: pd.DataFrame, by: Sequence[str], *columns: str) -> pd.DataFrame:
    """Average columns within each text, then over texts.

    Args:
        table: Rows with a column `text` (its id).
        by: What tells the means apart.
        columns: What is averaged; missing values are left out.

    Returns:
        One row per group in the order of the table: the columns `by`, `n` (texts), and each column with `_low` and `_high` (95 %, as of
        `mechscope.stats.inference`; missing
        below six texts).
    """
    import pandas as pd

    from mechscope.stats.inference import interval

    of_texts = table.groupby([*by, "text"], sort=False)[list(columns)].mean()
    groups = of_texts.groupby(level=list(range(len(by))), sort=False)
    counts, result = groups.count(), pd.DataFrame({"n": groups.size()})
    for column in columns:
        mean = groups[column].mean()
        low, high = interval(mean, groups[column].sem(), counts[column], skewness=groups[column].skew())
        result[column], result[f"{column}_low"], result[f"{column}_high"] = mean, low, high
    return result.reset_index()
