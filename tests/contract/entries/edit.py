"""The contract of editing."""

from __future__ import annotations

from dataclasses import replace

from mechscope import edit
from mechscope.instrument import Execution
from tests import families
from tests.contract.technique import Case, Result, Technique, numbers


def keys(case: Case, execution: Execution) -> Result:
    """Add up the keys of two layers."""
    moments = edit.key_moments(case.subject, case.pairs, layers=[0, 2], execution=execution)
    return {name: array for layer in (0, 2) for name, array in numbers(moments.mean(layer), f"layer {layer}").items()}


def methods(case: Case, execution: Execution) -> Result:
    """Edit a fact by every method."""
    subject = replace(case.subject, tokenizer=families.tokenizer())
    request = edit.Request("fact", "w9 w30", "w5 {} w12 w7", "w44 w45", "w20")
    moments = edit.key_moments(subject, case.pairs, layers=[0, 1], execution=replace(execution, progress=None))
    setting = edit.Setting(moments, [(4, 5, 6)], edit.Search(steps=2))
    deltas = {
        "rome": edit.rome(subject, request, setting, layer=1, execution=execution),
        "finetune": edit.finetune(subject, request, setting, layer=1, steps=2, execution=execution),
    }
    if subject.anatomy.blocks[0].mlp_behind is None:
        deltas["memit"] = edit.memit(subject, [request], setting, layers=[0, 1], execution=execution)
        deltas["alphaedit"] = edit.alphaedit(subject, [request], setting, layers=[1], free=0.5, execution=execution)
    return {
        f"{name} {parameter}": (change.left @ change.right.T if isinstance(change, edit.LowRank) else change).numpy()
        for name, delta in deltas.items()
        for parameter, change in delta.changes.items()
    }


def facts(case: Case, execution: Execution) -> Result:
    """Measure how facts stand, and the loss of texts."""
    subject = replace(case.subject, tokenizer=families.tokenizer())
    long = "w5 w6 w7 {} w8 w9 w10 w11"
    requests = [edit.Request(str(at), f"w2{at} w3{at}", long, "w44 w45", "w20", (), ("w7 w8 w9 w10 w11 w12 w13",)) for at in range(3)]
    table = edit.standing(subject, edit.Requests(tuple(requests), "made"), execution=execution)
    return {**numbers(table), "loss": edit.text_loss(subject, case.pairs, execution=execution)}


TECHNIQUES: dict[str, Technique] = {"keys": keys, "edit": methods, "facts": facts}
