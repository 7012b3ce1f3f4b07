"""The contract of losses and summaries of a model."""

from __future__ import annotations

import numpy as np

from mechscope.adapt.generate import summarize
from mechscope.adapt.loss import Collator, mean_loss
from mechscope.instrument import Execution
from mechscope.settings.decoding import Decoding
from tests.contract.technique import Case, Result, Technique, letters


def loss(case: Case, execution: Execution) -> Result:
    """Average the loss of summaries over tokens."""
    return {"loss": np.array(mean_loss(case.subject.model, case.documents.examples, collator=Collator(5), execution=execution))}


def summaries(case: Case, execution: Execution) -> Result:
    """Continue documents."""
    prompts = [pair.clean for pair in case.pairs]
    decoding = Decoding(max_new_tokens=4, no_repeat_ngram=2)
    return {"letters": letters(*summarize(case.subject.model, case.subject.tokenizer, prompts, decoding=decoding, execution=execution))}


TECHNIQUES: dict[str, Technique] = {"loss": loss, "summaries": summaries}
