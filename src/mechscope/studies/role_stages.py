"""Head roles as stages of a run: scores of every model's heads, what fine-tuning changed in them, and what chosen heads look at.

What a role is, is written beside its scores (`role_definitions`). Roles that a tokenizer or the documents do not allow are left out with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd

from mechscope.circuits.cards import component_cards
from mechscope.circuits.graph import Circuit, Graph
from mechscope.data.documents import Corpus
from mechscope.data.pairs import from_examples
from mechscope.data.prompt import Encoded, Example
from mechscope.data.template import Template
from mechscope.errors import DataError
from mechscope.heads import document_roles, entity_roles, head_roles, lead_spans, role_changes, roles_table, task_roles
from mechscope.heads.roles import RoleScores
from mechscope.heads.shown import attention_edges
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.studies.role_names import named_roles, scored_roles
from mechscope.subject import Components, Pair, Subject

log = logging.getLogger(__name__)

# tokens of a text whose attention is kept
SHOWN_TOKENS = 1024
_SHOWN_HEADS = 6
_CARD_DOCUMENTS = 16


@dataclass(frozen=True)
class Documents:
    """Documents with summaries, as text and as tokens.

    Attributes:
        corpus: The texts.
        encoded: Their tokens.
        template: The template they were encoded with.
    """

    corpus: Corpus
    encoded: Encoded
    template: Template

    def first(self, n: int) -> Documents:
        """Return the first documents."""
        return replace(self, encoded=Encoded(self.encoded.examples[:n], self.encoded.problems))


def roles_stage(
    run: RunFolder, subjects: Mapping[str, Subject], documents: Documents | None, *, probes: int, seed: int, progress: Progress | None
) -> None:
    """Write the tables `head_roles`, `role_definitions` and, of a base and a tuned model, `head_role_changes`.

    Args:
        run: The run.
        subjects: Models by label.
        documents: Documents with summaries; None leaves the roles about documents out.
        probes: Generated texts per role.
        seed: Seed of generated texts and sampled tokens.
        progress: Called with what is being done.
    """
    inputs = {
        "models": {label: [subject.fingerprint, str(subject.dtype)] for label, subject in subjects.items()},
        "documents": None if documents is None else documents.encoded.hash,
        "probes": probes,
        "seed": seed,
    }
    with run.stage("roles", inputs) as stage:
        if stage.done:
            return
        found = {label: _found(subject, documents, probes, seed, progress) for label, subject in subjects.items()}
        stage.write_table("head_roles", pd.concat([roles_table(of, model=label) for label, of in found.items()], ignore_index=True))
        columns = ["role", "definition", "source", "low", "high", "null", "threshold"]
        roles = pd.DataFrame([asdict(scores.role) for scores in next(iter(found.values()))]).rename(columns={"name": "role"})
        stage.write_table("role_definitions", roles[columns])
        if {"base", "tuned"} <= found.keys():
            stage.write_table("head_role_changes", role_changes(found["base"], found["tuned"]))


def _found(subject: Subject, documents: Documents | None, probes: int, seed: int, progress: Progress | None) -> tuple[RoleScores, ...]:
    found = list(head_roles(subject, probes=probes, seed=seed, progress=progress))
    for roles in (task_roles, entity_roles):
        try:
            found += roles(subject, n=probes, seed=seed, progress=progress)
        except DataError as error:
            log.warning("some head roles are left out: %s", error)
    if documents is not None:
        try:
            lead = lead_spans(documents.corpus, documents.encoded, subject.tokenizer, template=documents.template)
        except DataError as error:
            log.warning("the role lead-sentence is left out: %s", error)
            lead = None
        found += document_roles(subject, documents.encoded, lead=lead, progress=progress)
    return tuple(found)


def chosen_heads(run: RunFolder, named: str | None) -> Components:
    """Return the heads to show: those named, else those whose roles changed most, and the strongest of each role.

    Args:
        run: A run whose roles are scored.
        named: Text form of heads; None to choose.
    """
    if named:
        return Components.parse(named)
    chosen: list[str] = []
    if run.has_table("head_role_changes"):
        changes = run.table("head_role_changes")
        sure = changes[(changes["q"] < 0.05) & (changes["component"] != "all")]
        order = sure["change"].abs().sort_values(ascending=False, kind="stable").index
        chosen += list(dict.fromkeys(sure.loc[order, "component"]))[: _SHOWN_HEADS // 2]
    roles = run.table("head_roles")
    best = roles.sort_values("excess", ascending=False, kind="stable").drop_duplicates("role")
    chosen += [component for component in best["component"] if component not in chosen]
    return Components.parse(",".join(dict.fromkeys(chosen[:_SHOWN_HEADS])))


def cards_stage(run: RunFolder, pair: Pair, encoded: Encoded, heads: Components, *, progress: Progress | None) -> None:
    """Write the table `head_cards`: what chosen heads are, attend to and write while a summary is read, before and after fine-tuning.

    Args:
        run: The run, its roles scored if the cards are to name them.
        pair: The models.
        encoded: Documents with summaries; the first 16 are read.
        heads: Which heads.
        progress: Called with what is being done.
    """
    names = [f"a{layer}.h{head}" for layer, head in sorted(heads.heads)]
    inputs = {
        "models": [pair.base.fingerprint, pair.tuned.fingerprint],
        "documents": encoded.hash,
        "heads": names,
        "roles": scored_roles(run),
    }
    with run.stage("cards", inputs) as stage:
        if stage.done or not names:
            return
        texts = from_examples(encoded, "documents").first(_CARD_DOCUMENTS)
        found = []
        for place, (label, subject) in enumerate((("base", pair.base), ("tuned", pair.tuned))):
            if progress is not None:
                progress("describing heads", place, 2)
            only = Circuit.of(Graph.of(subject), [f"{name}->logits" for name in names])
            # beside nothing at all, what a head raises is its direct logit attribution
            cards = component_cards(subject, texts, only, metric="loss", source="zero")
            found.append(cards.assign(model=label, role=cards["component"].map(named_roles(run, label)).fillna("")))
        columns = ["model", "component", "layer", "role", "attends_to", "top_tokens"]
        stage.write_table("head_cards", pd.concat(found, ignore_index=True)[columns])


def attention_stage(
    run: RunFolder, subjects: Mapping[str, Subject], examples: Sequence[Example], heads: Components, *, progress: Progress | None
) -> None:
    """Write the tables `attention_tokens` and `attention_edges`: what chosen heads look at in some texts, in every model.

    Args:
        run: The run.
        subjects: Models by label.
        examples: Texts; their first 1,024 tokens are shown.
        heads: Which heads.
        progress: Called with what is being done.
    """
    wanted = sorted(heads.heads)
    inputs: dict[str, Any] = {
        "models": {label: subject.fingerprint for label, subject in subjects.items()},
        "texts": [[example.id, list(example.input_ids)] for example in examples],
        "heads": [list(head) for head in wanted],
    }
    with run.stage("attention", inputs) as stage:
        if stage.done or not wanted or not examples:
            return
        first = next(iter(subjects.values()))
        edges = []
        for place, example in enumerate(examples):
            ids = example.input_ids[: min(SHOWN_TOKENS, first.anatomy.max_positions)]
            for label, subject in subjects.items():
                edges.append(attention_edges(subject, ids, wanted).assign(model=label, text=example.id))
            if progress is not None:
                progress("showing attention", place + 1, len(examples))
        stage.write_table("attention_tokens", pd.concat([tokens_of(first, example) for example in examples], ignore_index=True))
        stage.write_table("attention_edges", pd.concat(edges, ignore_index=True)[["model", "text", "component", "query", "key", "weight"]])


def tokens_of(subject: Subject, example: Example, most: int = SHOWN_TOKENS) -> pd.DataFrame:
    """Return a text's tokens as a table: `text`, `position`, `token`, `segment`."""
    ids = example.input_ids[:most]
    inside = {"document": example.document, "summary": example.summary}
    segments = [next((name for name, (start, stop) in inside.items() if start <= at < stop), "text") for at in range(len(ids))]
    return pd.DataFrame({"text": example.id, "position": range(len(ids)), "token": subject.spelling.tokens(ids), "segment": segments})
