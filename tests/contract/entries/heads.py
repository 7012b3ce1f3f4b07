"""The contract of heads' roles."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mechscope import heads
from mechscope.data.pairs import PairBatch
from mechscope.heads import RoleScores, entities
from mechscope.heads.attention import run_probes
from mechscope.heads.task_roles import roles_on
from mechscope.instrument import AttentionCall, Execution
from tests.contract.technique import Case, Result, Technique, columns


def scores(roles: tuple[RoleScores, ...]) -> Result:
    """Return scores and nulls of roles."""
    return {f"{one.role.name} {name}": getattr(one, name) for one in roles for name in ("score", "null")}


def probes(case: Case, execution: Execution) -> Result:
    """Reduce the attention of every head."""

    def beginning(call: AttentionCall, batch: PairBatch) -> torch.Tensor:
        return (call.z * batch.real.to(call.z.device)[:, :, None, None])[:, :5].sum((1, 3)) + batch.real.sum(1)[:, None].to(call.z.device)

    return {"sums": run_probes(case.subject, case.pairs, beginning, execution=execution)}


def on_texts(roles: Callable[..., tuple[RoleScores, ...]]) -> Technique:
    """Make the technique of scoring the roles that texts with named spans show."""

    def run(case: Case, execution: Execution) -> Result:
        return scores(roles(case.subject, case.pairs, execution=execution))

    return run


def attention_edges(case: Case, execution: Execution) -> Result:
    """List what heads attend to in one text; it has no batches."""
    return columns(heads.attention_edges(case.subject, case.pairs.pairs[0].clean, [(0, 1), (2, 2)]))


TECHNIQUES: dict[str, Technique] = {
    "probes": probes,
    "head roles": lambda case, execution: scores(heads.head_roles(case.subject, probes=3, execution=execution)),
    "document roles": lambda case, execution: scores(heads.document_roles(case.subject, case.documents, execution=execution)),
    "task roles": on_texts(roles_on),
    "entity roles": on_texts(entities.roles_on),
    "attention edges": attention_edges,
}
