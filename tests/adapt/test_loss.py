"""The loss is that of the summary's tokens, each counted once."""

from __future__ import annotations

import math

import pytest
import torch

from mechscope.adapt.loss import IGNORED, Collator, mean_loss, summed_loss
from mechscope.data.prompt import Example
from mechscope.instrument.execution import Execution


def slow_loss(model, examples, loss_on):
    """Sum −log p over tokens one document at a time, unpadded, from full logits in float64."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        start, stop = example.summary if loss_on == "summary" else (1, len(example.input_ids))
        for place in range(max(start, 1), stop):
            total -= log_p[place - 1, example.input_ids[place]].item()
            count += 1
    return total / count, count


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("loss_on", ["summary", "all"])
def test_the_loss_is_weighted_by_token_and_untouched_by_padding(make_subject, examples, family, loss_on):
    model = make_subject(family).model
    # summaries of different lengths, so that a mean of means would differ
    mixed = [Example(e.id, e.input_ids, e.document, (e.summary[0] - (i % 4), e.summary[1]), False) for i, e in enumerate(examples(10))]
    expected, _ = slow_loss(model, mixed, loss_on)
    for tokens_per_batch in (1, 40, 1000):
        assert mean_loss(
            model, mixed, collator=Collator(9, loss_on), execution=Execution(tokens_per_batch=tokens_per_batch)
        ) == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_hugging_faces_own(make_subject, examples):
    model = make_subject("llama").model
    inputs = Collator(0)(examples(6))
    with torch.no_grad():
        loss, tokens = summed_loss(model, inputs)
        plain = model(**inputs).loss
    assert (loss / tokens).item() == pytest.approx(plain.item(), rel=1e-6)


def test_only_the_summary_and_its_end_are_labelled(examples):
    made = examples(5)
    labels = Collator(0)(made)["labels"]
    for row, example in zip(labels, made, strict=True):
        start, stop = example.summary
        assert row[start:stop].tolist() == list(example.input_ids[start:stop])
        assert (row[:start] == IGNORED).all()
        assert (row[stop:] == IGNORED).all()


def test_with_loss_on_all_every_real_token_but_the_first_is_labelled(examples):
    made = examples(5)
    inputs = Collator(0, "all")(made)
    for row, example in zip(inputs["labels"], made, strict=True):
        assert row[0] == IGNORED
        assert row[1 : len(example)].tolist() == list(example.input_ids[1:])
        assert (row[len(example) :] == IGNORED).all()


def test_a_uniform_model_loses_log_vocabulary_per_token(make_subject, examples):
    model = make_subject("gpt2").model
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert mean_loss(model, examples(4), collator=Collator(0)) == pytest.approx(math.log(40), rel=1e-6)
