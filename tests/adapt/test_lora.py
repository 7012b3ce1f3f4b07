"""LoRA learns exactly where it is placed, and is an ordinary adapter."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from mechscope.adapt.lora import attach, leak, total_parameters
from mechscope.adapt.targets import Target, find_targets, place, placement
from mechscope.errors import ModelError, SettingsError
from mechscope.subject.components import Components
from mechscope.subject.load import load
from tests import families

FAMILIES = ("gpt2", "llama", "gpt_neox", "qwen3", "gemma2")


def learn(model: PeftModel, steps: int = 6) -> None:
    """Take optimizer steps of the kind that could leak: momentum, decoupled decay, clipping, bfloat16."""
    torch.manual_seed(0)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=0.02, weight_decay=0.1)
    ids = torch.randint(0, 40, (4, 12))
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 0.1)
        optimizer.step()
        optimizer.zero_grad()


def change(model: PeftModel, name: str) -> torch.Tensor:
    """Return peft's own ΔW of a module as (output, input)."""
    layer = model.get_base_model().get_submodule(name)
    delta = layer.get_delta_weight("default").detach()
    return delta.T if layer.fan_in_fan_out else delta


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_slices_of_the_chosen_heads_change(make_subject, family):
    subject = make_subject(family)
    heads = [(0, 1), (2, 0), (2, 3)]
    placed = place(subject, Components.of_heads(heads), rank=2)
    model = attach(subject, placed)
    learn(model)
    for layer, block in enumerate(subject.anatomy.blocks):
        own = [head for number, head in heads if number == layer]
        for piece in (block.query, block.key, block.value, block.output):
            if not own:
                assert not hasattr(model.get_base_model().get_submodule(piece.name), "lora_A")
                continue
            delta = change(model, piece.name)
            for head in range(subject.anatomy.n_heads):
                touched = piece.take(delta, head)
                # a key/value slice is shared by its group: it moves if any of the group is chosen
                shares = any(torch.equal(piece.features(head), piece.features(other)) for other in own)
                assert bool((touched != 0).any()) is shares
                assert bool((touched == 0).all()) is not shares
    assert leak(model, placed) == 0.0


def test_a_group_of_queries_shares_its_key_slice_but_not_its_query_slice(make_subject):
    subject = make_subject("llama")
    targets = {target.name.rpartition(".")[2]: target for target in place(subject, Components.parse("a1.h3"), rank=1).targets}
    assert targets["q_proj"].rows == tuple(range(24, 32))
    assert targets["k_proj"].rows == targets["v_proj"].rows == tuple(range(8, 16))
    assert targets["o_proj"].columns == tuple(range(24, 32))


def test_the_masks_survive_infinite_gradients(make_subject):
    subject = make_subject("gpt2")
    placed = place(subject, Components.parse("a0.h2"), rank=2)
    model = attach(subject, placed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            (parameter.sum() * float("inf")).backward()
    outside = 0
    for target in placed.targets:
        layer = model.get_base_model().get_submodule(target.name)
        weight = layer.lora_B["default"].weight if target.rows is not None else layer.lora_A["default"].weight
        keep = torch.zeros_like(weight, dtype=torch.bool)
        if target.rows is not None:
            keep[list(target.rows)] = True
        else:
            keep[:, list(target.columns or ())] = True
        assert weight.grad[keep].isinf().all()
        assert (weight.grad[~keep] == 0).all()
        outside += int((~keep).sum())
    assert outside > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["a0.h1,a2.h2", "layers:1", "m2", "a0.h0,layers:1,m2"])
def test_plain_peft_loads_the_adapter_to_the_same_logits(make_subject, family, where, tmp_path):
    subject = make_subject(family)
    placed = place(subject, Components.parse(where), rank=2)
    model = attach(subject, placed)
    learn(model)
    model.eval().save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make_subject(family).model, tmp_path).eval()
    ids = torch.arange(20)[None] % 40
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.allclose(plain(input_ids=ids).logits, subject.model(input_ids=ids).logits, atol=1e-4)


