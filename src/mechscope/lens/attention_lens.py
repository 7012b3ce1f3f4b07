"""The attention lens: for every head a trained map from what it writes to the model's final prediction.

Sakarvadia et al. 2023 ("Attention Lens: A Tool for Mechanistically Interpreting the Attention Head Information Retrieval Mechanism") train one linear map
per head, from its output z_h W_O straight to the vocabulary: d_model × vocab numbers per head, 39 million for each of GPT-2's 144, and nothing ties
their words to the model's. Here a head's map ends in the residual stream and the model's own norm and unembedding follow, as in the tuned lens:

    lens(a_h) = unembed(norm(a_h + A_h a_h + b_h))

So it can say no more than the unembedding can; as what a head writes lies in the d_head dimensions of its W_O, A_h has d_model × d_head numbers without
loss, 800 times fewer than the paper's. The loss is the paper's, KL to the model's output distribution at that token.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.pairs import Pairs
from mechscope.instrument.execution import Execution
from mechscope.instrument.kernels import statistics_dtype
from mechscope.instrument.wiring import Wiring
from mechscope.lens.places import places_of
from mechscope.lens.training import Trained, train
from mechscope.settings.lens import TunedLensSettings
from mechscope.subject import Subject


def train_attention_lens(
    subject: Subject,
    texts: Pairs,
    *,
    layers: Collection[int] | None = None,
    settings: TunedLensSettings | None = None,
    execution: Execution = Execution(),
) -> Trained:
    """Train a lens for every head; `read(subject, texts, sites=("head_output",), translators=…)` looks through it.

    Args:
        subject: The model.
        texts: Any texts; their clean versions are read. Keep some others for `evaluate`.
        layers: Whose heads; None for all layers.
        settings: How to train.
        execution: Seed (of the order of the texts), progress.

    Raises:
        MechscopeError: Settings, layers or texts do not fit, heads write in a way that is not supported, or the training diverged.
    """
    places = places_of(subject, ("head_output",), layers)
    wiring = Wiring(subject)
    bases = {layer: _bases(wiring, layer) for layer in {place.layer for place in places}}
    chosen = {place: bases[place.layer][place.head] for place in places}
    return train(subject, texts, chosen, settings=settings or TunedLensSettings(), execution=execution)


def _bases(wiring: Wiring, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """Return orthonormal bases of what each head of a layer can write."""
    weight = wiring.writer(layer)[0]
    return torch.linalg.qr(weight.to(statistics_dtype(weight.dtype)).mT).Q.mT
