"""Head detectors on models whose heads are known: random weights, in which no head has a role, and one head written to look one token back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from mechscope.heads import Role, RoleScores, copying_roles, pattern_roles, roles_table
from mechscope.instrument.execution import Execution
from mechscope.studies.calibration.truth import Truth
from mechscope.subject import Subject
from mechscope.subject.load import load

_LAYERS, _HEADS, _WIDTH, _WORDS, _PLACES = 2, 4, 64, 97, 64
_D_HEAD = _WIDTH // _HEADS
_PROBES = 8
_SMALL, _FULL = 30, 300
_NAMED, _NONE = "named", "none named"


def _gpt2(seed: int, spread: float) -> Subject:
    torch.manual_seed(seed)
    shape = {"n_layer": _LAYERS, "n_head": _HEADS, "n_embd": _WIDTH, "vocab_size": _WORDS, "n_positions": _PLACES}
    return load(AutoModelForCausalLM.from_config(GPT2Config(**shape, initializer_range=spread, bos_token_id=0, eos_token_id=0)).eval())


def _llama(seed: int, spread: float) -> Subject:
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS, "num_key_value_heads": 2, "hidden_size": _WIDTH}
    sizes = {"vocab_size": _WORDS, "intermediate_size": 2 * _WIDTH, "max_position_embeddings": _PLACES}
    config = LlamaConfig(**shape, **sizes, initializer_range=spread, bos_token_id=0, eos_token_id=0)
    return load(AutoModelForCausalLM.from_config(config).eval())


_FAMILIES = {"GPT-2": _gpt2, "Llama": _llama}


@torch.no_grad()
def _previous_token(seed: int, strength: float) -> Subject:
    """Write a head into a random GPT-2 that scores the key Δ back by strength × mean over frequencies of cos(ω (Δ − 1))."""
    subject = _gpt2(seed, 0.02)
    body, head = subject.model.transformer, seed % _HEADS
    frequencies = torch.pi * (torch.arange(_D_HEAD // 2) + 0.5) / (_D_HEAD // 2)
    angles = torch.arange(_PLACES)[:, None] * frequencies
    # every position has one length and the mean 0, so that LayerNorm leaves it as it is up to a constant
    circle = torch.cat([angles.cos(), angles.sin()], dim=1)
    body.wpe.weight[:, : 2 * _D_HEAD] = torch.cat([circle, -circle], dim=1)
    body.wpe.weight[:, 2 * _D_HEAD :] = 0
    length = body.h[0].ln_1(body.wpe.weight)[0, :_D_HEAD].norm()
    projection = body.h[0].attn.c_attn
    query, key = (slice(part * _WIDTH + head * _D_HEAD, part * _WIDTH + (head + 1) * _D_HEAD) for part in range(2))
    cos, sin = frequencies.cos().diag(), frequencies.sin().diag()
    turn = torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])
    projection.weight[:, query], projection.weight[:, key] = 0.0, 0.0
    projection.weight[:_D_HEAD, query] = turn * strength * _D_HEAD**0.5 / length**2
    projection.weight[:_D_HEAD, key] = torch.eye(_D_HEAD)
    return subject


def _named(subject: Subject, seed: int, *, least: bool) -> list[str]:
    """Return the roles given to heads; without the least excess by turned heads alone."""
    execution = Execution(seed=seed)
    found = (*pattern_roles(subject, n=_PROBES, execution=execution), *copying_roles(subject, n=64, execution=execution))
    table = roles_table(found if least else tuple(_without_least(scores) for scores in found))
    return list(table.loc[table["has_role"], "role"] + " " + table.loc[table["has_role"], "component"])


def _without_least(scores: RoleScores) -> RoleScores:
    role: Role = scores.role if scores.role.least is None else replace(scores.role, least=float("-inf"))
    return replace(scores, role=role)


def _any(seed: int, *, family: str, spread: float) -> str:
    return _NAMED if _named(_FAMILIES[family](seed, spread), seed, least=True) else _NONE


def _by_turning(seed: int, *, family: str, spread: float, role: str) -> str:
    named = _named(_FAMILIES[family](seed, spread), seed, least=False)
    return _NAMED if any(one.split()[0] == role for one in named) else _NONE


def _found(seed: int, *, strength: float) -> str:
    named = _named(_previous_token(seed, strength), seed, least=True)
    return _NAMED if f"previous-token a0.h{seed % _HEADS}" in named else _NONE


TRUTHS: tuple[Truth, ...] = (
    *(
        Truth(
            claim="head_roles", world=f"{family}, random weights, σ = {spread}", kind="null", unit="model", wrong=(_NAMED,), small=_SMALL, full=_FULL,
            draw=partial(_any, family=family, spread=spread),
        )
        for family, spread in (("GPT-2", 0.02), ("GPT-2", 0.3), ("Llama", 0.3))
    ),
    *(
        Truth(
            claim="head_roles", world=f"{role} by turned heads alone, {family}, random weights, σ = 0.3", kind="null", unit="model", wrong=(_NAMED,),
            small=_SMALL, full=_FULL, draw=partial(_by_turning, family=family, spread=0.3, role=role),
        )
        for family, role in (("GPT-2", "previous-token"), ("GPT-2", "induction"), ("Llama", "duplicate-token"), ("Llama", "copying"))
    ),
    *(
        Truth(
            claim="head_roles", world="a head written to look one token back", kind="planted", unit="model", size=strength, right=(_NAMED,),
            small=_SMALL // 2, full=_FULL // 3, draw=partial(_found, strength=strength),
        )
        for strength in (1.0, 1.25, 1.5, 2.0)
    ),
)  # fmt: skip
