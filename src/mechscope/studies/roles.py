"""The roles of heads: scores of every model's heads, what fine-tuning changed in them, and what chosen heads look at and write.

What a role is, is written beside its scores (`role_definitions`). Roles that a tokenizer or the documents do not allow are left out with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from mechscope.circuits.cards import component_cards
from mechscope.circuits.graph import Circuit, Graph
from mechscope.data.pairs import Pairs
from mechscope.data.prompt import Example
from mechscope.errors import DataError, ModelError
from mechscope.heads import copying_roles, document_roles, entity_roles, lead_spans, pattern_roles, role_changes, roles_table, task_roles
from mechscope.heads.pattern_roles import repeated_texts
from mechscope.heads.roles import RoleScores
from mechscope.heads.shown import attention_edges
from mechscope.instrument.execution import Execution
from mechscope.studies.inputs import Documents
from mechscope.studies.noted import note_layers_without_heads
from mechscope.subject import Components, Subject

log = logging.getLogger(__name__)

# tokens of a text whose attention is kept
SHOWN_TOKENS = 1024
_SHOWN_HEADS = 6
_CARD_DOCUMENTS = 16
# a card names a head's strongest roles
_NAMED_ROLES = 3


def role_tables(
    subjects: Mapping[str, Subject], documents: Documents | None, *, probes: int, execution: Execution = Execution()
) -> dict[str, pd.DataFrame]:
    """Score the roles of all heads.

    Args:
        subjects: Models by label.
        documents: Documents with summaries; None leaves the roles about documents out.
        probes: Generated texts per role.
        execution: Tokens of a batch (4,096 by default), seed (of generated texts and sampled tokens), progress.

    Returns:
        The tables `head_roles`, `role_definitions` and, of a base and a tuned model, `head_role_changes`.
    """
    scores = {label: score_roles(subject, documents, probes=probes, execution=execution) for label, subject in subjects.items()}
    columns = ["role", "definition", "source", "low", "high", "null", "least"]
    roles = pd.DataFrame([asdict(one.role) for one in next(iter(scores.values()))]).rename(columns={"name": "role"})
    tables = {
        "head_roles": pd.concat([roles_table(of, model=label) for label, of in scores.items()], ignore_index=True),
        "role_definitions": roles[columns],
    }
    if {"base", "tuned"} <= scores.keys():
        tables["head_role_changes"] = role_changes(scores["base"], scores["tuned"])
    return tables


def score_roles(
    subject: Subject, documents: Documents | None, *, probes: int, execution: Execution = Execution()
) -> tuple[RoleScores, ...]:
    """Score all roles that a model's tokenizer and the documents allow; arguments as for `role_tables`."""
    note_layers_without_heads(subject, "head_roles")
    scores = list(pattern_roles(subject, n=probes, execution=execution))
    try:
        scores += copying_roles(subject, execution=execution)
    except ModelError as error:
        log.warning("the head roles about what heads copy are left out: %s", error, extra={"weakens": "head_roles"})
    for roles, texts in ((task_roles, "sentences about two names"), (entity_roles, "news articles")):
        try:
            scores += roles(subject, n=probes, execution=execution)
        except (DataError, ModelError) as error:
            log.warning("the head roles on %s are left out: %s", texts, str(error).split(" (")[0], extra={"weakens": "head_roles"})
    if documents is not None:
        try:
            lead = lead_spans(documents.corpus, documents.encoded, subject.tokenizer, template=documents.template)
        except DataError as error:
            log.warning("the role lead-sentence is left out: %s", error, extra={"weakens": "head_roles"})
            lead = None
        scores += document_roles(subject, documents.encoded, lead=lead, execution=execution)
    return tuple(scores)


def named_roles(roles: pd.DataFrame | None, model: str) -> dict[str, str]:
    """Return what each head of a model is, in words: its roles by how far they stand above chance, the strongest first.

    Args:
        roles: The table `head_roles`; None names none.
        model: Label of the model.
    """
    if roles is None:
        return {}
    table = roles[(roles["model"] == model) & roles["has_role"]].sort_values("excess", ascending=False, kind="stable")
    return {
        str(component): ", ".join(f"{row.role} {row.score:.2f}" for row in group.head(_NAMED_ROLES).itertuples())
        for component, group in table.groupby("component")
    }


