"""Techniques on hybrid stacks: tables of heads hold the layers that attend under their own numbers, and mixers are ablated, patched, exchanged and read."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.adapt.targets import find_targets
from mechscope.causal import ablate, ablate_together, attribution_patch, cross_patch, mean_of, patch
from mechscope.circuits import Graph
from mechscope.data.prompt import Encoded, Example
from mechscope.difference import difference
from mechscope.difference.selection import select, selection_table
from mechscope.errors import ModelError, SettingsError
from mechscope.heads import pattern_roles, roles_table
from mechscope.heads.pattern_roles import repeated_texts
from mechscope.instrument import Execution, load
from mechscope.lens.attribution import attribute_logits
from mechscope.probing import Activations, components_of
from mechscope.studies.noted import note_layers_without_heads, noting
from mechscope.subject import Components, pair
from tests import families
from tests.hybrids import plain as hybrid
from tests.hybrids.plain import ATTENDS, FACTORS, FAMILIES, MIXES
from tests.matrix.configs import VOCABULARY

TEXTS = hybrid.texts()
# what each family calls its final norm
FINAL = {"lfm2": "embedding_norm", "jamba": "final_layernorm", "granitemoehybrid": "norm"}
# of two or three texts
FEW = Execution(tokens_per_batch=30)


def assert_near(found: Any, expected: Any) -> None:
    """See that metrics are equal but for the rounding of float32, in which parts of these families compute."""
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_ablating_a_mixer_is_a_hook_in_the_plain_model(family: str) -> None:
    plain = hybrid.model(family)
    found = ablate(hybrid.subject(family), TEXTS, sites=("mixer", "mlp"), metric="logit-diff", execution=FEW)
    assert list(found.table["component"]) == ["mixer0", "mixer2", "m0", "m1", "m2"]
    for place, layer in enumerate(MIXES):
        with hybrid.giving(hybrid.mixer(plain, family, layer), lambda x: x * 0):
            assert_near(found.values[place], [hybrid.difference(plain, one) for one in TEXTS])


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_a_mixer_takes_what_it_gives_in_the_other_text(family: str) -> None:
    plain = hybrid.model(family)
    found = patch(hybrid.subject(family), TEXTS, site="mixer", direction="noise", execution=FEW)
    for place, layer in enumerate(MIXES):
        expected = []
        for one in TEXTS:
            other = hybrid.outputs(plain, hybrid.mixer(plain, family, layer), one.corrupt)
            with hybrid.giving(hybrid.mixer(plain, family, layer), hybrid.constant(other[None])):
                expected.append(hybrid.difference(plain, one))
        assert_near(found.values[place], expected)


def test_ablating_a_mixer_to_its_mean_gives_the_mean_of_what_it_gives() -> None:
    here, plain, layer = hybrid.subject("lfm2"), hybrid.model("lfm2"), 2
    rows = torch.cat([hybrid.outputs(plain, hybrid.mixer(plain, "lfm2", layer), one.clean) for one in TEXTS])
    found = ablate(here, TEXTS, sites=("mixer",), source=mean_of(here, TEXTS, sites=("mixer_output",)), metric="logit-diff", execution=FEW)
    with hybrid.giving(hybrid.mixer(plain, "lfm2", layer), lambda x: x * 0 + rows.mean(0)):
        assert_near(found.values[1], [hybrid.difference(plain, one) for one in TEXTS])


@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_patching_of_a_mixer_is_the_derivative_of_patching_it(family: str) -> None:
    plain = hybrid.model(family)
    found = attribution_patch(hybrid.subject(family), TEXTS, site="mixer", direction="noise", execution=FEW)
    for place, layer in enumerate(MIXES):
        module = hybrid.mixer(plain, family, layer)
        for row, one in enumerate(TEXTS):
            change = hybrid.outputs(plain, module, one.corrupt) - hybrid.outputs(plain, module, one.clean)
            predicted = found.values[place, row] - found.unchanged[row]
            apart = []
            for step in (1e-3, 1e-4):  # the larger one may cross a kink, the smaller one meets rounding
                ends = []
                for size in (step, -step):
                    with hybrid.giving(module, hybrid.shifted(size * change)):
                        ends.append(hybrid.difference(plain, one))
                apart.append(abs(predicted - (ends[0] - ends[1]) / (2 * step)))
            assert min(apart) < 2e-3 * max(1.0, abs(predicted))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_does_not_attend_is_its_mixer_and_its_mlp(family: str) -> None:
    sets = ("layers:2", "mixer2,m2", "layers:1", "a1.h0,a1.h1,a1.h2,a1.h3,m1")
    found = ablate_together(hybrid.subject(family), TEXTS, sets, execution=FEW).values
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    np.testing.assert_allclose(found[2], found[3], rtol=1e-12)
    assert abs(found[0] - found[2]).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_exchanging_a_mixers_weights_gives_the_base_with_the_tuned_mixer(family: str) -> None:
    pair = hybrid.both(family)
    found = cross_patch(pair, TEXTS, levels=("mixer", "layer"), sets=("mixer2,m1",), by="weights", metric="logit-diff", execution=FEW)[
        "into_base"
    ]
    assert list(found.table["component"]) == ["mixer0", "mixer2", "layers:0", "layers:1", "layers:2", "m1,mixer2"]
    mixed = copy.deepcopy(hybrid.model(family, 0))
    hybrid.mixer(mixed, family, 2).load_state_dict(hybrid.mixer(hybrid.model(family, 1), family, 2).state_dict())
    assert_near(found.values[1], [hybrid.difference(mixed, one) for one in TEXTS])
    whole = copy.deepcopy(hybrid.model(family, 0))
    whole.model.layers[0].load_state_dict(hybrid.model(family, 1).model.layers[0].state_dict())
    assert_near(found.values[2], [hybrid.difference(whole, one) for one in TEXTS])


@pytest.mark.parametrize("family", ["lfm2", "jamba", "granitemoehybrid"])
def test_direct_logit_attribution_has_a_row_for_a_mixer_and_adds_up(family: str) -> None:
    plain = hybrid.model(family)
    found = attribute_logits(hybrid.subject(family), TEXTS, execution=FEW)
    table = found.table()
    assert list(table[table["kind"] == "mixer"]["component"]) == ["mixer0", "mixer2"]
    assert set(table[table["kind"] == "head"]["layer"]) == {ATTENDS}
    assert_near(found.values, [hybrid.difference(plain, one) for one in TEXTS])
    np.testing.assert_allclose(found.effects[:, -1], 0, atol=2e-5 * abs(found.effects).max())
    # the same by hand: what the mixer wrote, through the final norm with its scale held, and the unembedding
    norm, unembedding = plain.base_model.get_submodule(FINAL[family]), plain.lm_head.weight.double()
    for layer in MIXES:
        column = list(table["component"]).index(f"mixer{layer}")
        for row, one in enumerate(TEXTS):
            written = hybrid.outputs(plain, hybrid.mixer(plain, family, layer), one.clean)[-1].double() * FACTORS.get(family, 1.0)
            last = hybrid.outputs(plain, plain.model.layers[2], one.clean).double()
            last = (last[0] if last.ndim == 3 else last)[-1]
            scale = (last.square().mean() + norm.variance_epsilon).rsqrt()
            direction = unembedding[list(one.answers)].mean(0) - unembedding[list(one.wrong_answers)].mean(0)
            by_hand = (written * scale * norm.weight.double()) @ direction / float(getattr(plain.config, "logits_scaling", 1.0))
            assert_near(found.effects[row, column], float(by_hand))


def test_probes_read_each_site_where_layers_have_it() -> None:
    here, plain = hybrid.subject("jamba"), hybrid.model("jamba")
    assert [one.name for one in components_of(here, "attention_output")] == ["a1"]
    assert [one.name for one in components_of(here, "head")] == ["a1.h0", "a1.h1", "a1.h2", "a1.h3"]
    assert [one.name for one in components_of(here, "mixer_output")] == ["mixer0", "mixer2"]
    (batch,) = TEXTS.batches(tokens_per_batch=1000)
    rows = Activations(here, "mixer_output", "last").rows(batch)
    for place, layer in enumerate(MIXES):
        for row, one in enumerate(batch.pairs):
            hybrid.assert_close(rows[place, row], hybrid.outputs(plain, hybrid.mixer(plain, "jamba", layer), one.clean)[-1])
    with pytest.raises(SettingsError, match="all its layers attend; probe attention_output"):
        components_of(families.subject("gpt2"), "mixer_output")


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_hold_the_layers_that_attend_under_their_own_numbers(family: str) -> None:
    here, plain = hybrid.subject(family), hybrid.model(family)
    scores = pattern_roles(here, n=4)
    table = roles_table(scores)
    assert {(row.layer, row.component) for row in table.itertuples()} == {(ATTENDS, f"a1.h{head}") for head in range(here.anatomy.n_heads)}
    previous = next(one for one in scores if one.role.name == "previous-token")
    for row, one in enumerate(repeated_texts(here, 4)):
        seen = hybrid.attention(plain, one.corrupt)
        # from the third token on: the one before it is not the first
        expected = seen.diagonal(-1, dim1=1, dim2=2)[:, 1:].mean(-1)
        np.testing.assert_allclose(previous.score[row, 0], expected, rtol=1e-4, atol=1e-5)


def documents() -> Encoded:
    texts = families.documents(VOCABULARY, seed=3, lengths=(12, 9, 14, 10, 11, 8, 13))
    return Encoded(tuple(Example(str(row), tuple(text.tolist()), (1, 5), (5, len(text)), False) for row, text in enumerate(texts)), {})


@torch.no_grad()
def by_maps(family: str) -> dict[str, np.ndarray]:
    """Return, per document, each head's mean entropy in base and tuned model and KL, by plain maps."""
    found: dict[str, list[np.ndarray]] = {"entropy_base": [], "entropy_tuned": [], "kl_base_tuned": []}
    plain = [hybrid.model(family, seed) for seed in (0, 1)]
    for one in documents().examples:
        p, q = (hybrid.attention(each, one.input_ids) for each in plain)
        log_p, log_q = (x.clamp(min=1e-300).log() for x in (p, q))
        found["entropy_base"].append(-(p * log_p).sum(-1).mean(-1).numpy())
        found["entropy_tuned"].append(-(q * log_q).sum(-1).mean(-1).numpy())
        found["kl_base_tuned"].append((p * (log_p - log_q)).sum(-1).mean(-1).numpy())
    return {name: np.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_difference_has_heads_where_layers_attend_and_mixers_in_the_layers(family: str) -> None:
    found = difference(hybrid.both(family), documents(), replicates=20, execution=Execution(tokens_per_batch=40))
    heads = found.heads[found.heads["rows"] == "all"]
    assert list(zip(heads["layer"], heads["head"], strict=True)) == [(ATTENDS, head) for head in range(4)]
    for name, values in by_maps(family).items():
        np.testing.assert_allclose(heads[name], values.mean(0), rtol=1e-4, atol=1e-5)
    layers = found.layers[found.layers["rows"] == "all"].set_index("layer")
    assert list(layers.index) == [0, 1, 2]
    for name in ("kl_base_tuned", "entropy_change", "score"):
        assert list(layers[name].notna()) == [False, True, False]
    for name in ("write_change", "write_change_own", "mlp_write_change", "cosine_distance", "weight_change", "cka"):
        assert layers[name].notna().all()
    plain = [hybrid.model(family, seed) for seed in (0, 1)]
    for layer in MIXES:  # each model on its own stream: the mixers' own outputs
        own = []
        for one in documents().examples:
            ours, theirs = (hybrid.outputs(each, hybrid.mixer(each, family, layer), one.input_ids) for each in plain)
            own.append(float((theirs - ours).norm(dim=-1).mean() / ours.norm(dim=-1).mean()))
        assert_near(layers["write_change_own"][layer], np.mean(own))
    kinds = found.weights.groupby("layer")["kind"].agg(set)
    assert all(any(kind.startswith("mixer") for kind in kinds[layer]) for layer in MIXES)
    assert not any(kind.startswith("mixer") for kind in kinds[ATTENDS])
    names = {name for name, _ in hybrid.subject(family).weights()}
    assert {name.partition("[")[0] for name in found.weights["name"]} == names


@pytest.mark.parametrize("family", ["jamba", "qwen3_next"])
def test_on_the_same_input_a_mixer_that_did_not_change_writes_the_same(family: str) -> None:
    tuned = copy.deepcopy(hybrid.model(family, 0))
    with torch.no_grad():
        for parameter in hybrid.mixer(tuned, family, 2).parameters():
            parameter.mul_(1.1)
        tuned.model.embed_tokens.weight.add_(
            0.05 * torch.randn(tuned.model.embed_tokens.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    layers = difference(pair(hybrid.subject(family), load(tuned)), documents(), replicates=0).layers
    layers = layers[layers["rows"] == "all"].set_index("layer")
    same, own = (layers[name].to_numpy(dtype=np.float64) for name in ("write_change", "write_change_own"))
    assert same[0] < 1e-5 < 1e-3 < own[0]
    assert same[2] > 1e-2


def test_rules_of_selection_rank_what_has_what_they_rank_by() -> None:
    found = difference(hybrid.both("jamba"), documents(), replicates=20)
    table = selection_table(found.heads, found.layers, {name: found.replicates(name) for name in ("kl_base_tuned", "write_change")})
    candidates = table.groupby("rule")["layer"].agg(lambda layers: sorted(set(layers)))
    assert candidates["layers_by_kl"] == candidates["layers_by_score"] == candidates["heads_by_write"] == [ATTENDS]
    assert candidates["layers_by_write"] == candidates["last_layers"] == candidates["random_layers"] == [0, 1, 2]
    assert table["frequency"].between(0, 1).all()
    chosen = select("layers_by_write", found.heads, found.layers).components
    layers = found.layers[found.layers["rows"] == "all"]
    assert chosen.layers == (int((layers["write_change"] + layers["mlp_write_change"]).to_numpy().argmax()),)


def test_lora_is_placed_on_the_maps_of_a_mixer() -> None:
    here = hybrid.subject("jamba")
    of_mixer = {f"model.layers.0.mamba.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    assert {target.name for target in find_targets(here, Components.parse("mixer0"))} == of_mixer
    assert {target.name for target in find_targets(here, Components.parse("layers:0"))} == of_mixer
    both = {target.name for target in find_targets(here, Components.parse("layers:0,a1.h0"), modules="all")}
    assert both - of_mixer == {f"model.layers.0.feed_forward.{name}_proj" for name in ("gate", "up", "down")} | {
        f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"
    }
    gated = find_targets(hybrid.subject("qwen3_next"), Components.parse("a1.h2"))
    rows = next(target.rows for target in gated if target.name.endswith("q_proj"))
    assert rows == tuple(range(32, 48))  # its query and, behind it, its gate


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_are_refused_with_the_layers_that_do_not_attend(family: str) -> None:
    with pytest.raises(
        ModelError, match="a graph of edges between heads and MLPs needs a model that attends in every layer: layers 0, 2 mix tokens by"
    ):
        Graph.of(hybrid.subject(family))


def test_a_table_of_heads_says_which_layers_do_not_attend() -> None:
    with noting() as notes:
        note_layers_without_heads(hybrid.subject("jamba"), "heads")
        note_layers_without_heads(families.subject("gpt2"), "heads")
    (note,) = notes
    assert (note["weakens"], note["text"]) == ("heads", "jamba: layers 0, 2 do not attend (JambaMambaMixer), so they have no heads")
