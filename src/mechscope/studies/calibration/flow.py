"""Which parts' effects on a metric differ from zero? Models of random weights asked for random answers, in which no part has any."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from mechscope.causal import ablate
from mechscope.circuits.attribution import attribute_edges
from mechscope.circuits.routes import flow_routes
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.lens.attribution import attribute_logits
from mechscope.studies.calibration.truth import Truth
from mechscope.subject import Subject
from mechscope.subject.load import load

_WORDS, _TEXTS, _LENGTH = 97, 24, 8
_SMALL, _FULL = 30, 500
_LEVEL = 0.05
_SOME, _NONE = "some differ", "none differs"

Measure = Callable[[Subject, Pairs], pd.DataFrame]
_MEASURES: dict[str, Measure] = {
    "circuit_edges": lambda subject, pairs: attribute_edges(subject, pairs, method="eap").table(),
    "attribution": lambda subject, pairs: attribute_logits(subject, pairs).table(),
    "ablation": lambda subject, pairs: ablate(subject, pairs, metric="logit-diff").table,
}
# numbers that are never negative: a test against zero would find all of them
_UNSIGNED: dict[str, Measure] = {
    "flow_routes": lambda subject, pairs: flow_routes(subject, pairs).table(),
    "ablation_kl": lambda subject, pairs: ablate(subject, pairs, metric="kl").table,
}


def _model(seed: int) -> Subject:
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": _WORDS, "n_positions": 16}
    return load(AutoModelForCausalLM.from_config(GPT2Config(**shape, initializer_range=0.2, bos_token_id=0, eos_token_id=0)).eval())


@torch.no_grad()
def _texts(subject: Subject, seed: int, *, known: bool) -> Pairs:
    """Draw texts whose answers are drawn too, or what the model itself holds most and least probable."""
    random = np.random.default_rng(seed)
    clean = random.integers(0, _WORDS, (_TEXTS, _LENGTH))
    corrupt = clean.copy()
    corrupt[:, _LENGTH // 2] = (corrupt[:, _LENGTH // 2] + random.integers(1, _WORDS, _TEXTS)) % _WORDS
    answers = np.stack([random.choice(_WORDS, 2, replace=False) for _ in range(_TEXTS)])
    if known:
        logits = subject.model(torch.from_numpy(clean)).logits[:, -1]
        answers = torch.stack([logits.argmax(-1), logits.argmin(-1)], dim=1).numpy()
    rows = zip(clean.tolist(), corrupt.tolist(), answers.tolist(), strict=True)
    pairs = (PromptPair(str(at), tuple(one), tuple(two), answers=(a,), wrong_answers=(b,)) for at, (one, two, (a, b)) in enumerate(rows))
    return Pairs(tuple(pairs), "drawn")


def _draw(seed: int, *, measure: str, known: bool) -> str:
    subject = _model(seed)
    table = (_MEASURES | _UNSIGNED)[measure](subject, _texts(subject, seed, known=known))
    return _SOME if "q" in table and (table["q"] < _LEVEL).any() else _NONE


TRUTHS: tuple[Truth, ...] = (
    *(
        Truth(
            claim=f"{measure}_q", world="random weights, random answers", kind="null", unit="prompt pair", wrong=(_SOME,), small=_SMALL, full=_FULL,
            draw=partial(_draw, measure=measure, known=False),
        )
        for measure in (*_MEASURES, *_UNSIGNED)
    ),
    *(
        Truth(
            claim=f"{measure}_q", world="random weights, the model's own answers", kind="planted", unit="prompt pair", size=1.0, right=(_SOME,),
            small=_SMALL // 3, full=_FULL // 5, draw=partial(_draw, measure=measure, known=True),
        )
        for measure in _MEASURES
    ),
)  # fmt: skip
