"""The loss of a language model on the summaries of a set of examples.

Cross-entropy in nats per predicted token, weighted by token: the sum over all summary tokens divided by their number, not a mean of batch
means (which would favour short summaries). The unembedding is applied only to the rows that predict a counted token, so a document's
thousand rows never become logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechscope import ranks
from mechscope.choices import LossOn
from mechscope.data.prompt import Batch, Example, Examples, collate
from mechscope.instrument.execution import Execution
from mechscope.instrument.texts import over_texts
from mechscope.subject.modes import evaluating

IGNORED = -100  # the label that Hugging Face leaves out of a loss
NOTHING = Example("", (0,), (0, 0), (0, 0), False)  # fills a batch up: no token of it is predicted or counted


@dataclass(frozen=True)
class Collator:
    """Stack examples into the tensors a causal language model is trained on, padded on the right.

    Attributes:
        pad_id: Token id of the padding.
        loss_on: `"summary"` labels the summary's tokens alone, `"all"` every token that can be predicted.
    """

    pad_id: int
    loss_on: LossOn = "summary"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, position_ids and labels, each (batch, longest), of examples in the order given."""
        inputs = self.inputs(collate(examples, pad_id=self.pad_id))
        inputs["attention_mask"][[example is NOTHING for example in examples]] = 0
        return inputs

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Label a batch."""
        labels = batch.input_ids.masked_fill(~batch.rows(self.loss_on), IGNORED)
        labels[:, 0] = IGNORED  # nothing precedes the first token, so nothing predicts it
        # positions run on through the padding: a return to 0 would look like a second packed sequence to transformers
        positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
        mask = batch.attention_mask.long()  # Hugging Face's trainer sums it to count tokens
        return {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def summed_loss(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Float[Tensor, ""], int]:
    """Return the summed cross-entropy (nats) of a right-padded batch and the number of tokens it counts."""
    labels = inputs["labels"]
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :-1] = labels[:, 1:] != IGNORED  # row t predicts token t + 1
    # the padding stands to the right of every real token, where causal attention never looks: without a mask the fast kernels apply
    with _unembedding_only(model, rows):
        output: Any = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
    logits = output.logits.float() if output.logits.dtype in (torch.bfloat16, torch.float16) else output.logits
    targets = labels[:, 1:][rows[:, :-1]].to(logits.device)
    return nn.functional.cross_entropy(logits, targets, reduction="sum"), len(targets)


@contextmanager
def _unembedding_only(model: nn.Module, rows: Bool[Tensor, "batch positions"]) -> Iterator[None]:
    """Let the unembedding read these rows alone.

    A mask given as `logits_to_keep` would be brought to the main device of a model over several, where it cannot index the last block's states.
    """

    def select(unembedding: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        return (states[0][rows.to(states[0].device)],)

    unembedding: Any = extract_model_from_parallel(model).get_output_embeddings()
    handle = unembedding.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def mean_loss(model: nn.Module, examples: Sequence[Example], *, collator: Collator, execution: Execution = Execution()) -> float:
    """Return the token-weighted loss of a set of examples, in nats per token; several ranks share them.

    Args:
        model: A causal language model; held in evaluation mode meanwhile.
        examples: Encoded documents with summaries.
        collator: Which tokens count.
        execution: Tokens of a batch (8,192 by default).
    """
    device = next(model.parameters()).device

    def summed(batch: Batch) -> tuple[float, int]:
        loss, tokens = summed_loss(model, {name: tensor.to(device) for name, tensor in collator.inputs(batch).items()})
        return float(loss), tokens

    total, count = 0.0, 0
    with evaluating(model.modules()):
        for _, (loss, tokens) in over_texts(Examples(examples, collator.pad_id), summed, execution, tokens=8192, dealt=True):
            total += loss
            count += tokens
    parts = ranks.exchange((total, count))
    return sum(part for part, _ in parts) / sum(part for _, part in parts)
