"""What every score of a dictionary stands beside: dictionaries that learned nothing, with as many active latents, of the same places.

random directions      as many latents, drawn, of which the k largest of each token are active; of a cross-layer transcoder, which runs layer by layer, those
                       above one threshold
principal components   of what a dictionary reads and writes (autoencoders, crosscoders): each in both directions, the k largest of each token
linear map             from one place to another (transcoders): the least-squares map, which has no latents

A control is measured on the tokens that its dictionary is measured on: what training left out goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import Group, Layout
from mechscope.features.pre_activations import pre_activations
from mechscope.features.rules import Rule

RANDOM, COMPONENTS, LINEAR = "random directions", "principal components", "linear map"
Rows = Sequence[Float[Tensor, "row width"]]


def controls_of(dictionary: Dictionary, inputs: Rows, outputs: Rows, *, seed: int = 0) -> dict[str, Dictionary]:
    """Return what a dictionary stands beside, by name.

    Args:
        dictionary: The dictionary.
        inputs: Activations at its input places, in the model's units: how many latents are active in them is how many are in a control.
        outputs: The same at its output places.
        seed: Of random directions.
    """
    k = max(1, round(len(dictionary.encode(inputs)) / max(len(inputs[0]), 1)))
    found = {RANDOM: random_control(dictionary, k, inputs, seed=seed)}
    if dictionary.layout.inputs == dictionary.layout.outputs:
        found[COMPONENTS] = pca_control(dictionary, inputs, k)
    elif len(dictionary.layout.groups) == 1:
        found[LINEAR] = linear_control(dictionary, inputs, outputs)
    return found


def random_control(dictionary: Dictionary, k: int, inputs: Rows = (), *, seed: int = 0) -> Dictionary:
    """Return as many random directions, of which the k largest of each token are active.

    Args:
        dictionary: What it stands beside.
        k: Active latents of a token.
        inputs: Activations at its input places, where its latents are in several groups: those above one threshold are active, k of these on average.
        seed: Of the directions.

    Raises:
        SettingsError: Activations are needed and not given.
    """
    layout = dictionary.layout
    k = min(k, layout.latents)
    several = len(layout.groups) > 1
    made = replace(layout, rule=Rule("batchtopk" if several else "topk", k), skip=False)
    tensors = {name: tensor.to(dictionary.device) for name, tensor in made.tensors(seed=seed, dtype=dictionary.dtype).items()}
    control = replace(dictionary, layout=made, tensors=tensors, about={**dictionary.about, "control": RANDOM})
    if several:
        if not inputs:
            raise SettingsError("random latents of several layers are active above a threshold: give activations to find it")
        tensors["threshold"] = _threshold(control, inputs, k)
    return control


def _threshold(control: Dictionary, inputs: Rows, k: int) -> Tensor:
    """Return the score above which k latents of a token are active on average."""
    u = control.read(inputs)
    largest = [pre.topk(min(4 * k, control.latents), dim=1).values for pre in pre_activations(control.layout, control.tensors, u)]
    scores = torch.cat(largest).flatten()
    return scores.topk(min(k * len(u), len(scores))).values.min()


def pca_control(dictionary: Dictionary, inputs: Rows, k: int) -> Dictionary:
    """Return the principal components of activations, each in both directions, of which the k largest of each token are active.

    Args:
        dictionary: What it stands beside.
        inputs: Activations at its places, in the model's units.
        k: Active latents of a token.

    Raises:
        SettingsError: The dictionary does not write what it reads.
    """
    layout = dictionary.layout
    if layout.inputs != layout.outputs:
        raise SettingsError("principal components stand beside dictionaries that write what they read: this one writes elsewhere")
    u = dictionary.read([rows.to(dictionary.device) for rows in inputs]).double()
    components = torch.linalg.eigh(torch.cov(u.T)).eigenvectors.T.to(dictionary.dtype)
    both, count = torch.cat([components, -components]), len(layout.inputs)
    made = replace(layout, groups=(Group(len(both), (0, count), (0, count)),), rule=Rule("topk", min(k, len(both))), skip=False)
    return replace(
        dictionary, layout=made, tensors=_filled(made, dictionary, both, both.clone()), about={**dictionary.about, "control": COMPONENTS}
    )


def linear_control(dictionary: Dictionary, inputs: Rows, outputs: Rows) -> Dictionary:
    """Return the least-squares map from what a dictionary reads to what it writes; its one latent never speaks.

    Args:
        dictionary: What it stands beside.
        inputs: Activations at its input places, in the model's units.
        outputs: The same at its output places.

    Raises:
        SettingsError: It reads several layers one after the other.
    """
    layout = dictionary.layout
    if len(layout.groups) > 1:
        raise SettingsError("a linear map stands beside dictionaries of one layer: this one reads several")
    u = dictionary.read([rows.to(dictionary.device) for rows in inputs]).double()
    v = torch.cat([each(rows.to(dictionary.device).double()) for each, rows in zip(dictionary.output_maps, outputs, strict=True)], dim=1)
    centred = u - u.mean(0)
    # a little ridge, as rows may be fewer than columns
    gram = centred.T @ centred
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    weights = torch.linalg.solve(gram, centred.T @ (v - v.mean(0))).T
    made = replace(layout, groups=(replace(layout.groups[0], latents=1),), rule=Rule("relu"), skip=True)
    zero = torch.zeros(1, device=dictionary.device, dtype=dictionary.dtype)
    tensors = _filled(made, dictionary, zero.expand(1, u.shape[1]).clone(), zero.expand(1, v.shape[1]).clone())
    tensors |= {"skip": weights.to(dictionary.dtype), "decoder_bias": (v.mean(0) - weights @ u.mean(0)).to(dictionary.dtype)}
    return replace(dictionary, layout=made, tensors=tensors, about={**dictionary.about, "control": LINEAR})


def _filled(layout: Layout, dictionary: Dictionary, encoder: Tensor, decoder: Tensor) -> dict[str, Tensor]:
    tensors = {name: torch.zeros(shape, dtype=dictionary.dtype, device=dictionary.device) for name, shape in layout.shapes().items()}
    return {**tensors, "encoder.0": encoder, "decoder.0": decoder}
