"""What senders write on average, and where closed edges may take their values from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.graph import Graph
from mechscope.circuits.sender_outputs import SITES, SenderOutputs, differences, expanded, require_source, source_name
from mechscope.data.pairs import Pairs, collate_pairs, from_tokens
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument import CachedRun, record
from mechscope.instrument.execution import Execution
from mechscope.instrument.wiring import Wiring
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs
from tests.circuits.brute import TOLERANCE, brute_written, read_metric
from tests.slips import slip

FOUR = ("gpt2", "gpt_neox", "llama", "gemma2")
PAIRS = random_pairs(4)
TEXTS = random_pairs(5, lengths=(6, 11, 8), seed=9)  # for means
BATCH = collate_pairs(PAIRS.pairs[:2])


def subject_of(family: str) -> Subject:
    return families.subject(family, torch.float64)


def close(found: Any, expected: Any, family: str, message: str = "") -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=TOLERANCE[family], err_msg=message)


def own_bias(subject: Subject, layer: int) -> Any:
    """Return the bias of a layer's output projection, or 0."""
    bias = subject.anatomy.blocks[layer].output.module.bias
    return 0.0 if bias is None else bias


@torch.no_grad()
def stream(subject: Subject, ids: Sequence[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return what embedding, heads (layer by layer, together) and MLPs write to one text, each ``(token, d_model)``."""
    with record(subject, "embedding", "attention_output", "mlp_output") as seen:
        subject.plain(torch.tensor([ids]), use_cache=False)
    layers = range(subject.anatomy.n_layers)
    heads = [seen["attention_output", layer][0] - own_bias(subject, layer) for layer in layers]
    return seen["embedding"][0], heads, [seen["mlp_output", layer][0] for layer in layers]


@torch.no_grad()
def logits_of(subject: Subject, written: Tensor) -> Tensor:
    """Return the logits of what was written and the model's own biases: its final norm, its unembedding, and Gemma 2's soft cap."""
    last = written + sum(own_bias(subject, layer) for layer in range(subject.anatomy.n_layers))
    assert subject.anatomy.final_norm is not None
    logits = subject.plain.get_output_embeddings()(subject.anatomy.final_norm(last))
    cap = getattr(subject.plain.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("tokens_per_batch", [1, 1000])
@pytest.mark.parametrize("family", FOUR)
def test_means_are_plain_averages_over_all_real_tokens(family: str, tokens_per_batch: int) -> None:
    subject = subject_of(family)
    seen = [brute_written(subject.model, family, text.clean) for text in TEXTS]
    expected = {name: torch.cat([one[name] for one in seen]).mean(0) for name in seen[0]}
    mean = SenderOutputs.mean_over(subject, TEXTS, execution=Execution(tokens_per_batch=tokens_per_batch))
    close(mean.embedding[0, 0], expected["embed"], family, "embed")
    for layer in range(families.LAYERS):
        close(mean.mlp[layer][0, 0], expected[f"m{layer}"], family, f"m{layer}")
        for head, found in enumerate(expanded(mean.wiring, layer, mean.z[layer])):
            close(found[0, 0], expected[f"a{layer}.h{head}"], family, f"a{layer}.h{head}")


@pytest.mark.parametrize("metric", ["logit-diff", "loss"])
@pytest.mark.parametrize("source", ["corrupt", "zero", "mean", "model"])
@pytest.mark.parametrize("family", FOUR)
def test_without_edges_the_logits_read_what_the_source_wrote(family: str, source: str, metric: str) -> None:
    subject, other = subject_of(family), families.subject(family, torch.float64, 5)
    at = [sum([*heads, *mlps], first) for first, heads, mlps in (stream(subject, text.clean) for text in TEXTS)]
    mean = torch.cat(at).mean(0)
    expected = []
    for pair in PAIRS:
        given = {"corrupt": (subject, pair.corrupt), "model": (other, pair.clean)}.get(source)
        written = mean.expand(len(pair.clean), -1) if source == "mean" else torch.zeros(len(pair.clean), len(mean), dtype=torch.float64)
        if given is not None:
            first, heads, mlps = stream(*given)
            written = sum(heads + mlps, first)
        expected.append(read_metric(logits_of(subject, written), pair, metric))
    chosen: Any = {"mean": SenderOutputs.mean_over(subject, TEXTS), "model": other}.get(source, source)
    for padding in ("right", "left"):
        runs = CircuitRuns(subject, collate_pairs(PAIRS.pairs, padding=padding), metric, source=chosen)
        close(runs.run(torch.zeros(1, len(runs.graph)))[0], expected, family, padding)
        close(runs.corrupt, expected, family, padding)
    alone = [CircuitRuns(subject, collate_pairs([pair]), metric, source=chosen).corrupt[0] for pair in PAIRS]
    close(alone, expected, family)


@torch.no_grad()
def written(subject: Subject, ids: Sequence[int]) -> SenderOutputs:
    return SenderOutputs.by(CachedRun(subject, torch.tensor([ids]), sites=SITES), Wiring(subject))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_difference_of_two_models_is_of_what_each_writes_with_its_own_weights(family: str) -> None:
    one, other = subject_of(family), families.subject(family, torch.float64, 5)
    ids = PAIRS.pairs[0].clean
    found = differences(Graph.of(one), written(one, ids), written(other, ids))
    a, b = (brute_written(subject.model, family, ids) for subject in (one, other))
    for place, name in enumerate(Graph.of(one).senders):
        close(found[place, 0], a[name] - b[name], family, name)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_adapters_view_without_it_writes_what_the_plain_model_writes(family: str) -> None:
    targets = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["v_proj", "o_proj", "up_proj"], "gemma2": ["v_proj", "o_proj", "up_proj"]}
    config = LoraConfig(r=4, target_modules=targets[family], init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    torch.manual_seed(0)  # PEFT draws the adapter from torch's own generator
    tuned = load(get_peft_model(families.build(family, torch.float64), config).double())
    merged = load(copy.deepcopy(tuned.model).merge_and_unload())
    ids = PAIRS.pairs[0].clean
    for one, same in ((tuned.without_adapter(), subject_of(family)), (tuned, merged)):
        found, expected = written(one, ids), written(same, ids)
        for layer in range(families.LAYERS):
            close(found.heads(layer), expected.heads(layer), family, f"{one.source}, layer {layer}")
            close(found.mlp[layer], expected.mlp[layer], family, f"{one.source}, layer {layer}")


def test_a_model_of_another_shape_or_kind_is_refused_as_source() -> None:
    own = subject_of("gpt2")
    others = {
        "n_layers is 2 there, 3 here": families.build("gpt2", torch.float64, n_layer=2),
        "n_heads is 2 there, 4 here": families.build("gpt2", torch.float64, n_head=2),
        "d_model is 64 there, 32 here": families.build("gpt2", torch.float64, n_embd=64),
        "it is opt, this model is gpt2": families.build("opt", torch.float64),
    }
    for message, model in others.items():
        with pytest.raises(ModelError, match=message):
            CircuitRuns(own, BATCH, source=load(model))


def test_means_of_another_model_are_refused() -> None:
    own = families.subject("qwen3", torch.float64)
    changes: list[dict[str, Any]] = [{"num_hidden_layers": 2}, {"num_attention_heads": 2}, {"head_dim": 8}, {"hidden_size": 48}]
    for change in changes:
        other = SenderOutputs.mean_over(load(families.build("qwen3", torch.float64, **change)), TEXTS)
        with pytest.raises(DataError, match="not this model's: average them over its own texts"):
            CircuitRuns(own, BATCH, source=other)


def test_a_single_texts_run_is_no_mean_for_texts_of_other_lengths() -> None:
    subject = subject_of("gpt2")
    with pytest.raises(DataError, match="average them over its own texts"):
        CircuitRuns(subject, BATCH, source=written(subject, (5, 6, 7)))


def test_a_source_that_is_not_known_is_named() -> None:
    with pytest.raises(SettingsError, match="source 'mean' is not known: closed edges take values of the corrupt run, of means"):
        CircuitRuns(subject_of("gpt2"), BATCH, source=slip("mean"))
    with pytest.raises(SettingsError, match="source None is not known"):
        CircuitRuns(subject_of("gpt2"), BATCH, source=slip(None))


def test_texts_without_a_corrupt_version_need_another_source() -> None:
    same = from_tokens(torch.tensor([[5, 6, 7]]))
    with pytest.raises(DataError, match="pair '0' has the same clean and corrupt text"):
        require_source(same, "corrupt")
    for source in ("zero", SenderOutputs.mean_over(subject_of("gpt2"), TEXTS), subject_of("gpt2")):
        require_source(same, source)


def test_sources_are_called_by_their_names() -> None:
    subject = subject_of("gpt2")
    assert [source_name(one) for one in ("corrupt", "zero", SenderOutputs.mean_over(subject, TEXTS))] == ["corrupt", "zero", "mean"]
    assert source_name(subject) == subject.source


def test_texts_that_do_not_fit_the_model_have_no_mean() -> None:
    with pytest.raises(DataError, match="holds token 97, the model's vocabulary has 97"):
        SenderOutputs.mean_over(subject_of("gpt2"), from_tokens(torch.tensor([[5, 97]])))
    with pytest.raises(SettingsError, match="there are no pairs"):
        SenderOutputs.mean_over(subject_of("gpt2"), Pairs((), "none"))
