"""What is trained: whether the rule for convergence errs, and whether pruning and alignment search return what was planted.

The models' weights are written by hand, so that what is there is known: a chain of three edges, and an answer that stands in one direction.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from mechscope.studies.calibration.truth import Truth

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs
    from mechscope.subject import Subject

Noise = Literal["Gaussian", "heavy-tailed", "autocorrelated"]

_POINTS, _NOISE = 250, 0.02
_FIRST, _WIDTH, _VOCABULARY = 5, 32, 64
_CHAIN = ("embed->a0.h1<v>", "a0.h1->m0", "m0->logits")


def _loss(seed: int, rate: float, noise: float, kind: Noise) -> str:
    """Draw a loss that falls by 1, exponentially along the way, under a rate that falls linearly to zero, and say whether it arrived."""
    from scipy.signal import lfilter

    from mechscope.stats.convergence import convergence

    draw = np.random.default_rng(seed)
    pace = 1 - np.arange(_POINTS) / _POINTS
    way = (pace.cumsum() - pace / 2) / pace.sum()
    match kind:
        case "Gaussian":
            made = draw.standard_normal(_POINTS)
        case "heavy-tailed":
            made = draw.standard_t(3, _POINTS) / np.sqrt(3)
        case "autocorrelated":
            made = np.sqrt(0.75) * lfilter([1], [1, -0.5], draw.standard_normal(_POINTS))
    loss = np.exp(-rate * way) / (1 - np.exp(-rate)) + noise * made
    return "converged" if convergence(loss, pace=pace).converged else "not converged"


@lru_cache(maxsize=1)
def _line() -> Subject:
    """Return a model whose answer, 3 or 4, is the sign of one direction of the last token's embedding, among noise."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mechscope.instrument import load

    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config).double().eval()
    basis = torch.linalg.qr(torch.randn(_WIDTH, _WIDTH, generator=generator, dtype=torch.float64)).Q
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        features = torch.randn(_VOCABULARY, _WIDTH, generator=generator, dtype=torch.float64)
        features[_FIRST:, 0] = 3 * signs[torch.arange(_FIRST, _VOCABULARY) % 2]
        model.model.embed_tokens.weight.copy_(features @ basis.T)
        model.lm_head.weight.zero_()
        model.lm_head.weight[3:5] = 2 * signs[:, None] * basis[:, :1].T
    return load(model)


def _line_pairs(n: int, seed: int) -> Pairs:
    from mechscope.data.pairs import Pairs, PromptPair

    draw = np.random.default_rng(seed)
    pairs: list[PromptPair] = []
    while len(pairs) < n:
        base, source = (tuple(draw.integers(_FIRST, _VOCABULARY, 2).tolist()) for _ in range(2))
        answers = [(3 + text[-1] % 2,) for text in (base, source)]
        if answers[0] != answers[1]:
            pairs.append(PromptPair(f"line {len(pairs)}", base, source, answers[1], answers[0]))
    return Pairs(tuple(pairs), "line")


def _width(seed: int, epochs: int) -> str:
    from mechscope.causal import train_das
    from mechscope.instrument import Execution

    found = train_das(_line(), _line_pairs(150, seed), layer=1, boundless=True, epochs=epochs, execution=Execution(seed=seed))
    return "withheld" if np.isnan(found.width) else f"{found.width:.0f} dimension{'s' * (found.width != 1)}"


