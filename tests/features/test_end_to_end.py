"""Training end to end has the gradients of autograd through the model, keeps predictions better than reconstruction alone, and goes on after a kill."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.data.pairs import Pairs, collate_pairs
from mechscope.errors import SettingsError
from mechscope.features import Live, Plan, Rule, autoencoder, crosscoder, measure, train, train_end_to_end, transcoder
from mechscope.features.affine import Affine
from mechscope.features.end_to_end import _Running
from mechscope.features.layout import Layout
from mechscope.features.objective import checked
from mechscope.features.step import step
from mechscope.instrument import Execution
from mechscope.settings.features import FeatureTraining, HarvestSettings, Objective
from mechscope.subject import Subject
from tests import families
from tests.features import dense_step
from tests.features.test_harvest import MODULES, WRITES, texts
from tests.features.test_trainer import KilledError

W = families.WIDTH
LENGTHS = (14, 9, 11, 6, 12, 13)
SETTINGS = HarvestSettings(outlier=None, rows=10_000)


def module_of(subject: Subject, family: str, layer: int, site: str) -> Any:
    """Return the module of a family whose output (or, for z, whose input) stands at a site."""
    block, projection, _ = MODULES[family]
    name = {"residual": "", "mlp_output": "." + WRITES.get(family, ("", "mlp"))[1], "z": "." + projection}[site]
    return subject.plain.get_submodule(block.format(layer) + name)


def dense_loss(
    subject: Subject, family: str, pairs: Pairs, layout: Layout, tensors: dict[str, Tensor], scale: Affine, objective: Objective
) -> Tensor:
    """Return the loss of whole texts, one by one, through Hugging Face's own forward pass with a dense dictionary hooked in."""
    (place,) = layout.outputs
    total, predicted, spared, kept = torch.zeros((), dtype=torch.float64), 0, [], 0
    for pair in pairs:
        ids = torch.tensor([pair.clean])
        with torch.no_grad():
            own = subject.plain(ids, use_cache=False).logits[0].log_softmax(-1)

        def change(x: Tensor) -> Tensor:
            flat = x.reshape(1, x.shape[1], -1)
            u = scale(flat[0, 1:])
            new = dense_codes(layout, tensors, u) @ tensors["decoder.0"] + tensors["decoder_bias"]
            spared.append((u - new).square().sum())
            return torch.cat([flat[:, :1], scale.back(new)[None]], dim=1).reshape(x.shape)

        module = module_of(subject, family, place.layer, place.site)
        if place.site == "z":
            hook = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
        else:
            hook = module.register_forward_hook(
                lambda _, __, output: (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
            )
        try:
            spoken = subject.plain(ids, use_cache=False).logits[0].log_softmax(-1)
        finally:
            hook.remove()
        if objective.end == "kl":
            total = total + (own.exp() * (own - spoken))[:-1].sum()
        else:
            total = total - spoken[:-1].gather(1, ids[0, 1:, None]).sum()
        predicted += len(pair.clean) - 1
        kept += len(pair.clean) - 1
    return objective.end_weight * total / predicted + objective.reconstruction * torch.stack(spared).sum() / kept


def dense_codes(layout: Layout, tensors: dict[str, Tensor], u: Tensor) -> Tensor:
    pre = u @ tensors["encoder.0"].T + tensors["encoder_bias"]
    assert layout.rule.k is not None
    return pre.clamp(min=0) * torch.zeros_like(pre).scatter(1, pre.detach().topk(layout.rule.k).indices, 1.0)


@pytest.mark.parametrize("end", ["kl", "loss"])
@pytest.mark.parametrize(
    ("family", "place"), [("gpt2", "resid0"), ("llama", "m1"), ("gpt_neox", "a0.z"), ("gemma2", "resid1"), ("llama", "a1.z")]
)
def test_gradients_are_those_of_autograd_through_the_model(family: str, place: str, end: Any) -> None:
    subject, pairs = families.subject(family, torch.float64), texts(LENGTHS)
    live = Live(subject, pairs, place, settings=SETTINGS)
    width = live.places[0].width(subject)
    layout = autoencoder(place, width, 20, Rule("topk", 4))
    objective = checked(Objective(end=end, end_weight=3.0, reconstruction=0.5), layout)
    tensors = dense_step.random_tensors(layout)
    scale = live.affine(live.places[0])
    running = _Running(subject, live, collate_pairs(pairs.pairs))
    # the model's type, not that of training
    u = scale(running._streams[live.places[0]][running._kept])

    def ahead(v: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = running.led(live.places[0], scale.back(v), objective)
        return loss, gradient.double() / scale.scale

    found = step(layout, tensors, u, u, objective, ahead=ahead)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    total = dense_loss(subject, family, pairs, layout, leaves, scale, objective)
    total.backward()
    # logits and their gradient are taken in single precision
    assert found.loss == pytest.approx(float(total), rel=1e-5)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0
        near = 1e-4 * float(leaf.grad.abs().max())
        torch.testing.assert_close(found.gradients[name], leaf.grad, rtol=1e-4, atol=near, msg=partial("{}: {}".format, name))


TRAINING = FeatureTraining(steps=60, batch=30, learning_rate=5e-3)


def test_predictions_are_kept_better_than_by_reconstruction_alone() -> None:
    subject, pairs = families.subject("llama"), texts(tuple(8 + at % 7 for at in range(40)))
    layout = autoencoder("resid1", W, 24, Rule("topk", 2))
    plans = {
        "end": Plan(layout, Objective(end="kl", reconstruction=0.0, aux_weight=0.0)),
        "both": Plan(layout, Objective(end="kl", end_weight=100.0, aux_weight=0.0)),
        "local": Plan(layout, Objective(aux_weight=0.0)),
    }
    found = train_end_to_end(subject, pairs, plans, training=TRAINING)
    kl = {name: measure(subject, each.dictionary, pairs).value("kl") for name, each in found.items()}
    variance = {name: measure(subject, each.dictionary, pairs).value("explained variance") for name, each in found.items()}
    assert kl["end"] < 0.9 * kl["local"]
    assert variance["end"] < variance["local"]
    assert kl["both"] < kl["local"]
    curve = found["end"].curve["loss"]
    assert curve.iloc[-10:].mean() < 0.8 * curve.iloc[:10].mean()


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    subject, pairs = families.subject("llama"), texts(LENGTHS)
    plans = {
        "end": Plan(transcoder(1, W, 24, Rule("batchtopk", 2), skip=True), Objective(end="loss", dead_after=100)),
        "gated": Plan(autoencoder("m1", W, 24, Rule("gated")), Objective(end="kl", sparsity=0.05)),
    }
    options: dict[str, Any] = {"training": FeatureTraining(steps=12, batch=20, learning_rate=1e-2), "keep_every": 5}
    whole = train_end_to_end(subject, pairs, plans, **options)

    def kill(label: str, done: int, total: int) -> None:
        if done == 8:
            raise KilledError

    with pytest.raises(KilledError):
        train_end_to_end(subject, pairs, plans, tmp_path / "run", **options, execution=Execution(progress=kill))
    again = train_end_to_end(subject, pairs, plans, tmp_path / "run", **options)
    for name, each in whole.items():
        assert all(torch.equal(again[name].dictionary.tensors[key], tensor) for key, tensor in each.dictionary.tensors.items())
        assert again[name].curve.equals(each.curve)


def test_what_cannot_be_trained_end_to_end_is_refused(tmp_path: Path) -> None:
    subject, pairs = families.subject("llama"), texts(LENGTHS)
    plan = Plan(autoencoder("resid1", W, 24, Rule("topk", 2)), Objective(end="kl"))
    with pytest.raises(SettingsError, match="trained for the model's predictions, which activations do not give: use train_end_to_end"):
        train(Live(subject, pairs, "resid1", settings=SETTINGS), {"end": plan})
    both = crosscoder("resid0,resid1", (W, W), 24, Rule("topk", 2))
    with pytest.raises(SettingsError, match="end 'kl' needs a dictionary of one place of one model: this one writes resid0, resid1"):
        checked(Objective(end="kl"), both)
    with pytest.raises(SettingsError, match="reconstruction=0 leaves nothing to learn"):
        checked(Objective(reconstruction=0.0), plan.layout)
