"""What a model does without labels against Hugging Face run with hooks of the test's own, and what erasing leaves to be told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from mechscope.data.splits import folds
from mechscope.errors import SettingsError
from mechscope.instrument import Execution
from mechscope.probing import (
    Activations,
    Eraser,
    chosen_penalties,
    components_of,
    document_task,
    erase_random,
    erased,
    erasing,
    leace,
    token_task,
)
from mechscope.probing.activations import ProbeSite
from mechscope.probing.amnesic import RANDOM
from mechscope.probing.passes import Folded, co_moments, together
from mechscope.probing.tasks import CONTROL, LABELS, SHUFFLED, Task
from mechscope.stats.co_moments import CoMoments
from mechscope.stats.inference import draw_p
from tests import families
from tests.probing.test_probe import labelled

FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox")


def statistics(family: str, task: Task, site: ProbeSite) -> CoMoments:
    activations = Activations(families.subject(family, torch.float64), site, task.reading)
    return together(co_moments(activations, Folded(task, [task.labels], np.arange(60) % 3), Execution()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("site", "component"), [("residual", "resid0"), ("head", "a1.h2"), ("mlp_output", "m0")])
def test_erased_labels_are_told_by_no_class_mean_where_they_were_and_all_before_stays(family: str, site: ProbeSite, component: str) -> None:
    subject, task = families.subject(family, torch.float64), document_task(labelled(), "topic")
    at = [each.name for each in components_of(subject, site)].index(component)
    moments = statistics(family, task, site)
    with erased(subject, component, leace(moments), site=site, at=at):
        after = statistics(family, task, site)
    before, left = (each.class_deviations(0).abs().amax((1, 2)) for each in (moments, after))
    assert left[at] < 1e-9 < before[at]
    torch.testing.assert_close(left[:at], before[:at])
    assert torch.equal(statistics(family, task, site).mean, moments.mean), "the model is as it was"


@torch.no_grad()
def test_tokens_that_a_model_writes_are_without_the_labels_too() -> None:
    subject, task = families.subject("llama", torch.float64), document_task(labelled(), "topic")
    eraser = leace(statistics("llama", task, "residual"))
    prompt = torch.tensor([task.texts.pairs[0].clean])
    # far more than was erased, so that other tokens are written
    eraser = replace(eraser, out=eraser.out * 300)
    plain = subject.model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with erased(subject, "resid0", eraser, at=1):
        written = subject.model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    hook = subject.model.model.layers[0].register_forward_hook(lambda module, args, output: eraser_at(eraser, 1, output))
    with hook:
        slowly = prompt
        for _ in range(4):
            slowly = torch.cat([slowly, subject.model(slowly, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == slowly.tolist() != plain.tolist()


def eraser_at(eraser: Eraser, site: int, x: torch.Tensor) -> torch.Tensor:
    """Take directions out, by the formula."""
    return x - (x - eraser.mean[site]) @ eraser.into[site].T @ eraser.out[site].T


@pytest.mark.parametrize("reading", ["mean", "tokens"])
@torch.no_grad()
def test_effects_are_those_of_a_loop_over_texts_with_hooks_on_hugging_faces_own(reading: str) -> None:
    subject = families.subject("gpt2", torch.float64)
    task = token_task(labelled(), "word") if reading == "tokens" else document_task(labelled(), "topic")
    found = erasing(subject, task, "resid0", folds=3, draws=5, execution=Execution(tokens_per_batch=70))
    strata = [0 if reading == "tokens" else int(own[0]) for own in task.labels]
    fold = folds([pair.clean for pair in task.texts], 3, 0, strata=strata, source="")
    labelings = [own for kind, own in task.labelings(shuffles=5, seed=0) if kind != CONTROL]
    rows = [subject.model(torch.tensor([pair.clean]), output_hidden_states=True).hidden_states[1][0] for pair in task.texts]
    rows = [each[1:] if reading == "tokens" else each.mean(0, keepdim=True) for each in rows]
    effects = np.zeros((2, 11, 60))
    for part in range(3):

        def of(which: np.ndarray) -> CoMoments:
            chosen = np.flatnonzero(which)
            labels = np.stack([np.concatenate([own[at] for at in chosen]) for own in labelings], axis=1)
            return CoMoments.of(torch.cat([rows[at] for at in chosen])[None], torch.from_numpy(labels), (len(task.classes),) * 6)

        learned, chooses = fold != part, fold == (part + 1) % 3
        shrinkage = chosen_penalties(of(learned & ~chooses), of(chooses))[0]
        erasers = [leace(of(learned), each, shrinkage=shrinkage) for each in range(6)]
        erasers += [erase_random(of(learned), erasers[0].rank[0], shrinkage=shrinkage, seed=draw) for draw in range(5)]
        for text in np.flatnonzero(fold == part):
            ids = torch.tensor([task.texts.pairs[text].clean])
            plain = subject.model(ids).logits[0, :-1].log_softmax(-1)
            for unit, eraser in enumerate(erasers):

                def hooked(module: object, args: object, output: object) -> object:
                    whole = output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]
                    new = eraser_at(eraser, 0, whole)  # noqa: B023
                    if reading == "tokens":
                        new[:, 0] = whole[:, 0]
                    return new if isinstance(output, torch.Tensor) else (new, *output[1:])  # type: ignore[index]

                with subject.model.transformer.h[0].register_forward_hook(hooked):
                    changed = subject.model(ids).logits[0, :-1].log_softmax(-1)
                effects[0, unit, text] = (plain.exp() * (plain - changed)).sum(-1).mean()
                effects[1, unit, text] = cross_entropy(changed, ids[0, 1:]) - cross_entropy(plain, ids[0, 1:])
    table = {(row["metric"], row["erased"]): row for row in found.to_dict("records")}
    for number, metric in enumerate(("kl", "loss")):
        parts = {LABELS: effects[number, :1], SHUFFLED: effects[number, 1:6], RANDOM: effects[number, 6:]}
        for name, values in parts.items():
            row = table[metric, name]
            assert row["effect"] == pytest.approx(values.mean(), abs=1e-9)
            assert row["n"] == 60
            assert row["draws"] == len(values)
            if name != LABELS:
                less = effects[number, 0] - values.mean(0)
                assert row["less"] == pytest.approx(less.mean(), abs=1e-9)
                assert row["less_low"] < less.mean() < row["less_high"]
                assert row["less_p"] == pytest.approx(float(draw_p(effects[number, 0].mean(), values.mean(1))), abs=1e-6)


def test_random_directions_are_as_many_and_take_out_as_many_deviations_of_whitened_rows() -> None:
    moments = statistics("gpt2", document_task(labelled(), "topic"), "residual")
    made = [erase_random(moments, 3, shrinkage=0.1, seed=seed) for seed in (0, 0, 1)]
    assert made[0].rank == [3] * moments.sites
    assert torch.equal(made[0].out, made[1].out)
    assert not torch.equal(made[0].out, made[2].out)
    for eraser in (*made, leace(moments, shrinkage=0.1)):
        # a projection, though no orthogonal one
        taken = eraser.out @ eraser.into
        torch.testing.assert_close(taken @ taken, taken, atol=1e-8, rtol=0)


def test_shrunk_leace_makes_class_means_equal_all_the_same() -> None:
    moments = statistics("gpt2", document_task(labelled(), "topic"), "residual")
    for shrinkage in (0.0, 0.1, 10.0):
        eraser = leace(moments, shrinkage=shrinkage)
        means = eraser(moments.class_means(0))
        assert (means[:, 0] - means[:, 1]).abs().max() < 1e-9


def test_what_cannot_be_erased_is_refused_before_anything_runs() -> None:
    subject, task = families.subject("gpt2"), document_task(labelled(), "topic")
    with pytest.raises(SettingsError, match="the model has no 'resid9' among what is read: it has embed to resid"):
        erasing(subject, task, "resid9")
    with pytest.raises(SettingsError, match="2 draws of what means nothing are too few"):
        erasing(subject, task, "resid0", draws=2)
    eraser = leace(statistics("gpt2", task, "head"))
    with pytest.raises(SettingsError, match="takes directions out of 8 numbers, resid0 has 32"), erased(subject, "resid0", eraser):
        pass
