"""`mechscope roles`: which head does what: the roles of all heads beside chance, how fine-tuning changed them, and attention token by token."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mechscope.settings import Number, setting
from mechscope.studies.groups import MaybeCorpus, ModelAndTuned
from mechscope.studies.inputs import DOCUMENTS, MODELS, read_documents
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.data.prompt import Example
    from mechscope.subject import Components

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RolesSettings(ModelAndTuned, MaybeCorpus):
    """Which models, documents and heads."""

    panel: ClassVar[str] = "Roles"

    data: str | None = setting(None, "Documents with summaries, for the roles that are about documents; without, these are left out.")
    documents: Number = setting(48, "Documents to measure on.")
    probes: Number = setting(32, "Generated texts per role: repeated random tokens, sentences about two names, news articles.")
    show: str | None = setting(None, 'Heads whose attention is shown token by token, e.g. "a3.h5,a4.h1"; by default those that stand out.')
    show_texts: Number = setting(2, "Texts it is shown on.")


def _shown(run: JobRun[RolesSettings]) -> Sequence[Example]:
    """Return the texts that attention is shown on: the first documents, else generated articles, else random tokens that are repeated."""
    from mechscope.errors import DataError
    from mechscope.studies.roles import repeated_tokens

    documents, number = run[DOCUMENTS], run.settings.show_texts
    if documents is None and run.first.tokenizer is not None:
        try:
            documents = read_documents(run.settings, "newsroom", number, run.first)
        except DataError as error:
            log.info("attention is shown on repeated random tokens, as no generated article can be read: %s", error)
    return repeated_tokens(run.first, number, seed=run.settings.seed) if documents is None else documents.encoded.examples[:number]


SHOWN: Input[Sequence[Example]] = Input("shown", _shown, lambda examples: [[one.id, list(one.input_ids)] for one in examples])
"""Texts on which attention is shown."""


def _named(run: JobRun[RolesSettings]) -> Components | None:
    from mechscope.subject import Components
    from mechscope.subject.components import chosen_heads

    show = run.settings.show
    return None if show is None else Components.of_heads(chosen_heads(run.first.anatomy, show))


def _check(run: JobRun[RolesSettings]) -> None:
    _named(run)


def _roles(run: JobRun[RolesSettings]) -> Tables:
    from mechscope.studies.roles import role_tables

    return role_tables(run[MODELS], run[DOCUMENTS], probes=run.settings.probes, execution=run.execution)


def _attention(run: JobRun[RolesSettings]) -> Tables:
    from mechscope.studies.roles import attention_tables, heads_to_show

    heads = _named(run)
    if heads is None:
        heads = heads_to_show(run.table("head_roles"), run.tables(["head_role_changes"]).get("head_role_changes"))
    return attention_tables(run[MODELS], run[SHOWN], heads, execution=run.execution)


ROLES = Stage(name="roles", work=_roles, hangs_on=("probes", "seed"), inputs=(MODELS, DOCUMENTS))
ATTENTION = Stage(name="attention", work=_attention, hangs_on=("show",), inputs=(MODELS, SHOWN), after=(ROLES,))


def _title(names: Mapping[str, str]) -> str:
    if "tuned" in names:
        return f"What the heads of {names['base']} do, before and after fine-tuning"
    return f"What the heads of {names['model']} do"


JOB = Job(
    name="roles",
    help="Which head does what: score the roles of all heads, and how fine-tuning changed them.",
    panel="read",
    example="mechscope roles gpt2 --data newsroom --out runs/roles",
    settings=RolesSettings,
    arguments=("model", "tuned"),
    inputs=(MODELS, DOCUMENTS, SHOWN),
    stages=(ROLES, ATTENTION),
    sections=("roles", "token-attention"),
    title=_title,
    check=_check,
)
