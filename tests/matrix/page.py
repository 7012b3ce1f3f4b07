"""docs/models.md: which families are measured rightly in what, and with which words others are refused."""

from __future__ import annotations

from collections.abc import Iterable

import transformers

from tests.matrix.checks import CHECKS
from tests.matrix.outcome import HALF, Outcome

_TOP = """# Models

What mechscope measures of every causal language model that transformers {version} knows, found by `make models`: a tiny random model of each family,
two texts of different length, unpadded and padded on either side, beside plain Hugging Face with the family's own attention and one text at a time.

- *logits*: of an observed, padded batch, and walked block by block; in float64 and (of the median token) in bfloat16
- *entropy*, *KL*: of every head's pattern, and its divergence from another model's, beside those of the attention maps
- *residual stream*: behind every block
- *head ablation*: one head of every layer that attends without its output, in one pass and rerun; in other layers what mixes tokens there
- *resumed forward*: the residual stream, what attention or another mixer adds, and the MLP output of one layer changed, run on from there
- *edge attribution*: scores of edge attribution patching beside finite differences

Of {all} families {right} are right in all of this, {part} in all but what is named, {refused} are refused when they are loaded, and of {unbuilt} no
tiny model could be made. {wrong}

The MLP of a mixture of experts is one part (`m3`): it is recorded, ablated, patched and an edge's end like any other; its single neurons are refused.
Single experts (`m3.e5`) are recorded, ablated and patched, and `mechscope routing` measures how tokens are shared out among them, in the families whose MLP is
a sum of experts behind a router of softmax or sigmoid; where it is not, these two refuse by name.
In hybrid stacks (Qwen3-Next, Jamba, Bamba, Granite, OLMo and LFM hybrids, MiniMax) the layers that attend are measured as attention under their own numbers,
and tables of heads hold only these; what mixes tokens in the others (linear attention, a state-space model, a short convolution) is one component, `mixer3`,
recorded (site `mixer_output`), ablated, patched, exchanged between models and a part of direct logit attribution. Edges, paths and attribution graphs need
heads in every layer and refuse by name. In Falcon-H1, which mixes in both ways in every layer, only attention is a component.
Learned attention sinks (gpt-oss) are measured as one more key whose share is a number of its own.
"""


def page(outcomes: Iterable[Outcome]) -> str:
    """Return the page."""
    found = list(outcomes)
    right = [one for one in found if one.right]
    part = [one for one in found if one.loads and not one.right]
    refused = [one for one in found if not one.loads and not one.unbuilt]
    unbuilt = [one for one in found if one.unbuilt]
    numbers = {"all": len(found), "right": len(right), "part": len(part), "refused": len(refused), "unbuilt": len(unbuilt)}
    faults = [f"{one.family} ({'; '.join(one.faults)})" for one in found if one.faults]
    wrong = f"Known to be wrong: {', '.join(faults)}." if faults else "None gives a number that is wrong, and none ends in another error."
    lines = [_TOP.format(version=transformers.__version__, wrong=wrong, **numbers)]
    lines += ["## Right in everything\n", *_table(("family", "class"), [(one.family, one.name, *_untold(one)) for one in right])]
    lines += ["\n## Right but for what is named\n"]
    lines += _table(("family", "class", "is not measured"), [(one.family, one.name, _reasons(one)) for one in part])
    lines += ["\n## Refused when loaded\n"]
    lines += _table(("family", "class", "because"), [(one.family, one.name, _sentence(one.refusals["load"])) for one in refused])
    lines += ["\n## Not tried\n", "Their configurations cannot be made small by their sizes alone, or need another model beside them.\n"]
    lines += _table(("family", "class"), [(one.family, one.name) for one in unbuilt])
    return "\n".join(lines) + "\n"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [_row(heads), _row(("---",) * len(heads)), *(_row(row[: len(heads)]) for row in rows)]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _untold(one: Outcome) -> tuple[str, ...]:
    return tuple(one.untold.values())


def _reasons(one: Outcome) -> str:
    return "; ".join(f"{name}: {_sentence(one.refusals[name])}" for name in (*CHECKS, HALF) if name in one.refusals)


def _sentence(text: str) -> str:
    return " ".join(text.split("`mechscope inspect`")[0].split()).rstrip(". ")