@lru_cache(maxsize=1)
def _chain() -> Subject:
    """Return a model of one block in which head 0.1 takes token 0's feature to the MLP, the MLP to the logits; the rest writes what nothing reads."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from mechscope.instrument import load

    generator = torch.Generator().manual_seed(0)
    heads, size = 4, _WIDTH // 4
    config = GPT2Config(
        vocab_size=16,
        n_embd=_WIDTH,
        n_layer=1,
        n_head=heads,
        n_inner=8,
        n_positions=8,
        activation_function="relu",
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).double().eval()
    block = model.transformer.h[0]
    with torch.no_grad():
        for value in model.parameters():
            # every part reads and writes everything a little, so that no head is silent
            value.copy_(0.01 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        for norm in (block.ln_1, block.ln_2, model.transformer.ln_f):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        # dimensions 0 to 3: seen, brought, passed on, and their opposite, so that the mean stays 0; then noise
        opposite = torch.tensor([1.0, -1.0], dtype=torch.float64)
        words = model.transformer.wte.weight
        words[:, 8:] = torch.randn(16, _WIDTH - 8, generator=generator, dtype=torch.float64)
        words[0, 0:2] = 6 * opposite
        attention = block.attn
        values = attention.c_attn.weight[:, 2 * _WIDTH :]
        values[8:] = 0.3 * torch.randn(_WIDTH - 8, _WIDTH, generator=generator, dtype=torch.float64)
        attention.c_proj.weight[:, 8:] = 0.3 * torch.randn(_WIDTH, _WIDTH - 8, generator=generator, dtype=torch.float64)
        values[0:2, size] = 2 * opposite
        attention.c_proj.weight[size, 2:4] = 2 * opposite
        block.mlp.c_fc.weight[2:4, 0] = opposite
        block.mlp.c_proj.weight[0, 4:6] = 2 * opposite
        model.lm_head.weight[1, 4:6] = 3 * opposite
        model.lm_head.weight[:, 8:] = 0.05 * torch.randn(16, _WIDTH - 8, generator=generator, dtype=torch.float64)
    return load(model)


def _chain_pairs(n: int, seed: int) -> Pairs:
    from mechscope.data.pairs import Pairs, PromptPair

    draw, pairs = np.random.default_rng(seed), []
    for number in range(n):
        base = draw.choice(np.arange(3, 16), 6, replace=False)
        at = int(draw.integers(0, 5))
        clean = base.copy()
        clean[at] = 0
        pairs.append(PromptPair(f"chain {number}", tuple(clean.tolist()), tuple(base.tolist()), (1,), (2,)))
    return Pairs(tuple(pairs), "chain")


def _circuit(seed: int, steps: int) -> str:
    from mechscope.circuits import prune_edges
    from mechscope.instrument import Execution

    found = prune_edges(_chain(), _chain_pairs(6, seed), n_edges=len(_CHAIN), steps=steps, execution=Execution(seed=seed))
    if not found.convergence.converged:
        return "withheld"
    return "the planted circuit" if set(found.circuit.names) == set(_CHAIN) else "another circuit"


def _curves() -> tuple[Truth, ...]:
    truths = []
    kinds: tuple[Noise, ...] = ("Gaussian", "heavy-tailed", "autocorrelated")
    for kind in kinds:
        for noise in (0.02, 0.1, 0.3):
            truths.append(
                Truth(
                    claim="converged",
                    world=f"the last quarter brings 16 % of the fall, {kind} noise of {noise} of it",
                    kind="null",
                    draw=partial(_loss, rate=1.0, noise=noise, kind=kind),
                    unit="training",
                    wrong=("converged",),
                    small=200,
                )
            )
        truths.append(
            Truth(
                claim="converged",
                world=f"flat for long, {kind} noise",
                kind="planted",
                draw=partial(_loss, rate=40.0, noise=_NOISE, kind=kind),
                unit="training",
                size=_NOISE,
                right=("converged",),
                small=200,
            )
        )
    return tuple(truths)


_ALIGNMENT = "width of a subspace (boundless das)"
_PRUNING = "circuit (edge pruning)"
TRUTHS: tuple[Truth, ...] = (
    *_curves(),
    Truth(
        claim=_ALIGNMENT,
        world="a variable of one dimension in 32, default settings",
        kind="planted",
        draw=lambda seed: _width(seed, 100),
        unit="training",
        size=1,
        right=("1 dimension",),
        small=4,
        full=100,
    ),
    Truth(
        claim=_ALIGNMENT,
        world="the same, two epochs",
        kind="null",
        draw=lambda seed: "withheld" if _width(seed, 2) == "withheld" else "a width",
        unit="training",
        wrong=("a width",),
        small=20,
        full=200,
    ),
    Truth(
        claim=_PRUNING,
        world="a chain of three edges of 23, default settings",
        kind="planted",
        draw=lambda seed: _circuit(seed, 1000),
        unit="training",
        size=3,
        right=("the planted circuit",),
        small=2,
        full=60,
    ),
    Truth(
        claim=_PRUNING,
        world="the same, two steps",
        kind="null",
        draw=lambda seed: "withheld" if _circuit(seed, 2) == "withheld" else "a circuit",
        unit="training",
        wrong=("a circuit",),
        small=20,
        full=200,
    ),
)
