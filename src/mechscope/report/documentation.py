"""`docs/tables.md`, written from the sections: every table of a run folder, column by column."""

from __future__ import annotations

from collections.abc import Iterator

from mechscope.report.section import Column, TableSpec
from mechscope.report.sections import sections

_HEAD = """# Tables

What a run folder holds in `tables/*.parquet`, by section of the page. Written by `python -m mechscope.report.documentation`; do not edit.

All components have one text form, so that tables join: `embed`, `resid3` (residual stream after block 3), `a3`, `a3.h5`, `m3`, `m3.n1024` (neuron),
`logits`; edges `a0.h3->m5`, `m2->a4.h1<q>`. Layers count from 0; −1 stands for "none" in `layer`, `head` and `feature`. Means come with `n`;
columns that end in `_low` and `_high` are 95 % intervals. `rows` says which query rows were averaged: `all`, `document` (the article), `summary`.
Entropy and KL are in nats, shares are fractions.

`tensors/replicates.safetensors` holds the bootstrap means of `kl_base_tuned` and `entropy_change`, ``(replicate, layer, head)``, per kind of rows.
`manifest.json` names every file's hash, the hashes of models and documents, versions, machine and seeds; `mechscope verify RUN` checks them.
"""


def tables_page() -> str:
    """Return the page as Markdown."""
    return "\n".join([_HEAD, *_parts()])


def _parts() -> Iterator[str]:
    for section in sections().values():
        if section.tables:
            yield f"## {section.heading}\n"
        for name, spec in section.tables.items():
            yield f"### `{name}`\n\n{spec.row}\n\n| column | unit | meaning |\n|---|---|---|"
            yield "\n".join([*_rows(spec), ""])


def _rows(spec: TableSpec) -> Iterator[str]:
    for name, column in spec.columns.items():
        behind = [end if column.bare else f"{name}_{end}" for end in column.behind]
        yield _row(", ".join(f"`{each}`" for each in (name, *behind)), column)
    for prefix, column in spec.numbered.items():
        yield _row(f"`{prefix}…`", column)


def _row(names: str, column: Column) -> str:
    meaning = column.meaning.replace("|", "\\|")
    return f"| {names} | {column.unit} | {meaning}{' (where there is one)' if column.optional else ''} |"


if __name__ == "__main__":
    print(tables_page(), end="")
