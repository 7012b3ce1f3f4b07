"""Causal tracing restores exactly what was corrupted, by the token's role, and is the same for the same seed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig

from mechscope.causal import causal_trace
from mechscope.causal.tracing import ROLES, role_of
from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import Pairs, PromptPair, collate_pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import observed
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests import families


def texts(n: int = 3) -> Pairs:
    generator = torch.Generator().manual_seed(4)
    pairs = []
    for index in range(n):
        ids = tuple(torch.randint(3, families.VOCABULARY, (8 + index,), generator=generator).tolist())
        pairs.append(PromptPair(f"fact {index}", ids, ids, answers=(7 + index,), segments={"subject": ((1, 4),)}))
    return Pairs(tuple(pairs), "facts")


def test_tokens_are_named_by_their_role_in_the_text() -> None:
    assert role_of(texts().pairs[0], "subject") == ["", *ROLES[:3], ROLES[3], ROLES[4], ROLES[4], ROLES[5]]


def by_hand(subject: Subject, pairs: Pairs, seed: int, samples: int, restored: dict[int, Any]) -> np.ndarray:
    """Run each text alone on noisy embeddings, with hooks that put clean values back; average over draws of noise."""
    ids = torch.tensor(sorted({token for pair in pairs for token in pair.clean}))
    spread = 3.0 * float(subject.plain.get_input_embeddings()(ids).detach().std())
    found = np.zeros(len(pairs))
    for row, pair in enumerate(pairs):
        batch = collate_pairs([pair])
        clean: dict[Any, Tensor] = {}
        with hooked({module: lambda key, out, clean=clean: clean.setdefault(key, out) for module in restored.values()}):
            logits_of(subject, batch.clean)
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, row)).generate_state(1)[0]))
        for _ in range(samples):
            noise = spread * torch.randn(1, len(pair.clean), families.WIDTH, generator=generator, dtype=torch.float64)
            noise[:, :1], noise[:, 4:] = 0, 0
            handle = subject.anatomy.blocks[0].module.register_forward_pre_hook(
                lambda _, args, kwargs, noise=noise: ((args[0] + noise, *args[1:]), kwargs), with_kwargs=True
            )

            def put_back(key: Any, out: Tensor, clean: dict[Any, Tensor] = clean) -> Tensor:
                mixed = out.clone()
                mixed[:, 3] = clean[key][:, 3]  # the last subject token
                return mixed

            try:
                with hooked(dict.fromkeys(restored.values(), put_back)):
                    logits = logits_of(subject, batch.clean)
            finally:
                handle.remove()
            found[row] += float(pair_metric("probability", batch)(logits)[0]) / samples
    return found


def logits_of(subject: Subject, ids: Tensor) -> Tensor:
    with torch.no_grad(), observed(subject):
        return subject.plain(ids, use_cache=False).logits


@contextlib.contextmanager
def hooked(hooks: dict[Any, Any]) -> Iterator[None]:
    def on(module: Any, change: Any) -> Any:
        def hook(_: Any, args: Any, out: Any) -> Any:
            return (change(module, out[0]), *out[1:]) if isinstance(out, tuple) else change(module, out)

        return module.register_forward_hook(hook)

    handles = [on(module, change) for module, change in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_the_corrupted_run_is_the_model_on_noisy_embeddings(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts()
    found = causal_trace(subject, pairs, samples=2, execution=Execution(seed=5))
    np.testing.assert_allclose(found.unchanged, by_hand(subject, pairs, 5, 2, {}), rtol=1e-9)


@pytest.mark.parametrize(("site", "window"), [("residual", 1), ("mlp", 1), ("attention", 1), ("mlp", 2), ("attention", 3)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_restored_runs_equal_hooks_that_put_clean_values_back(family: str, site: str, window: int) -> None:
    subject, pairs = families.subject(family, torch.float64), texts()
    found = causal_trace(subject, pairs, site=site, window=window, samples=2, execution=Execution(seed=5))
    name = {"residual": "module", "mlp": "mlp_write", "attention": "attention_write"}[site]
    windows: dict[int, list[tuple[int, ...]]] = {1: [(0,), (1,), (2,)], 2: [(0, 1), (1, 2), (2,)], 3: [(0, 1), (0, 1, 2), (1, 2)]}
    for layer, layers in enumerate(windows[window]):
        restored = {at: getattr(subject.anatomy.blocks[at], name) for at in layers}
        row = (found.table["layer"] == layer) & (found.table["positions"] == "last subject token")
        np.testing.assert_allclose(found.values[row][0], by_hand(subject, pairs, 5, 2, restored), rtol=1e-9)


def test_noise_is_measured_where_it_is_added_also_where_embeddings_are_multiplied() -> None:
    sizes = {"vocab_size": 97, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    config = GraniteConfig(**sizes, num_key_value_heads=2, embedding_multiplier=3.0, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    families.randomize(model)
    subject = load(model.double().eval())
    ids = torch.tensor(sorted({token for pair in texts() for token in pair.clean}))
    expected = 2.0 * 3.0 * float(model.get_input_embeddings()(ids).detach().std())
    assert causal_trace(subject, texts(), noise=2.0, samples=1).notes["noise"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_restoring_the_last_tokens_last_residual_stream_undoes_the_corruption(family: str) -> None:
    found = causal_trace(families.subject(family, torch.float64), texts(), samples=3)
    values = {(row.layer, row.positions): found.values[at] for at, row in enumerate(found.table.itertuples())}
    assert found.clean is not None
    assert found.corrupt is not None
    np.testing.assert_allclose(values[2, "last token"], found.clean, rtol=1e-9)
    # behind the last block other tokens reach no logits
    for role in ROLES[:5]:
        there = ~np.isnan(values[2, role])
        np.testing.assert_allclose(values[2, role][there], found.corrupt[there], rtol=1e-9)
    # three texts are too few for a share
    assert (found.table["withheld"].str.startswith("too few texts: ")).all()


def test_equal_seeds_give_equal_tables_and_others_do_not() -> None:
    subject = families.subject("gpt2")
    one, two, other = (causal_trace(subject, texts(), samples=2, execution=Execution(seed=seed)).table for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one, two)
    assert not np.allclose(one["value"], other["value"], equal_nan=True)


def test_a_text_without_its_subject_is_named() -> None:
    subject = families.subject("gpt2")
    with pytest.raises(DataError, match=r"pair 'fact \d' has no segment 'hero' to corrupt; its segments: subject"):
        causal_trace(subject, texts(), segment="hero")
    ends = Pairs((PromptPair("end", (3, 4, 5), (3, 4, 5), answers=(6,), segments={"subject": ((1, 3),)}),), "x")
    with pytest.raises(DataError, match="pair 'end': nothing follows segment 'subject'"):
        causal_trace(subject, ends)
    same = Pairs((PromptPair("same", (3, 3, 3), (3, 3, 3), answers=(6,), segments={"subject": ((0, 1),)}),), "x")
    with pytest.raises(DataError, match="the texts hold no token but 3"):
        causal_trace(subject, same)
    with pytest.raises(SettingsError, match="a window of 4 layers does not fit a model of 3: choose 1 to 3"):
        causal_trace(subject, texts(), window=4)
    with pytest.raises(SettingsError, match="noise 0 and samples 10: both must be above zero"):
        causal_trace(subject, texts(), noise=0)
    with pytest.raises(SettingsError, match="site 'head' is not traced"):
        causal_trace(subject, texts(), site="head")
