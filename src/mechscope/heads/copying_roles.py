"""Roles recognised by what a head would write of a token it attends to: the token itself, anything but it, or the one that comes next.

Row t of a head's OV circuit in vocabulary space says what attending to token t adds to every logit (Elhage et al. 2021). A copying head raises t itself, a
head of negative OV lowers it, a successor head raises what follows t in its order (Gould et al. 2023, "Successor Heads"). Negative OV is what weights can
show of copy suppression (McDougall et al. 2023), in which such a head also attends to a token because it is predicted; that is not measured here. Scores
are ranks, so that no head's size counts; chance is what the same heads reach with their values turned at random before the output projection. Heads
behind the first layer read tokens with what the first MLP makes of them where `effective` says so: Gould et al. do, since GPT-2's first MLP widens the
embedding.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.pieces import Pieces
from mechscope.heads.roles import Role, RoleScores
from mechscope.heads.turned import DRAWS, orthogonal
from mechscope.instrument.execution import Execution
from mechscope.subject import Subject
from mechscope.weights import Forms, Vocabulary

COPYING = Role(
    name="copying",
    definition="Share of the vocabulary whose logit a token, as it is embedded, raises less than its own, by the head's OV circuit straight to the "
    "logits; mean over sampled tokens.",
    source="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
    null="0.5: the rank of any token.",
    # half of the way from chance to always
    least=0.25,
)
NEGATIVE_OV = replace(
    COPYING,
    name="negative-ov",
    definition="Share of the vocabulary whose logit a token, as it is embedded, lowers less than its own, by the head's OV circuit straight to the "
    "logits; mean over sampled tokens: 1 - copying.",
)
SUCCESSOR = Role(
    name="successor",
    definition="Share of days, months, numbers and letters whose successor is what the head's OV circuit raises most among the others of their order.",
    source="Gould et al. 2023, Successor Heads",
    null="One in the number of the others.",
    # a quarter of the steps more than chance
    least=0.25,
)
ORDERS = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten eleven twelve",
    "first second third fourth fifth sixth seventh eighth ninth tenth",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
)
# an order of fewer single tokens says little
_FEWEST = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """A token of an order, its successor and all others of the order, the successor first."""

    token: int
    others: tuple[int, ...]


@torch.no_grad()
def copying_roles(subject: Subject, *, n: int = 256, effective: bool = False, execution: Execution = Execution()) -> tuple[RoleScores, ...]:
    """Score what every head writes of the tokens it attends to.

    Args:
        subject: The model.
        n: Sampled tokens; fewer where the vocabulary is smaller.
        effective: Heads behind the first layer read tokens with what the first MLP makes of them.
        execution: Seed (of the sample), progress.

    Returns:
        Copying and negative-ov with the sampled tokens as texts, and, where the tokenizer has the words as single tokens, successor.

    Raises:
        ModelError: The model's heads cannot be taken apart.
    """
    forms, vocabulary, anatomy = Forms(subject), Vocabulary(subject, effective=effective), subject.anatomy
    order = torch.randperm(vocabulary.size, generator=torch.Generator().manual_seed(execution.seed))
    tokens, steps = order[:n].sort().values, successions(subject)
    layers = anatomy.attending
    own = np.empty((len(tokens), len(layers), anatomy.n_heads))
    next_one = np.empty((len(steps), len(layers), anatomy.n_heads))
    turned = np.empty((2, DRAWS, len(layers), anatomy.n_heads))
    chance = np.array([1 / len(step.others) for step in steps])
    random = np.random.default_rng(execution.seed)
    for layer, head in anatomy.heads():
        form = forms.ov(layer, head)
        a, b = vocabulary.read(form, layer), vocabulary.written(form.right)
        row = layers.index(layer)
        own[:, row, head] = _ranks(a, b.to(a), tokens)
        next_one[:, row, head] = [_succeeds(a[step.token], b.to(a), step) for step in steps]
        for draw, turn in enumerate(torch.from_numpy(orthogonal(anatomy.d_head, DRAWS, random)).to(a)):
            # among the sampled tokens alone, which are as good as all
            turned[0, draw, row, head] = _ranks(a[tokens] @ turn, b[tokens].to(a), torch.arange(len(tokens))).mean() - 0.5
            turned[1, draw, row, head] = (
                np.mean([_succeeds(a[step.token] @ turn, b.to(a), step) for step in steps] - chance) if steps else np.nan
            )
        execution.told("reading what heads copy", row * anatomy.n_heads + head + 1, len(layers) * anatomy.n_heads)
    names = tuple(map(str, tokens.tolist()))
    even = np.full_like(own, 0.5)
    roles = [
        RoleScores(COPYING, names, own, even, turned[0], layers=layers),
        RoleScores(NEGATIVE_OV, names, 1 - own, even, -turned[0], layers=layers),
    ]
    if not steps:
        log.info("%s: its tokenizer has too few days, months, numbers and letters as single tokens for the role successor", subject.source)
    else:
        ids = tuple(f"{step.token}>{step.others[0]}" for step in steps)
        roles.append(
            RoleScores(SUCCESSOR, ids, next_one, np.broadcast_to(chance[:, None, None], next_one.shape).copy(), turned[1], layers=layers)
        )
    return tuple(roles)


def successions(subject: Subject) -> tuple[_Step, ...]:
    """Return the steps of all orders whose words are single tokens behind a space; none without a tokenizer."""
    if subject.tokenizer is None:
        return ()
    pieces, steps = Pieces(subject.tokenizer), []
    for words in map(str.split, ORDERS):
        ids = [None if one is None or one >= subject.anatomy.vocab_size else one for one in pieces.single(words)]
        known = [one for one in ids if one is not None]
        if len(set(known)) < _FEWEST or len(set(known)) < len(known):
            continue
        for token, successor in itertools.pairwise(ids):
            if token is not None and successor is not None:
                steps.append(_Step(token, (successor, *(other for other in known if other not in (token, successor)))))
    return tuple(steps)


def _ranks(a: Float[Tensor, "vocab rank"], b: Float[Tensor, "vocab rank"], tokens: Tensor) -> np.ndarray:
    """Return for each token the share of other tokens whose entry in its row is smaller, ties by half."""
    tokens = tokens.to(a.device)
    entries = a[tokens] @ b.T
    own = entries.gather(1, tokens[:, None])
    below, equal = (entries < own).sum(1).double(), (entries == own).sum(1).double() - 1
    return ((below + equal / 2) / (entries.shape[1] - 1)).cpu().numpy()


def _succeeds(a: Float[Tensor, " rank"], b: Float[Tensor, "vocab rank"], step: _Step) -> float:
    entries = b[list(step.others)] @ a
    # a head that writes nothing has no favourite
    return float(bool((entries[0] > entries[1:]).all()))
