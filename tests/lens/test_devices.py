"""Lenses on a model over two devices read what they read on one."""

from __future__ import annotations

from mechscope import lens
from tests.devices import Technique, assert_equal_over_devices, cases, prompts

PROMPTS = prompts()
SHORT = lens.LensSettings(steps=2)

TECHNIQUES: dict[str, Technique] = {
    "logit lens": lambda models: lens.read(models.base, PROMPTS, sites=lens.SITES).table(),
    "logit attribution": lambda models: vars(lens.attribute_logits(models.base, PROMPTS, neurons=[0, 2])),
    "attribution to sources": lambda models: lens.attribute_sources(models.base, PROMPTS, "a0.h1,a2.h2"),
}

FEWER: dict[str, Technique] = {
    "attribution to positions": lambda models: lens.attribute_positions(models.base, PROMPTS, metric="logit-diff"),
    "backward lens": lambda models: lens.backward_lens(models.base, PROMPTS),
    "gradient directions": lambda models: lens.gradient_directions(models.base, PROMPTS),
    "spectrum": lambda models: lens.spectrum(models.base, PROMPTS, using=lens.bands(models.base, n=4)),
    "suppression": lambda models: lens.suppress(models.base, PROMPTS, [0, 1], using=lens.bands(models.base, n=4)),
    "patchscope": lambda models: lens.patchscope(
        models.base, PROMPTS.pairs[0].clean, models.tuned, PROMPTS.pairs[2].clean, k=3, target_layer=0, generate=2
    ),
    "tuned lens": lambda models: lens.evaluate(
        models.base, PROMPTS, lens.train_tuned_lens(models.base, PROMPTS, settings=SHORT).translators
    ),
    "attention lens": lambda models: lens.evaluate(
        models.base, PROMPTS, lens.train_attention_lens(models.base, PROMPTS, layers=[2], settings=SHORT).translators
    ),
}


@cases(TECHNIQUES, FEWER)
def test_readings_are_equal(technique: Technique, family: str) -> None:
    assert_equal_over_devices(technique, family)
