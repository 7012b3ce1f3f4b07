"""The contract of lenses and of attribution to logits."""

from __future__ import annotations

import numpy as np

from mechscope import lens
from mechscope.data.pairs import Pairs
from mechscope.instrument import Execution
from mechscope.lens import LensReading
from mechscope.lens.gradient_factors import MATRICES
from mechscope.subject import Subject
from tests.contract.technique import Case, Result, Technique, columns, numbers

SHORT = lens.TunedLensSettings(steps=2, tokens_per_step=24)


def read(subject: Subject, texts: Pairs, execution: Execution) -> LensReading:
    """Read every site."""
    return lens.logit_lens(subject, texts, sites=lens.SITES, k=3, execution=execution)


def logit_lens(case: Case, execution: Execution) -> Result:
    """Read every text."""
    names = ("tokens", "targets", "log_probability", "rank", "entropy", "kl", "top")
    result = read(case.subject, case.pairs, execution)
    return numbers(result.table(), "table") | {
        name: np.concatenate([getattr(text, name).ravel() for text in result.texts]) for name in names
    }


def compare_lenses(case: Case, execution: Execution) -> Result:
    """Compare two models' readings."""
    return columns(lens.compare_lenses(*(read(model, case.pairs, execution) for model in (case.subject, case.pair.tuned))))


def logit_attribution(case: Case, execution: Execution) -> Result:
    """Take the logits of two models apart, neurons of two layers included, and compare them."""
    base, tuned = (
        lens.attribute_logits(model, case.pairs, neurons=(0, 2), execution=execution) for model in (case.subject, case.pair.tuned)
    )
    return numbers(base) | numbers(lens.compare_attributions(base, tuned), "change")


def backward(case: Case, execution: Execution) -> Result:
    """Read what a step would write; rows whose gradient is zero up to rounding may be listed or not, and are left out."""
    table = lens.backward_lens(case.subject, case.pairs, matrices=MATRICES, k=3, execution=execution)
    return columns(table[table["update_norm"] > 1e-12])


def spectrum(case: Case, execution: Execution) -> Result:
    """Tell in which bands of the unembedding residual streams lie."""
    return columns(lens.logit_spectrum(case.subject, case.pairs, using=lens.bands(case.subject, n=4), execution=execution))


def suppress(case: Case, execution: Execution) -> Result:
    """Project bands out."""
    return columns(lens.suppress_bands(case.subject, case.pairs, [0, 1], using=lens.bands(case.subject, n=4), execution=execution))


def patchscope(case: Case, execution: Execution) -> Result:
    """Let the tuned model continue from states of the base; it has no batches."""
    source, target = case.pairs.pairs[0].clean, case.pairs.pairs[2].clean
    return numbers(lens.patchscope(case.subject, source, case.pair.tuned, target, k=3, target_layer=0, generate=2))


def tuned_lens(case: Case, execution: Execution) -> Result:
    """Train maps of every layer, and read by them."""
    trained = lens.train_tuned_lens(case.subject, case.pairs, settings=SHORT, execution=execution)
    judged = lens.evaluate_lens(case.subject, case.pairs, trained.translators, execution=execution)
    return numbers(trained.curve, "curve") | numbers(judged, "judged")


def attention_lens(case: Case, execution: Execution) -> Result:
    """Train maps of heads, and read by them."""
    trained = lens.train_attention_lens(case.subject, case.pairs, layers=[2], settings=SHORT, execution=execution)
    judged = lens.evaluate_lens(case.subject, case.pairs, trained.translators, execution=execution)
    return numbers(trained.curve, "curve") | numbers(judged, "judged")


TECHNIQUES: dict[str, Technique] = {
    "logit lens": logit_lens,
    "compare lenses": compare_lenses,
    "logit attribution": logit_attribution,
    "attribute to positions": lambda case, execution: columns(
        lens.attribute_positions(case.subject, case.pairs, metric="logit-diff", execution=execution)
    ),
    "attribute to sources": lambda case, execution: columns(
        lens.attribute_sources(case.subject, case.pairs, "a1.h2,a2.h0", execution=execution)
    ),
    "backward lens": backward,
    "gradient directions": lambda case, execution: columns(
        lens.gradient_directions(case.subject, case.pairs, k=3, rank=2, execution=execution)
    ),
    "spectrum": spectrum,
    "suppress": suppress,
    "patchscope": patchscope,
    "tuned lens": tuned_lens,
    "attention lens": attention_lens,
}
