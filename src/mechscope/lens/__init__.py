"""Lenses: what stands inside a model, read in the words of its vocabulary, without an experiment on it."""

from mechscope.lens.attention_lens import train_attention_lens
from mechscope.lens.attribution import LogitAttribution, attribute_logits, compare_attributions
from mechscope.lens.backward import backward_lens, gradient_directions
from mechscope.lens.logit_lens import logit_lens
from mechscope.lens.patchscopes import check_patchscope, identity_prompt, patchscope
from mechscope.lens.places import SITES, LensPlace
from mechscope.lens.reading import LensReading, TextReading, compare_lenses
from mechscope.lens.spectroscopy import Bands, bands, logit_spectrum, suppress_bands
from mechscope.lens.token_attribution import attribute_positions, attribute_sources
from mechscope.lens.training import Trained, evaluate_lens, train_tuned_lens, with_training
from mechscope.lens.translators import Translator, Translators
from mechscope.settings.lens import TunedLensSettings

__all__ = [
    "SITES",
    "Bands",
    "LensPlace",
    "LensReading",
    "LogitAttribution",
    "TextReading",
    "Trained",
    "Translator",
    "Translators",
    "TunedLensSettings",
    "attribute_logits",
    "attribute_positions",
    "attribute_sources",
    "backward_lens",
    "bands",
    "check_patchscope",
    "compare_attributions",
    "compare_lenses",
    "evaluate_lens",
    "gradient_directions",
    "identity_prompt",
    "logit_lens",
    "logit_spectrum",
    "patchscope",
    "suppress_bands",
    "train_attention_lens",
    "train_tuned_lens",
    "with_training",
]
