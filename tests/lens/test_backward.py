"""The factors are the gradient, and what they say is what a training step does."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import observed
from mechscope.instrument.execution import Execution
from mechscope.lens.backward import _Gradient, backward_lens, gradient_directions
from mechscope.lens.gradient_factors import MATRICES, Factors, factors, matrices_of
from mechscope.subject.linear import base_layer, is_conv1d
from mechscope.subject.load import Subject, load
from tests import families

FAMILIES = ("gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "phi3")
# at most this many tokens are listed: all of them
K = families.VOCABULARY


@lru_cache
def subject_of(family: str) -> Subject:
    return load(families.build(family, torch.float64))


def make_pairs(target: bool = True) -> Pairs:
    """Return three texts of different length, with a span to predict or with answers."""
    found = []
    for row, text in enumerate(families.documents()):
        ids = tuple(text.tolist())
        answers = () if target else (5, 6 + row)
        found.append(PromptPair(f"text {row}", ids, ids, answers, (), (3, 6 + row) if target else None))
    return Pairs(tuple(found), "test")


def loss_by_hand(subject: Subject, pair: PromptPair) -> Tensor:
    """Return a text's loss by Hugging Face; where scores are soft-capped its attention is float32 inside, so there the heads are mechscope's."""
    ids = torch.tensor([pair.clean])
    with observed(subject) if subject.family in families.SOFTCAPPED else subject.active():
        log_p = subject.plain(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].log_softmax(-1)
    if pair.target is None:
        return -torch.stack([log_p[-1, token] for token in pair.answers]).mean()
    return -torch.stack([log_p[at - 1, pair.clean[at]] for at in range(*pair.target)]).mean()


def gradient_by_hand(subject: Subject, pair: PromptPair, module: Any) -> Tensor:
    """Return a weight's gradient by autograd, as (input, output)."""
    weight: Any = base_layer(module).weight
    (found,) = torch.autograd.grad(loss_by_hand(subject, pair), [weight])
    return found if is_conv1d(module) else found.T


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# the factors


