"""Logistic probes: multinomial logistic regression with an L2 penalty, of all sites and labelings at once.

    minimise   Σᵢ vᵢ (−log softmax(W xᵢ + b)[yᵢ]) / Σᵢ vᵢ  +  ½ c ‖W‖²

with vᵢ weighing classes alike where that is asked for. scikit-learn's `LogisticRegression` has the same minimum at C = 1 / (c n), and of two classes, told by
one direction, at C = 2 / (c n).

Rows are turned into the directions of their covariance, which all labelings share. There the curvature is near to p (1 − p) variance + c along each direction,
so L-BFGS (Nocedal and Wright 2006, algorithm 7.4) that begins from it converges in tens of steps, whatever the scale of the rows: gradients in whitened
coordinates. A step is two matrix products for all labelings of a site. A problem is done when half its Newton decrement, which estimates how far its loss is
above the least, is below a millionth of a nat.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.errors import DataError
from mechscope.probing.linear import LinearProbe, Spectrum
from mechscope.stats.co_moments import CoMoments

# pairs of steps and changes of the gradient that are remembered
_HISTORY = 10
# nats above the least loss
_NEAR = 1e-6
# numbers of a step's scores at most: sites are solved in groups that stay below
_SCORES = 2**24


def logistic(
    x: Float[Tensor, "site row width"],
    labels: Int[Tensor, "row labeling"],
    classes: int,
    *,
    penalty: float | Float[Tensor, "labeling site"],
    balanced: bool = True,
    spectrum: Spectrum | None = None,
    steps: int = 100,
) -> list[LinearProbe]:
    """Return the logistic probe of each labeling, at every site.

    Args:
        x: Rows that are learned from.
        labels: Their classes.
        classes: How many classes there are.
        penalty: c, for all or for every labeling and site.
        balanced: Whether classes weigh alike, as balanced accuracy wants, or as often as they occur.
        spectrum: Of the rows' covariance, where it is at hand; it hastens the search and changes nothing else.
        steps: At most.

    Raises:
        DataError: Rows of a labeling are of one class only, or no penalty is above zero.
    """
    penalties = torch.as_tensor(penalty, dtype=torch.float64).expand(labels.shape[1], len(x)).T.to(x.device)
    if bool((penalties <= 0).any()):
        raise DataError("a logistic probe needs a penalty above 0: classes that are told apart without error have no other end")
    spectrum = spectrum or Spectrum.of(CoMoments.of(x))
    labels = labels.to(x.device)
    member = torch.nn.functional.one_hot(labels.T, classes).to(x.dtype)
    counts = member.sum(1)
    if bool(((counts > 0).sum(1) < 2).any()):
        raise DataError("rows of a labeling are of one class only: a probe needs some of two at least")
    share = 1 / counts.clamp(min=1) if balanced else torch.full_like(counts, 1.0)
    weight = share.gather(1, labels.T)
    weight = weight / weight.sum(1, keepdim=True)
    group = max(1, _SCORES // member.numel())
    found = []
    for at in range(0, len(x), group):
        part = slice(at, at + group)
        found.append(_solve(x[part], member, weight, penalties[part], spectrum.values[part], spectrum.vectors[part], steps))
    weights, bias = (torch.cat([each[which] for each in found]) for which in (0, 1))
    # a class without rows is never said
    bias = bias.masked_fill(counts == 0, -torch.inf)
    return [LinearProbe(weights[:, each], bias[:, each]) for each in range(labels.shape[1])]


def _solve(
    x: Float[Tensor, "site row width"],
    member: Float[Tensor, "labeling row class"],
    weight: Float[Tensor, "labeling row"],
    penalty: Float[Tensor, "site labeling"],
    values: Float[Tensor, "site width"],
    vectors: Float[Tensor, "site width width"],
    steps: int,
) -> tuple[Float[Tensor, "site labeling class width"], Float[Tensor, "site labeling class"]]:
    mean = x.double().mean(1)
    turned = (x - mean[:, None].to(x)) @ vectors.to(x)
    # the intercept is a weight of a column of ones, without penalty
    rows = torch.cat([turned, torch.ones_like(turned[..., :1])], dim=2)
    labelings, n, classes = member.shape
    sites, width = len(rows), rows.shape[2]
    ridge = torch.cat([penalty[..., None].expand(-1, -1, width - 1), torch.zeros_like(penalty)[..., None]], dim=2)[:, :, None].to(x)
    spread = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)[:, None, None].to(x)
    curved = (classes - 1) / classes**2 * spread + ridge
    inverse = 1 / curved.clamp(min=curved.amax() * torch.finfo(x.dtype).tiny * 2**20)

    def loss(w: Tensor) -> tuple[Tensor, Tensor]:
        scores = (rows @ w.flatten(1, 2).transpose(1, 2)).view(sites, n, labelings, classes).permute(0, 2, 1, 3)
        log = torch.log_softmax(scores, -1)
        value = -((log * member).sum(-1) * weight).sum(-1) + (ridge * w.square()).sum((2, 3)) / 2
        slope = ((log.exp() - member) * weight[..., None]).permute(0, 1, 3, 2).reshape(sites, labelings * classes, n) @ rows
        return value, slope.view_as(w) + ridge * w

    w = x.new_zeros(sites, labelings, classes, width)
    value, slope = loss(w)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(steps):
        going = _inner(slope, inverse * slope) / 2 > _NEAR
        if not bool(going.any()):
            break
        way = -_quasi_newton(slope, history, inverse)
        downhill = _inner(way, slope)
        # where rounding turned the way uphill
        way = torch.where((downhill < 0)[..., None, None], way, -inverse * slope) * going[..., None, None]
        downhill = _inner(way, slope)
        length = torch.ones_like(value)
        for _ in range(20):
            step = length[..., None, None] * way
            there, slope_there = loss(w + step)
            short = there > value + 1e-4 * length * downhill + 4 * torch.finfo(x.dtype).eps * value.abs()
            if not bool(short.any()):
                break
            length = torch.where(short, length / 2, length)
        change = slope_there - slope
        bent = _inner(step, change)
        kept = bent > torch.finfo(x.dtype).eps * _inner(change, change).clamp(min=1e-30).sqrt() * _inner(step, step).sqrt()
        history = [*history[-_HISTORY + 1 :], (step, change, torch.where(kept, 1 / bent.where(kept, torch.ones_like(bent)), 0.0))]
        w, value, slope = w + step, there, slope_there
    weights = w[..., :-1].double() @ vectors[:, None].transpose(2, 3)
    return weights, w[..., -1].double() - torch.einsum("stkw,sw->stk", weights, mean)


def _quasi_newton(slope: Tensor, history: list[tuple[Tensor, Tensor, Tensor]], inverse: Tensor) -> Tensor:
    """Return the inverse of the curvature, as steps have shown it, times the slope; pairs whose third entry is zero are of no use to their problem."""
    turned, shares = slope, []
    for step, change, over in reversed(history):
        share = over * _inner(step, turned)
        turned = turned - share[..., None, None] * change
        shares.append(share)
    turned = inverse * turned
    for (step, change, over), share in zip(history, reversed(shares), strict=True):
        turned = turned + (share - over * _inner(change, turned))[..., None, None] * step
    return turned


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((2, 3))
