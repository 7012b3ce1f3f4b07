"""Prompt pairs for tests of interventions: random tokens, equal but for two positions, one of three lengths."""

from __future__ import annotations

from dataclasses import replace

import torch

from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import Pairs, PromptPair, collate_pairs
from mechscope.subject import Subject
from tests import families


def random_pairs(n: int = 4, *, lengths: tuple[int, ...] = (9, 12, 7), seed: int = 0, with_target: bool = True) -> Pairs:
    """Return pairs that differ at positions 2 and 4, with answers after the last token and the last three tokens as target."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for index in range(n):
        length = lengths[index % len(lengths)]
        clean = torch.randint(3, families.VOCABULARY, (length,), generator=generator).tolist()
        corrupt = list(clean)
        for at in (2, 4):
            corrupt[at] = 3 + (clean[at] + 11) % (families.VOCABULARY - 3)
        pairs.append(
            PromptPair(
                f"pair {index}",
                tuple(clean),
                tuple(corrupt),
                answers=(5 + index, 6 + index),
                wrong_answers=(20 + index,),
                target=(length - 3, length) if with_target else None,
                segments={"changed fact": ((2, 3), (4, 5)), "beginning": ((0, 2),)},
            )
        )
    return Pairs(tuple(pairs), "random")


@torch.no_grad()
def telling_pairs(subject: Subject, n: int, *, lengths: tuple[int, ...] = (9, 12, 7)) -> Pairs:
    """Return pairs whose clean text has the larger logit difference, so that there is a whole: answers are exchanged where it has not."""
    found = []
    for pair in random_pairs(n, lengths=lengths):
        metric = pair_metric("logit-diff", collate_pairs([pair]))
        clean, corrupt = (metric(subject.plain(torch.tensor([ids])).logits).item() for ids in (pair.clean, pair.corrupt))
        found.append(pair if clean > corrupt else replace(pair, answers=pair.wrong_answers, wrong_answers=pair.answers))
    return Pairs(tuple(found), "telling")
