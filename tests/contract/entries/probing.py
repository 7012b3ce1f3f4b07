"""The contract of probes."""

from __future__ import annotations

from mechscope import probing
from mechscope.data.labels import Labelled
from mechscope.data.pairs import Pairs
from mechscope.instrument import Execution
from tests.contract.technique import LENGTHS, Case, Result, Technique, numbers, texts


def _labelled(case: Case) -> Labelled:
    """Return the texts among others, as probes need many."""
    pairs = (*case.pairs.pairs, *texts(LENGTHS * 6, seed=5).pairs)
    odd = tuple("odd" if pair.clean[1] % 2 else "even" for pair in pairs)
    large = tuple(tuple(at for at, token in enumerate(pair.clean) if token % 3 == 0) for pair in pairs)
    return Labelled(Pairs(pairs, case.pairs.source), {"odd": odd}, {"large": large})


def documents(case: Case, execution: Execution) -> Result:
    """Tell an attribute of texts in two models."""
    models = {"base": case.pair.base, "tuned": case.pair.tuned}
    return numbers(probing.probe(models, probing.document_task(_labelled(case), "odd"), folds=3, execution=execution))


def tokens(case: Case, execution: Execution) -> Result:
    """Tell a concept of tokens from every head."""
    task = probing.token_task(_labelled(case), "large")
    return numbers(probing.probe(case.subject, task, site="head", method="ridge", folds=3, execution=execution))


def without(case: Case, execution: Execution) -> Result:
    """Erase an attribute of texts."""
    return numbers(
        probing.erasing(case.subject, probing.document_task(_labelled(case), "odd"), "resid0", folds=3, draws=5, execution=execution)
    )


TECHNIQUES: dict[str, Technique] = {"probe": documents, "probe tokens": tokens, "erasing": without}
