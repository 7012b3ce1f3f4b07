"""Which heads read what which earlier heads write: Q-, K- and V-composition, from weights alone.

Elhage et al. (2021): ‖W_OV W_QK‖_F / (‖W_OV‖_F ‖W_QK‖_F), with the earlier head's writing read by the later one's queries (Q) or keys (K), and
‖W_OV W_OV'‖_F / (‖W_OV‖_F ‖W_OV'‖_F) for its values (V). Every circuit is compressed to d_head × d_model without changing any of these norms, so a
pair of layers needs one product for all pairs of heads.

What a score means depends on d_model and on how many directions the two circuits use. The baseline keeps both: the earlier head's writing is turned by a
uniformly random rotation of the residual stream. The square of the score is then Σ a_i b_j r_ij², with a and b the circuits' normalised squared
singular values and r entries of a random rotation. Its mean is 1/d_model exactly and its variance follows from the moments of r (`random_score`), so
nothing is sampled. Scores of real models are mostly above it: heads share directions without any pair composing in particular.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject
from mechscope.subject.pair import Pair
from mechscope.weights.forms import Forms

Kind = Literal["q", "k", "v"]
KINDS: tuple[Kind, ...] = ("q", "k", "v")
COMPOSITION_COLUMNS = ("kind", "from", "to", "from_layer", "from_head", "to_layer", "to_head", "score", "random", "sd", "z")


@torch.no_grad()
def composition(subject: Subject, *, kinds: Sequence[Kind] = KINDS, offset: int = 0, execution: Execution = Execution()) -> pd.DataFrame:
    """Score how much every head reads from every head of an earlier layer.

    Norms' gains and centring are folded into what reads; their scales, and MLPs between, are left out.

    Args:
        subject: The model.
        kinds: By queries (`q`), keys (`k`), values (`v`).
        offset: Query position less key position at which W_QK of rotary families is taken; 0 turns nothing.
        execution: Progress.

    Returns:
        One row per kind and pair of heads: `kind`, `from` and `to` (such as `a0.h3`), their layers and heads, `score` (0–1), `random` and `sd` (mean
        and standard deviation of the score under random rotation), `z` = (score − random) / sd. NaN where a circuit is zero.

    Raises:
        SettingsError: A kind is not known, or the offset does not fit the model.
        ModelError: Heads cannot be taken apart, or queries and keys have norms of their own: then only `kinds=("v",)` is defined.
    """
    if not kinds or set(kinds) - set(KINDS):
        raise SettingsError(f"kinds {list(kinds)}: choose among {', '.join(KINDS)}")
    anatomy, forms = subject.anatomy, Forms(subject)
    senders: list[Tensor] = []
    parts: list[pd.DataFrame] = []
    for place, layer in enumerate(anatomy.attending):
        execution.told("composition", place, len(anatomy.attending))
        for kind in kinds if senders else ():
            readers = torch.stack([_reader(forms, kind, layer, head, offset) for head in range(anatomy.n_heads)])
            parts += [_pairs(kind, earlier, layer, sender, readers) for earlier, sender in zip(anatomy.attending, senders, strict=False)]
        senders.append(torch.stack([forms.ov(layer, head).onto_right() for head in range(anatomy.n_heads)]))
    execution.told("composition", len(anatomy.attending), len(anatomy.attending))
    if not parts:
        return pd.DataFrame(columns=list(COMPOSITION_COLUMNS))
    order = pd.CategoricalDtype(list(kinds), ordered=True)
    table = pd.concat(parts, ignore_index=True)[list(COMPOSITION_COLUMNS)]
    return table.iloc[table["kind"].astype(order).argsort(kind="stable")].reset_index(drop=True)


def composition_change(pair: Pair, *, kinds: Sequence[Kind] = KINDS, offset: int = 0) -> pd.DataFrame:
    """Compare composition before and after fine-tuning.

    Args:
        pair: The two models.
        kinds: By queries (`q`), keys (`k`), values (`v`).
        offset: Query position less key position at which W_QK of rotary families is taken; 0 turns nothing.

    Returns:
        One row per kind and pair of heads: the names of `composition`, `score_base`, `score_tuned`, `change` (tuned − base), `z_base`, `z_tuned`.

    Raises:
        SettingsError: A kind is not known, or the offset does not fit the models.
        ModelError: Heads cannot be taken apart, or queries and keys have norms of their own: then only `kinds=("v",)` is defined.
    """
    base, tuned = (composition(subject, kinds=kinds, offset=offset) for subject in (pair.base, pair.tuned))
    names = list(COMPOSITION_COLUMNS[:7])
    return base[names].assign(
        score_base=base["score"], score_tuned=tuned["score"], change=tuned["score"] - base["score"], z_base=base["z"], z_tuned=tuned["z"]
    )


def random_score(
    first: Float[Tensor, "*some"], second: Float[Tensor, "*others"], d_model: int
) -> tuple[Float[Tensor, "*pairs"], Float[Tensor, "*pairs"]]:
    """Return mean and standard deviation of the score of two circuits that stand at random to each other.

    Moments of the square are exact: with r an entry of a rotation of D dimensions drawn from Haar measure, E r² = 1/D, E r⁴ = 3 / D(D+2), E r² r'² =
    1 / D(D+2) for two entries of a row or column, (D+1) / D(D−1)(D+2) for two that share neither. The square root's are those of a Beta
    distribution with the square's mean and variance: the square's own where both circuits have one direction, else within some percent.

    Args:
        first: Σa², the sum of squares of the normalised squared singular values of one circuit: from 1 (one direction) down to 1/rank.
        second: The same sum of the other circuit.
        d_model: Width of the residual stream.
    """
    size = float(d_model)
    shared, apart = 1 / (size * (size + 2)), (size + 1) / (size * (size - 1) * (size + 2))
    square = first * second * 3 * shared + (first * (1 - second) + (1 - first) * second) * shared + (1 - first) * (1 - second) * apart
    variance = (square - size**-2).clamp(min=0)
    total = (1 - 1 / size) / size / variance - 1  # α + β of the Beta distribution; the square's mean is α / (α + β)
    alpha = total / size
    root = torch.lgamma(alpha + 0.5) - torch.lgamma(alpha) + torch.lgamma(total) - torch.lgamma(total + 0.5)
    # to second order where the spread is so small that the terms would cancel
    mean = torch.where(alpha < 1e4, root.exp(), size**-0.5 * (1 - variance * size**2 / 8))
    return mean, (1 / size - mean.square()).clamp(min=0).sqrt()


def _reader(forms: Forms, kind: Kind, layer: int, head: int, offset: int) -> Float[Tensor, "d_head d_model"]:
    match kind:
        case "q":
            return forms.qk(layer, head, offset=offset).onto_left()
        case "k":
            return forms.qk(layer, head, offset=offset).onto_right()
        case _:
            return forms.ov(layer, head).onto_left()


def _pairs(
    kind: Kind, earlier: int, later: int, senders: Float[Tensor, "head d_head d_model"], readers: Float[Tensor, "head d_head d_model"]
) -> pd.DataFrame:
    heads, width, size = senders.shape
    products = senders.flatten(0, 1) @ readers.flatten(0, 1).T.to(senders)
    squares = products.square().view(heads, width, heads, width).sum((1, 3))
    (square_from, spread_from), (square_to, spread_to) = (_sizes(one) for one in (senders, readers.to(senders)))
    score = (squares / (square_from[:, None] * square_to)).sqrt()
    mean, sd = random_score(spread_from[:, None], spread_to[None], size)
    sender, reader = (index.flatten().tolist() for index in torch.meshgrid(torch.arange(heads), torch.arange(heads), indexing="ij"))
    scores = {"score": score, "random": mean, "sd": sd, "z": (score - mean) / sd}
    heads_from, heads_to = [f"a{earlier}.h{head}" for head in sender], [f"a{later}.h{head}" for head in reader]
    columns: dict[str, object] = {"kind": kind, "from": heads_from, "to": heads_to}
    columns |= {"from_layer": earlier, "from_head": sender, "to_layer": later, "to_head": reader}
    return pd.DataFrame({**columns, **{name: value.flatten().tolist() for name, value in scores.items()}})


def _sizes(circuits: Float[Tensor, "head d_head d_model"]) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """Return ‖W‖²_F and Σσ⁴ / ‖W‖⁴_F."""
    grams = circuits @ circuits.transpose(1, 2)
    squares = grams.diagonal(dim1=1, dim2=2).sum(1)
    return squares, grams.square().sum((1, 2)) / squares.square()