def test_mechscope_itself_finds_the_base_of_a_saved_adapter(make_subject, tmp_path):
    subject = make_subject("gpt2")
    subject.model.save_pretrained(tmp_path / "base")
    subject.tokenizer.save_pretrained(tmp_path / "base")
    model = attach(load(tmp_path / "base", device="cpu"), Components.parse("a1.h1"), rank=2)
    learn(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter", device="cpu")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_an_adapted_model_starts_as_the_base(make_subject):
    subject = make_subject("gpt_neox")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(
            attach(subject, Components.parse("layers:0,1,2")).eval()(input_ids=ids).logits, subject.model(input_ids=ids).logits
        )


@pytest.mark.parametrize("share", [False, True])
def test_attaching_and_learning_leave_the_callers_model_alone(make_subject, share):
    subject = make_subject("gpt2")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    needed = [parameter.requires_grad for parameter in subject.model.parameters()]
    model = attach(subject, Components.parse("layers:0,a1.h2"), rank=2, share_weights=share)
    learn(model)
    after = subject.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in subject.model.parameters()] == needed


def test_sharing_weights_duplicates_none(make_subject):
    subject = make_subject("gpt2")
    storages = {parameter.data_ptr() for parameter in subject.model.parameters()}
    model = attach(subject, Components.parse("a0.h0"), rank=1, share_weights=True)
    frozen = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == storages


def test_the_same_seed_gives_the_same_start_and_another_another(make_subject):
    subject = make_subject("gpt2")
    starts = [attach(subject, Components.parse("layers:1"), seed=seed).state_dict() for seed in (5, 5, 6)]
    key = next(name for name in starts[0] if "lora_A" in name)
    assert torch.equal(starts[0][key], starts[1][key])
    assert not torch.equal(starts[0][key], starts[2][key])


def test_attaching_does_not_disturb_the_global_random_generator(make_subject):
    subject = make_subject("gpt2")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    attach(subject, Components.parse("layers:1"))
    assert torch.equal(torch.rand(3), expected)


def test_a_slice_starts_at_the_scale_of_its_own_width(make_subject):
    subject = make_subject("gpt2", n_embd=256, n_head=4)
    model = attach(subject, Components.parse("a0.h1"), rank=8)
    start = model.get_base_model().transformer.h[0].attn.c_proj.lora_A["default"].weight.detach()[:, 64:128]
    # uniform within ±1/sqrt(64): its standard deviation is 1/sqrt(3 · 64)
    assert start.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.1)


def test_trainable_parameters_are_those_counted_by_hand(make_subject):
    gpt2 = make_subject("gpt2")  # width 32, heads of 8
    # c_attn 32 → 96 and c_proj 32 → 32, rank 4
    assert place(gpt2, Components.parse("layers:1"), rank=4).trainable_parameters == 4 * (32 + 96) + 4 * (32 + 32)
    # one head: 3 × 8 of c_attn's outputs, 8 of c_proj's inputs
    assert place(gpt2, Components.parse("a0.h2"), rank=4).trainable_parameters == 4 * (32 + 24) + 4 * (8 + 32)
    llama = make_subject("llama")  # query heads of 8, two key/value heads
    assert place(llama, Components.parse("a0.h2"), rank=2).trainable_parameters == 2 * (3 * (32 + 8) + (8 + 32))
    assert place(llama, Components.parse("m0"), rank=2).trainable_parameters == 2 * 3 * (32 + 48)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_of_entries_that_really_move(make_subject, family):
    subject = make_subject(family)
    placed = place(subject, Components.parse("a0.h1,a0.h2,layers:2"), rank=3)
    model = attach(subject, placed)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    learn(model, steps=2)
    moved = sum(int((value.detach() != before[name]).sum()) for name, value in model.named_parameters())
    # bfloat16 gradients may round to zero by chance, so a few of the entries may not have moved in two steps
    assert 0.99 * placed.trainable_parameters <= moved <= placed.trainable_parameters