@pytest.mark.parametrize("target", [True, False], ids=["target", "answers"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_times_gradients_summed_over_tokens_are_autograds_weight_gradient(family: str, side: Any, target: bool) -> None:
    subject, pairs = subject_of(family), make_pairs(target)
    (batch,) = pairs.batches(padding=side)
    wanted = matrices_of(subject, MATRICES, (0, 2))
    found = factors(subject, batch, wanted)
    assert len(found) == len(wanted)
    assert {matrix.kind for matrix in wanted} == set(MATRICES)
    # RMS norms are float32 inside transformers: padding on another side rounds otherwise there
    tolerance = 1e-9 if family in ("gpt2", "gpt_neox", "opt", "phi") else 1e-5
    for row, pair in enumerate(batch.pairs):
        for matrix in wanted:
            own = found[matrix.name]
            product = own.inputs[row].T @ own.gradients[row]
            close(product, gradient_by_hand(subject, pair, matrix.module), tolerance)
            assert not own.gradients[row][~batch.real[row]].any()


def test_an_adapter_counts_where_it_is_active_and_the_gradient_is_that_of_the_effective_weight() -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=3, lora_alpha=30, target_modules=["o_proj", "down_proj", "up_proj"], init_lora_weights=False)
        return get_peft_model(families.build("llama", torch.float64), config, autocast_adapter_dtype=False).eval()

    tuned, merged = load(adapted()), load(adapted().merge_and_unload())
    (batch,) = make_pairs().batches()
    for one, two in ((tuned, merged), (tuned.without_adapter(), subject_of("llama"))):
        mine, its = (factors(subject, batch, matrices_of(subject, MATRICES, (1,))) for subject in (one, two))
        for a, b in zip(mine.values(), its.values(), strict=True):
            close(a.inputs, b.inputs, 1e-6)
            close(a.gradients, b.gradients, 1e-6)
        first, second = (backward_lens(subject, make_pairs(), layers=(1,), k=3) for subject in (one, two))
        assert list(first["top_ids"]) == list(second["top_ids"])


# what a token's factor says


@torch.no_grad()
def project(subject: Subject, vector: Tensor) -> Tensor:
    """Return what a direction of the residual stream adds to every logit, up to a positive factor, loop by loop."""
    norm: Any = subject.anatomy.final_norm
    gain = norm.weight + float(subject.family.startswith("gemma"))
    if isinstance(norm, torch.nn.LayerNorm):
        vector = vector - vector.mean()
    head: Any = subject.anatomy.unembedding
    return torch.stack([(row * gain * vector).sum() for row in head.weight])


@pytest.mark.parametrize("kind", MATRICES)
def test_a_rows_tokens_are_those_of_its_vector_through_gain_and_unembedding(family: str, kind: str) -> None:
    subject, pairs = subject_of(family), make_pairs()
    table = backward_lens(subject, pairs, matrices=(kind,), layers=(1,), k=K)
    (batch,) = pairs.batches()
    matrix = matrices_of(subject, (kind,), (1,))[0]
    of_matrix = factors(subject, batch, [matrix])[matrix.name]
    table = table[table["module"] == matrix.name]
    for row, pair in enumerate(batch.pairs):
        own = table[table["text"] == pair.id]
        reached = [at for at in range(len(pair.clean)) if of_matrix.gradients[row, at].abs().max() > 0]
        assert list(own["position"]) == reached
        # nothing behind the last prediction is reached
        assert reached[-1] == (pair.target or (0, 0))[1] - 2
        for line, at in zip(own.itertuples(), reached, strict=True):
            x, delta = of_matrix.inputs[row, at], of_matrix.gradients[row, at]
            vector = -delta if matrix.writes else x
            assert line.side == ("gradient" if matrix.writes else "input")
            assert line.norm == pytest.approx(float(vector.norm()), rel=1e-9)
            assert line.update_norm == pytest.approx(float(torch.outer(x, delta).norm()), rel=1e-9)
            if subject.family.startswith("gemma") and matrix.writes:
                block = subject.anatomy.blocks[1]
                norm: Any = block.attention_write if kind == "attention_output" else block.mlp_write
                vector = vector * (norm.weight + 1)
            ids: Any = line.top_ids
            assert ids == tuple(project(subject, vector).argsort(descending=True).tolist())
            assert line.bottom_ids == ids[::-1]
            assert line.token == f"#{pair.clean[at]}"


def test_a_last_layers_write_at_the_last_token_promotes_its_answer() -> None:
    subject = subject_of("gpt2")
    ids = make_pairs().pairs[0].clean
    for answer in (5, 40, 80):
        pairs = Pairs((PromptPair("x", ids, ids, (answer,)),), "test")
        table = backward_lens(subject, pairs, layers=(2,), k=1)
        assert list(table["position"]) == [len(ids) - 1]  # behind the last block no other token is read
        assert table["top_ids"][0] == (answer,)


@pytest.mark.parametrize("kind", ["mlp_down", "attention_output", "mlp_up"])
def test_a_small_step_lowers_the_loss_by_the_squared_size_of_the_factors_product(family: str, kind: str) -> None:
    subject, pair = load(families.build(family, torch.float64)), make_pairs().pairs[1]
    (batch,) = Pairs((pair,), "test").batches()
    matrix = matrices_of(subject, (kind,), (1,))[0]
    own = factors(subject, batch, [matrix])[matrix.name]
    gradient = own.inputs[0].T @ own.gradients[0]
    before, step = loss_by_hand(subject, pair).item(), 1e-3 / float(gradient.square().sum())
    with torch.no_grad():
        base: Any = base_layer(matrix.module)
        base.weight -= step * (gradient if is_conv1d(matrix.module) else gradient.T)
    after = loss_by_hand(subject, pair).item()
    # to first order the loss falls by step · |gradient|²
    assert before - after == pytest.approx(1e-3, rel=0.1)


def test_a_step_raises_promoted_tokens_above_suppressed_ones_where_the_matrix_writes() -> None:
    subject, pair = load(families.build("gpt2", torch.float64)), make_pairs(target=False).pairs[0]
    table = backward_lens(subject, Pairs((pair,), "test"), layers=(2,), k=5)
    (batch,) = Pairs((pair,), "test").batches()
    (matrix,) = matrices_of(subject, ("mlp_down",), (2,))
    own = factors(subject, batch, [matrix])[matrix.name]
    ids = torch.tensor([pair.clean])
    with torch.no_grad():
        before = subject.plain(ids).logits[0, -1]
        base: Any = base_layer(matrix.module)
        base.weight -= 1e-4 * own.inputs[0].T @ own.gradients[0]
        change = subject.plain(ids).logits[0, -1] - before
    top, bottom = (change[list(table[f"{end}_ids"].iloc[-1])] for end in ("top", "bottom"))
    assert top.min() > 0 > bottom.max()
    assert change[list(pair.answers)].min() > 0


# the directions of whole gradients


@pytest.mark.parametrize("kind", MATRICES)
def test_directions_are_the_singular_vectors_of_the_mean_gradient(family: str, kind: str) -> None:
    subject, pairs = subject_of(family), make_pairs()
    # two batches, one of them padded
    table = gradient_directions(subject, pairs, matrices=(kind,), layers=(1,), rank=3, k=K, execution=Execution(tokens_per_batch=28))
    tolerance = 1e-9 if family in ("gpt2", "gpt_neox", "opt", "phi") else 1e-5
    for matrix in matrices_of(subject, (kind,), (1,)):
        gradient = torch.stack([gradient_by_hand(subject, pair, matrix.module) for pair in pairs]).mean(0)
        u, s, vh = torch.linalg.svd(gradient)
        own = table[table["module"] == matrix.name]
        assert list(own["direction"]) == [0, 1, 2]
        np.testing.assert_allclose(own["singular_value"], s[:3], rtol=tolerance)
        np.testing.assert_allclose(own["share"], s[:3] ** 2 / gradient.square().sum(), rtol=tolerance)
        mean = torch.zeros(len(u), dtype=torch.float64)
        for pair in pairs:
            (batch,) = Pairs((pair,), "one").batches()
            one = factors(subject, batch, [matrix])[matrix.name]
            mean += one.inputs[0][one.gradients[0].abs().sum(-1) > 0].sum(0)
        for index, line in enumerate(own.itertuples()):
            sign = torch.sign(u[:, index] @ mean)
            vector = sign * (-vh[index] if matrix.writes else u[:, index])
            if subject.family.startswith("gemma") and matrix.writes:
                block = subject.anatomy.blocks[1]
                norm: Any = block.attention_write if kind == "attention_output" else block.mlp_write
                vector = vector * (norm.weight + 1)
            ids: Any = line.top_ids
            assert ids[:5] == tuple(project(subject, vector).argsort(descending=True)[:5].tolist())
            assert line.bottom_ids == ids[::-1]


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12)])
def test_many_tokens_keep_no_more_factors_than_the_matrix_is_high(shape: tuple[int, int]) -> None:
    generator, whole, kept = torch.Generator().manual_seed(0), torch.zeros(shape, dtype=torch.float64), _Gradient()
    for _ in range(9):
        x, delta = (torch.randn(1, 7, width, generator=generator, dtype=torch.float64) for width in shape)
        whole += x[0].T @ delta[0] / 4
        kept.add(Factors(x, delta), texts=4)
        assert sum(map(len, kept._inputs)) <= 2 * shape[0] + 7
    u, s, v = kept.directions()
    close(u @ torch.diag(s) @ v.T, whole)
    close(s[: min(shape)], torch.linalg.svdvals(whole))


