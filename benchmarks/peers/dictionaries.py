"""One step of training a TopK dictionary by SAELens and by sparsify, on the very weights and rows of mechscope's job.

A step is what their trainers do with a batch: forward, backward, clipping, Adam, and sparsify's decoders of norm one. Nothing of their logging, data or
language models is run. Learning rates are so low that the step before, on a few rows, moves nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Beside, Job
from benchmarks.models import ACTIVE, WIDER, RowsCase, make_dictionary, make_rows
from benchmarks.settings import Settings
from benchmarks.shapes import Size

SAELENS, SPARSIFY = "SAELens", "sparsify"
_RATE = 1e-12


@dataclass(frozen=True, eq=False, kw_only=True)
class CoderCase(RowsCase):
    """A peer's dictionary in training and a batch.

    Attributes:
        coder: The dictionary.
        adam: Its optimizer.
        encoder: ``(latent, width)``, for the product beside it.
    """

    coder: Any
    adam: torch.optim.Optimizer
    encoder: Tensor


def build(make: Callable[[Tensor], Any], settings: Settings, size: Size) -> CoderCase:
    """Make a peer's dictionary with mechscope's first weights, and its rows."""
    width = settings.shape.width
    decoder = make_dictionary(width, WIDER * width).to(settings.device)
    coder = make(decoder).to(settings.device)
    adam = torch.optim.Adam(coder.parameters(), lr=_RATE)
    return CoderCase(rows=make_rows(size, width).to(settings.device), coder=coder, adam=adam, encoder=decoder)


def saelens(decoder: Tensor) -> Any:
    """Make SAELens's dictionary for training."""
    module: Any = importlib.import_module("sae_lens.saes.topk_sae")
    latents, width = decoder.shape
    config = module.TopKTrainingSAEConfig(d_in=width, d_sae=latents, k=ACTIVE, decoder_init_norm=None, apply_b_dec_to_input=False)
    coder = module.TopKTrainingSAE(config)
    with torch.no_grad():
        coder.W_dec.copy_(decoder)
        coder.W_enc.copy_(decoder.T)
    return coder


def saelens_step(case: CoderCase) -> float:
    """Take one step; return the mean squared error that it found."""
    given = importlib.import_module("sae_lens.saes.sae").TrainStepInput(
        sae_in=case.rows,
        coefficients={},
        dead_neuron_mask=torch.zeros(len(case.encoder), dtype=torch.bool, device=case.rows.device),
        n_training_steps=0,
        is_logging_step=False,
    )
    done = case.coder.training_forward_pass(given)
    case.adam.zero_grad()
    done.loss.backward()
    torch.nn.utils.clip_grad_norm_(case.coder.parameters(), 1.0)
    case.adam.step()
    return float(done.losses["mse_loss"].detach())


def sparsify(decoder: Tensor) -> Any:
    """Make sparsify's dictionary."""
    module: Any = importlib.import_module("sparsify")
    latents, width = decoder.shape
    coder = module.SparseCoder(width, module.SparseCoderConfig(num_latents=latents, k=ACTIVE))
    with torch.no_grad():
        coder.W_dec.copy_(decoder)
        coder.encoder.weight.copy_(decoder)
        coder.encoder.bias.zero_()
    return coder


def sparsify_step(case: CoderCase) -> float:
    """Take one step; return the mean squared error that it found."""
    case.coder.set_decoder_norm_to_unit_norm()
    variance = (case.rows - case.rows.mean(0)).square().sum()
    done = case.coder(case.rows)
    done.fvu.backward()
    case.coder.remove_gradient_parallel_to_decoder_directions()
    torch.nn.utils.clip_grad_norm_(case.coder.parameters(), 1.0)
    case.adam.step()
    case.adam.zero_grad()
    return float(done.fvu.detach() * variance / len(case.rows))


@torch.no_grad()
def product(case: CoderCase) -> None:
    """Multiply the batch with the encoder, as mechscope's job does."""
    for rows in case.rows.split(512):
        torch.nn.functional.linear(rows, case.encoder)


def _number(found: float) -> np.ndarray:
    return np.array([found])


_step = partial(
    Job,
    name="features_step",
    what="the same by a peer",
    sizes={"small": Size(4, 512)},
    beside=Beside("product with the encoder", product),
    numbers=_number,
    rounds=3,
    seconds=120,
)
JOBS = (
    _step(by=SAELENS, package="sae_lens", build=partial(build, saelens), run=saelens_step),
    _step(by=SPARSIFY, package="sparsify", build=partial(build, sparsify), run=sparsify_step),
)
