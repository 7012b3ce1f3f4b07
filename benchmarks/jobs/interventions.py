"""Recording, patching, ablation and attribution patching."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.harness import Job
from benchmarks.jobs.cases import PairsCase, build, forward
from benchmarks.shapes import Size
from mechscope.causal import ablate, attribution_patch, patch
from mechscope.causal.effects import Effects
from mechscope.instrument import record
from mechscope.instrument.record import Recording, Site

SITES: tuple[Site, ...] = ("residual", "z", "mlp_output")


@torch.no_grad()
def recording(case: PairsCase) -> Recording:
    """Record every residual stream, z and MLP output during the forward pass."""
    with record(case.subject, *SITES) as found:
        case.subject.plain(case.ids, use_cache=False)
    return found


def patch_heads(case: PairsCase) -> Effects:
    """Patch every head, clean into corrupt, with the logit difference at the last token."""
    return patch(case.subject, case.pairs, site="head")


def ablation(case: PairsCase) -> Effects:
    """Ablate every head and MLP, one at a time, with the loss of every token."""
    return ablate(case.subject, case.pairs)


def attribution(case: PairsCase) -> Effects:
    """Attribute the logit difference to every head."""
    return attribution_patch(case.subject, case.pairs)


def _last_tokens(found: Recording) -> np.ndarray:
    """Take every recorded vector of the first text's last token, site by site, layer by layer."""
    layers = 1 + max(layer for _, layer in found.values)
    return torch.cat([found[site, layer][0, -1].flatten() for site in SITES for layer in range(layers)]).cpu().numpy()


def _values(found: Effects) -> np.ndarray:
    return found.values.ravel()


def _estimates(found: Effects) -> np.ndarray:
    return (found.values - found.unchanged).ravel()


JOBS = (
    Job(
        name="recording",
        what="record every residual stream, z and MLP output",
        build=build,
        run=recording,
        sizes={"small": Size(8, 64), "long": Size(1, 4096)},
        forward=forward,
        numbers=_last_tokens,
        ratio=1.15,
        seconds=25,
    ),
    Job(
        name="patch_heads",
        what="patch every head, one at a time, logit difference at the last token",
        build=build,
        run=patch_heads,
        sizes={"small": Size(8, 16), "long": Size(1, 1024)},
        forward=forward,
        numbers=_values,
        ratio=42,
        rounds=4,
        seconds=75,
    ),
    Job(
        name="ablation",
        what="ablate every head and MLP, one at a time, loss of every token",
        build=build,
        run=ablation,
        sizes={"small": Size(8, 64), "long": Size(1, 1024)},
        forward=forward,
        numbers=_values,
        ratio=105,
        rounds=2,
        slow=True,
        seconds=220,
    ),
    Job(
        name="attribution",
        what="attribute the logit difference to every head",
        build=build,
        run=attribution,
        sizes={"small": Size(8, 16), "long": Size(1, 4096)},
        forward=forward,
        numbers=_estimates,
        ratio=3,
        seconds=20,
    ),
)