def heads_to_show(roles: pd.DataFrame, changes: pd.DataFrame | None) -> Components:
    """Choose the heads whose roles changed most, and the strongest of each role.

    Args:
        roles: The table `head_roles`.
        changes: The table `head_role_changes`; None of one model.
    """
    chosen: list[str] = []
    if changes is not None:
        sure = changes[(changes["q"] < 0.05) & (changes["component"] != "all")]
        order = sure["change"].abs().sort_values(ascending=False, kind="stable").index
        chosen += list(dict.fromkeys(sure.loc[order, "component"]))[: _SHOWN_HEADS // 2]
    best = roles.sort_values("excess", ascending=False, kind="stable").drop_duplicates("role")
    chosen += [component for component in best["component"] if component not in chosen]
    return Components.parse(",".join(dict.fromkeys(chosen[:_SHOWN_HEADS])))


def head_cards(
    subjects: Mapping[str, Subject],
    texts: Pairs,
    heads: Components,
    *,
    roles: pd.DataFrame | None = None,
    execution: Execution = Execution(),
) -> dict[str, pd.DataFrame]:
    """Describe what chosen heads are, attend to and write while a summary is read, in every model.

    Args:
        subjects: Models by label.
        texts: Documents whose targets are their summaries; the first 16 are read.
        heads: Which heads; of an empty selection there is no table.
        roles: The table `head_roles`, if the cards are to name them.
        execution: Tokens of a batch (512 by default), progress.

    Returns:
        The table `head_cards`.
    """
    names = [f"a{layer}.h{head}" for layer, head in sorted(heads.heads)]
    if not names:
        return {}
    cards = []
    for place, (label, subject) in enumerate(subjects.items()):
        execution.told("describing heads", place, len(subjects))
        only = Circuit.of(Graph.of(subject), [f"{name}->logits" for name in names])
        # beside nothing at all, what a head raises is its direct logit attribution
        own = component_cards(subject, texts.first(_CARD_DOCUMENTS), only, metric="loss", source="zero", execution=execution)
        cards.append(own.assign(model=label, role=own["component"].map(named_roles(roles, label)).fillna("")))
    columns = ["model", "component", "layer", "role", "attends_to", "top_tokens"]
    return {"head_cards": pd.concat(cards, ignore_index=True)[columns]}


def attention_tables(
    subjects: Mapping[str, Subject], examples: Sequence[Example], heads: Components, *, execution: Execution = Execution()
) -> dict[str, pd.DataFrame]:
    """Show what chosen heads look at in some texts, in every model.

    Args:
        subjects: Models by label.
        examples: Texts; their first 1,024 tokens are shown.
        heads: Which heads; without heads or texts there are no tables.
        execution: Progress.

    Returns:
        The tables `attention_tokens` and `attention_edges`.
    """
    wanted = sorted(heads.heads)
    if not wanted or not examples:
        return {}
    first, edges = next(iter(subjects.values())), []
    for place, example in enumerate(examples):
        ids = example.input_ids[: min(SHOWN_TOKENS, first.anatomy.max_positions)]
        for label, subject in subjects.items():
            edges.append(attention_edges(subject, ids, wanted).assign(model=label, text=example.id))
        execution.told("showing attention", place + 1, len(examples))
    return {
        "attention_tokens": pd.concat([tokens_table(first, example) for example in examples], ignore_index=True),
        "attention_edges": pd.concat(edges, ignore_index=True)[["model", "text", "component", "query", "key", "weight"]],
    }


def repeated_tokens(subject: Subject, n: int, *, seed: int = 0) -> tuple[Example, ...]:
    """Return random texts whose second half repeats the first, for models that can read no other; none where not even these fit."""
    try:
        texts = repeated_texts(subject, n, seed=seed)
    except DataError as error:
        log.warning("attention is not shown token by token: %s", error)
        return ()
    return tuple(
        Example(pair.id, pair.clean, (0, pair.segments["second"][0][0]), pair.segments["second"][0], truncated=False) for pair in texts
    )


def tokens_table(subject: Subject, example: Example, most: int = SHOWN_TOKENS) -> pd.DataFrame:
    """Return a text's tokens as a table: `text`, `position`, `token`, `segment`."""
    ids = example.input_ids[:most]
    inside = {"document": example.document, "summary": example.summary}
    segments = [next((name for name, (start, stop) in inside.items() if start <= at < stop), "text") for at in range(len(ids))]
    return pd.DataFrame({"text": example.id, "position": range(len(ids)), "token": subject.spelling.tokens(ids), "segment": segments})
