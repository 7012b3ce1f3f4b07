"""Models and transcoders of which graphs are made in tests, and the frozen run written down by hooks on the model's own code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import cross_layer, transcoder
from mechscope.features.rules import Rule
from mechscope.instrument import Edit, intervene, model_inputs, record
from mechscope.subject import Subject
from tests import families
from tests.features.test_splice import made
from tests.lens.residual_oracle import subject_of

W = families.WIDTH
IDS = families.documents()[0].tolist()
FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "qwen3", "opt")


@lru_cache
def transcoders() -> dict[str, Dictionary]:
    """Return a transcoder for every layer, of different rules, with maps of their own, two with a skip map."""
    return {
        "zero": made(transcoder(0, W, 40, Rule("topk", 5))),
        "one": made(transcoder(1, W, 40, Rule("gated"), skip=True)),
        "two": made(transcoder(2, W, 40, Rule("jumprelu"), skip=True)),
    }


@lru_cache
def across() -> dict[str, Dictionary]:
    """Return a cross-layer transcoder."""
    return {"clt": made(cross_layer(range(3), W, 20, Rule("batchtopk", 5)))}


DICTIONARIES = {"transcoders": transcoders, "cross-layer": across}


class Clean:
    """What stood where in a prompt's run."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.scales = subject, dict[int, Tensor]()
        with (
            torch.no_grad(),
            record(subject, "pattern", "mlp_input", "mlp_output", "embedding", "logits") as self.seen,
            self._norms(self._note),
        ):
            subject.plain(**inputs(), use_cache=False)

    def _note(self, number: int, module: Any, x: Tensor, output: Tensor) -> None:
        self.scales[number] = _scale(module, x)

    def _fixed(self, number: int, module: Any, x: Tensor, output: Tensor) -> Tensor:
        standard = (x - x.mean(-1, keepdim=True) if _centred(module) else x) * self.scales[number]
        weight = module.weight + (1.0 if "Gemma" in type(module).__name__ else 0.0)
        return standard * weight + (module.bias if getattr(module, "bias", None) is not None else 0.0)

    @contextlib.contextmanager
    def _norms(self, act: Any) -> Iterator[None]:
        """Hook all norms but those of queries and keys."""
        with contextlib.ExitStack() as stack:
            for number, (name, module) in enumerate(self.subject.plain.named_modules()):
                if type(module).__name__.endswith("Norm") and not name.endswith(("q_norm", "k_norm")):
                    hook = partial(lambda number, module, args, output: act(number, module, args[0], output), number)
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def run(self, dictionaries: dict[str, Dictionary], deltas: dict[int, Tensor] | None = None, start: Tensor | None = None) -> Any:
        """Run the model with patterns, scales and everything the MLPs wrote held but for skip maps, with something added to their outputs.

        Args:
            dictionaries: Those whose skip maps act.
            deltas: What is added at MLPs, ``(1, token, d_model)``.
            start: What the first block reads.
        """
        layers, seen = range(self.subject.anatomy.n_layers), self.seen
        skips = {each.layout.outputs[0].layer: each for each in dictionaries.values() if each.layout.skip}

        def value(layer: int, old: Tensor) -> Tensor:
            out = seen["mlp_output", layer] + (deltas or {}).get(layer, 0.0)
            if layer in skips:
                given = skips[layer]
                scale = given.input_maps[0].scale / given.output_maps[0].scale
                moved = now["mlp_input", layer] - seen["mlp_input", layer]
                moved[:, :1] = 0.0  # at the first token the MLP is a constant
                out = out + scale * moved @ given.tensors["skip"].T
            return out

        edits = [Edit("pattern", layer, seen["pattern", layer]) for layer in layers]
        edits += [] if start is None else [Edit("embedding", 0, start)]
        edits += [Edit("mlp_output", layer, partial(value, layer)) for layer in layers]
        with record(self.subject, "mlp_input", "logits") as now, self._norms(self._fixed), intervene(self.subject, *edits), torch.no_grad():
            self.subject.plain(**inputs(), use_cache=False)
        return now


def inputs() -> dict[str, Any]:
    """Return the prompt as the model takes it."""
    return model_inputs(torch.tensor([IDS]), None)


def _centred(module: Any) -> bool:
    return "Layer" in type(module).__name__


def _scale(module: Any, x: Tensor) -> Tensor:
    eps = next(getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name))
    x = x - x.mean(-1, keepdim=True) if _centred(module) else x
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def subject(family: str) -> Subject:
    """Return a tiny model that computes in float64 throughout."""
    return subject_of(family)