# what is asked


def test_gated_mlps_have_two_up_matrices_and_fused_readers_count_once() -> None:
    names = {family: [matrix.name.rpartition(".")[2] for matrix in matrices_of(subject_of(family), MATRICES, (1,))] for family in FAMILIES}
    assert names["gpt2"] == ["c_attn", "c_proj", "c_fc", "c_proj"]
    assert names["llama"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert names["phi3"] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_the_table_is_tidy_and_tokens_are_spelled_where_there_is_a_tokenizer() -> None:
    subject = replace(subject_of("gpt2"), tokenizer=families.tokenizer())
    table = backward_lens(subject, make_pairs(), layers=(2, 0), k=2)
    expected = ["text", "layer", "matrix", "module", "position", "token", "side", "norm", "update_norm"]
    assert list(table.columns) == [*expected, "top_ids", "top_tokens", "bottom_ids", "bottom_tokens"]
    assert list(table["layer"].unique()) == [0, 2]
    line = table.iloc[0]
    assert line["token"] == f"w{make_pairs().pairs[0].clean[line['position']]}"
    assert line["top_tokens"] == tuple(subject.tokenizer.decode([token]) for token in line["top_ids"])
    assert isinstance(gradient_directions(subject, make_pairs(), layers=(0,), k=2), pd.DataFrame)


def test_what_cannot_be_asked_is_refused_by_name() -> None:
    subject, pairs = subject_of("gpt2"), make_pairs()
    with pytest.raises(SettingsError, match="W_E"):
        backward_lens(subject, pairs, matrices=("W_E",))
    with pytest.raises(SettingsError, match="layer 3"):
        backward_lens(subject, pairs, layers=(3,))
    with pytest.raises(SettingsError, match="no matrix"):
        backward_lens(subject, pairs, layers=())
    with pytest.raises(SettingsError, match="k is 98"):
        backward_lens(subject, pairs, k=98)
    with pytest.raises(SettingsError, match="rank is 0"):
        gradient_directions(subject, pairs, rank=0)
    bare = Pairs((PromptPair("x", (5, 6), (5, 6)),), "test")
    with pytest.raises(DataError, match="neither a target"):
        backward_lens(subject, bare)


def test_no_gradient_is_left_on_the_model() -> None:
    subject = subject_of("llama")
    backward_lens(subject, make_pairs(), matrices=MATRICES)
    assert all(parameter.grad is None for parameter in subject.plain.parameters())
