"""What every score of an autoencoder stands beside: dictionaries that learned nothing, and principal components, with as many active latents.

A control is measured on the tokens that its dictionary is measured on: what training left out goes with it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import Layout, autoencoder
from mechscope.features.rules import Rule


def random_control(dictionary: Dictionary, k: int, *, seed: int = 0) -> Dictionary:
    """Return as many random directions, of which the k largest of each token are active.

    Raises:
        SettingsError: The dictionary is no autoencoder of one place.
    """
    layout = _of_one_place(dictionary, dictionary.latents, k)
    return replace(
        dictionary,
        layout=layout,
        tensors=layout.tensors(seed=seed, dtype=dictionary.dtype),
        about={**dictionary.about, "control": "random directions"},
    )


def pca_control(dictionary: Dictionary, rows: Float[Tensor, "row width"], k: int) -> Dictionary:
    """Return the principal components of activations, each in both directions, of which the k largest of each token are active.

    Args:
        dictionary: What it stands beside.
        rows: Activations at its place, in the model's units.
        k: Active latents of a token.

    Raises:
        SettingsError: The dictionary is no autoencoder of one place.
    """
    u = dictionary.input_maps[0](rows.double())
    components = torch.linalg.eigh(torch.cov(u.T)).eigenvectors.T.to(dictionary.dtype)
    layout = _of_one_place(dictionary, 2 * len(components), k)
    both = torch.cat([components, -components])
    tensors = {**layout.tensors(dtype=dictionary.dtype), "encoder.0": both, "decoder.0": both.clone()}
    return replace(dictionary, layout=layout, tensors=tensors, about={**dictionary.about, "control": "principal components"})


def _of_one_place(dictionary: Dictionary, latents: int, k: int) -> Layout:
    layout = dictionary.layout
    if layout.inputs != layout.outputs or len(layout.inputs) > 1:
        raise SettingsError(
            "random directions and principal components stand beside autoencoders of one place: this dictionary writes elsewhere"
        )
    return autoencoder(layout.inputs[0], layout.input_widths[0], latents, Rule("topk", min(k, latents)))
