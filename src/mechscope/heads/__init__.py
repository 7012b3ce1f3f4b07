"""Which head does what: role detectors with their null, for one model and for the change that fine-tuning made."""

from __future__ import annotations

from mechscope.heads.copying_roles import copying_roles
from mechscope.heads.document_roles import document_roles, lead_spans
from mechscope.heads.entities import entity_roles
from mechscope.heads.pattern_roles import pattern_roles
from mechscope.heads.roles import Role, RoleScores, role_changes, roles_table
from mechscope.heads.shown import attention_edges
from mechscope.heads.task_roles import task_roles
from mechscope.instrument.execution import Execution
from mechscope.subject import Subject

__all__ = [
    "Role",
    "RoleScores",
    "attention_edges",
    "copying_roles",
    "document_roles",
    "entity_roles",
    "head_roles",
    "lead_spans",
    "pattern_roles",
    "role_changes",
    "roles_table",
    "task_roles",
]


def head_roles(subject: Subject, *, probes: int = 32, execution: Execution = Execution()) -> tuple[RoleScores, ...]:
    """Score every role that needs neither a task nor documents: where heads look in random text, and what they copy.

    Args:
        subject: The model.
        probes: Random texts.
        execution: Seed (of the texts and of sampled tokens), progress.

    Raises:
        MechscopeError: The model's heads cannot be taken apart, or it has too few tokens or positions.
    """
    return (*pattern_roles(subject, n=probes, execution=execution), *copying_roles(subject, execution=execution))
