"""Information-flow routes: how much of what every part reads came from each sender, from one forward pass (Ferrando & Voita 2024).

    importance(u→v) = max(0, ‖x_v‖₁ − ‖x_v − w_u‖₁), divided by its sum over u          mean over tokens and texts

with x_v the residual stream that v reads and w_u what u writes to it. No corrupt text and no metric: it says what flows, not what matters. All queries,
keys and values of a layer read the same stream, so their edges from one sender score alike. Tokens are averaged, as in EAP-IG's code; the
authors also follow single tokens through attention.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.circuits.graph import Graph
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.circuits.sender_outputs import SITES, SenderOutputs, differences
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, check_fits
from mechscope.instrument import CachedRun
from mechscope.instrument.execution import Execution
from mechscope.instrument.wiring import Wiring
from mechscope.subject import Subject


@torch.no_grad()
def flow_routes(subject: Subject, pairs: Pairs, *, execution: Execution = Execution()) -> EdgeScores:
    """Score every edge by its share in what its receiver reads.

    Args:
        subject: The model.
        pairs: The clean texts are run.
        execution: Tokens of a batch (512 by default), progress.

    Returns:
        Scores between 0 and 1; the edges into one receiver sum to 1.

    Raises:
        MechscopeError: The texts do not fit the model.
    """
    check_fits(subject, pairs)
    graph, wiring = Graph.of(subject), Wiring(subject)
    gathered = PerText(pairs)

    def shares(batch: PairBatch) -> dict[str, np.ndarray]:
        run = CachedRun(subject, batch.clean, batch.real, sites=SITES)
        clean = SenderOutputs.by(run, wiring)
        written = differences(graph, clean, SenderOutputs.nothing(clean))
        real = batch.real.to(written.device)
        scores = torch.zeros(len(batch.pairs), *graph.real.shape, dtype=subject.dtype, device=written.device)
        for layer in range(graph.n_layers):
            before = run.input_of(layer)
            heads = _shares(before, written[: graph.heads_of(layer).start], real)
            scores[:, : heads.shape[1], graph.readers_of(layer)] = heads[..., None]
            attention = run.recording["attention_output", layer]
            read = before if graph.parallel else before.to(attention.device) + attention
            mlp = _shares(read, written[: graph.before_mlp(layer)], real)
            scores[:, : mlp.shape[1], graph.mlp_reader(layer)] = mlp
        scores[:, :, -1] = _shares(run.recording["residual", graph.n_layers - 1], written, real)
        return {"shares": graph.flat(scores.double().cpu().numpy()).T}

    gathered.run(shares, execution, tokens=512, label="following the flow")
    per_text: Float[np.ndarray, "text edge"] = gathered["shares"].T
    return EdgeScores(graph, per_text.mean(0), per_text, "flow-routes", Cost(1, 0), {"source": "none", "texts": pairs.hash})


def _shares(read: Tensor, written: Float[Tensor, "sender batch token d_model"], real: Tensor) -> Float[Tensor, "batch sender"]:
    """Return each sender's share in what is read, averaged over a text's tokens."""
    read = read.to(written.device)
    whole = read.abs().sum(-1)
    near = torch.stack([(whole - (read - one).abs().sum(-1)).clamp(min=0) for one in written])  # (sender, batch, token)
    total = near.sum(0)
    share = torch.where(total > 0, near / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0) * real
    return (share.sum(-1) / real.sum(-1)).T