def test_only_the_chosen_layer_is_touched_where_names_are_prefixes_of_each_other(make_subject):
    subject = make_subject("gpt2", n_layer=12, n_embd=16, n_head=2)
    model = attach(subject, Components.parse("layers:1"), rank=2)
    touched = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert touched == {"base_model.model.transformer.h.1.attn.c_attn", "base_model.model.transformer.h.1.attn.c_proj"}


def test_each_map_gets_its_own_rank_at_the_same_scale(make_subject):
    subject = make_subject("gpt2", n_layer=12, n_embd=16, n_head=2)
    names = ("transformer.h.1.attn.c_attn", "transformer.h.11.attn.c_attn")
    placed = place(subject, Components.parse("layers:1,11"), rank=2, ranks={names[0]: 5})
    base = attach(subject, placed, scaling=3.0).get_base_model()
    layers = [base.get_submodule(name) for name in names]
    assert [layer.lora_A["default"].weight.shape[0] for layer in layers] == [5, 2]
    assert [layer.scaling["default"] for layer in layers] == [3.0, 3.0]


def test_whole_layers_can_mean_the_mlp_too(make_subject):
    subject = make_subject("llama")
    counts = {
        modules: len(place(subject, Components.parse("layers:0"), modules=modules).targets) for modules in ("attention", "mlp", "all")
    }
    assert counts == {"attention": 4, "mlp": 3, "all": 7}


def test_a_whole_layer_wins_over_one_of_its_heads(make_subject):
    subject = make_subject("gpt2")
    assert place(subject, Components.parse("layers:1,a1.h2")) == place(subject, Components.parse("layers:1"))


def test_tied_weights_are_counted_once(make_subject):
    model = make_subject("gpt2").model
    assert model.lm_head.weight is model.transformer.wte.weight
    by_hand = 40 * 32 + 64 * 32 + 3 * (4 * 32 * 32 * 3 + 32 * (3 + 1 + 4 + 1) + 4 * 32) + 2 * 32
    assert total_parameters(model) == by_hand


@pytest.mark.parametrize(
    ("where", "rank", "message"),
    [
        ("none", 4, "empty"),
        ("layers:7", 4, "layers:7 does not exist"),
        ("a0.h1", 9, r"rank 9 for transformer.h.0.attn.c_proj is more than its 32 × 8 slice can hold: use at most 8"),
        ("layers:0", 0, "at least 1"),
    ],
)
def test_impossible_placements_are_refused_by_name(make_subject, where, rank, message):
    with pytest.raises(SettingsError, match=message):
        place(make_subject("gpt2"), Components.parse(where), rank=rank)


def test_ranks_for_maps_that_do_not_learn_are_refused(make_subject):
    with pytest.raises(SettingsError, match=r"transformer\.h\.2\.attn\.c_attn, which layers:0 does not contain"):
        place(make_subject("gpt2"), Components.parse("layers:0"), ranks={"transformer.h.2.attn.c_attn": 3})


def test_an_adapter_is_not_adapted_again(make_subject):
    subject = load(attach(make_subject("gpt2"), Components.parse("layers:0")), device="cpu")
    with pytest.raises(ModelError, match="merge it"):
        attach(subject, Components.parse("layers:0"))


def test_a_rank_beyond_a_slice_is_refused_for_bare_targets():
    with pytest.raises(SettingsError, match="slice can hold"):
        placement([Target("x", 10, 10, conv1d=False, rows=(0, 1))], [3])


def test_experts_are_refused_with_the_reason() -> None:
    mixture = families.subject("gpt_oss")
    with pytest.raises(
        SettingsError, match=r"m1\.e2 is an expert: the experts of a layer share stacked weights, which PEFT adapts all together"
    ):
        find_targets(mixture, Components.parse("a0.h1,m1.e2"))
    with pytest.raises(SettingsError, match=r"no linear maps that LoRA could adapt \(its 4 experts share stacked weights\)"):
        find_targets(mixture, Components.parse("m1"))
