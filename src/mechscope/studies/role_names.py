"""The roles of heads in words, for cards of components: from the tables of a run whose roles were scored."""

from __future__ import annotations

from mechscope.store.run import RunFolder

# a card names a head's strongest roles
_NAMED_ROLES = 3


def scored_roles(run: RunFolder) -> dict[str, str] | None:
    """Return the hashes of a run's scored roles, for stages that name them; None where roles were not scored."""
    record = run.manifest["stages"].get("roles")
    return None if record is None else record["outputs"]


def named_roles(run: RunFolder, model: str) -> dict[str, str]:
    """Return what each head of a model is, in words: its roles by how far they stand above chance, the strongest first.

    Empty where roles were not scored.
    """
    if not run.has_table("head_roles"):
        return {}
    roles = run.table("head_roles")
    table = roles[(roles["model"] == model) & roles["has_role"]].sort_values("excess", ascending=False, kind="stable")
    return {
        str(component): ", ".join(f"{row.role} {row.score:.2f}" for row in group.head(_NAMED_ROLES).itertuples())
        for component, group in table.groupby("component")
    }
