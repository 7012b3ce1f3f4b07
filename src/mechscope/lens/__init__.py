"""Lenses: what stands inside a model, read in the words of its vocabulary, without an experiment on it."""

from mechscope.lens.attention_lens import train_attention_lens
from mechscope.lens.attribution import LogitAttribution, attribute_logits, compare_attributions
from mechscope.lens.backward import backward_lens, gradient_directions
from mechscope.lens.logit_lens import read
from mechscope.lens.patchscopes import identity_prompt, patchscope
from mechscope.lens.places import SITES, LensPlace
from mechscope.lens.reading import LensReading, TextReading, compare
from mechscope.lens.spectroscopy import Bands, bands, spectrum, suppress
from mechscope.lens.token_attribution import attribute_positions, attribute_sources
from mechscope.lens.training import LensSettings, Trained, evaluate, train_tuned_lens
from mechscope.lens.translators import Translator, Translators

__all__ = [
    "SITES",
    "Bands",
    "LensPlace",
    "LensReading",
    "LensSettings",
    "LogitAttribution",
    "TextReading",
    "Trained",
    "Translator",
    "Translators",
    "attribute_logits",
    "attribute_positions",
    "attribute_sources",
    "backward_lens",
    "bands",
    "compare",
    "compare_attributions",
    "evaluate",
    "gradient_directions",
    "identity_prompt",
    "patchscope",
    "read",
    "spectrum",
    "suppress",
    "train_attention_lens",
    "train_tuned_lens",
]
