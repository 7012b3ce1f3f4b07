"""What a circuit's parts look like to a person: a card per component, for judging whether the circuit is plausible.

    attends_to      tokens a head looks at from where the metric is read, by their mean share of attention
    top_tokens      tokens whose logits the component raises most from the corrupt to the clean run, with the final norm's scale kept (direct
                    logit attribution, Elhage et al. 2021)

Cards describe; that a component matters is for the scores and the criteria to say.
"""

from __future__ import annotations

import heapq
from collections import defaultdict

import pandas as pd
import torch
from torch import Tensor

from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.sender_outputs import SITES, SenderOutputs, Source, differences, require_source, written_in
from mechscope.data.metrics import read_at
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import check_fits
from mechscope.errors import SettingsError
from mechscope.instrument import CachedRun, Reading, pattern
from mechscope.instrument.attention import AttentionCall, observed
from mechscope.instrument.execution import Execution
from mechscope.instrument.readout import Readout
from mechscope.instrument.texts import over_texts
from mechscope.instrument.wiring import Wiring
from mechscope.subject import Subject

_SHOWN = 5
# a head's attention by the token it goes to, summed over the rows that are read
ByToken = dict[str, dict[int, float]]


@torch.no_grad()
def component_cards(
    subject: Subject,
    pairs: Pairs,
    circuit: Circuit,
    *,
    metric: str = "logit-diff",
    source: Source = "corrupt",
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Describe the heads and MLPs of a circuit.

    Args:
        subject: The model, with a tokenizer if tokens are to be shown as text.
        pairs: Clean and corrupt prompts.
        circuit: Which components.
        metric: Says at which tokens components are read.
        source: What the clean run is compared with.
        execution: Tokens of a batch (512 by default).

    Returns:
        One row per component: `component`, `layer`, `attends_to` (empty for MLPs), `top_tokens`.

    Raises:
        MechscopeError: Pairs, metric, circuit or source do not fit the model.
    """
    check_fits(subject, pairs)
    require_source(pairs, source)
    wiring, readout, graph = Wiring(subject), Readout.of(subject), Graph.of(subject)
    if circuit.graph != graph:
        raise SettingsError(f"a circuit of {circuit.graph} does not belong to this model, which is {graph}")
    wanted = [(place, name) for place, name in enumerate(graph.senders) if circuit.nodes[place] and name != "embed"]

    def seen(batch: PairBatch) -> tuple[int, Tensor, ByToken]:
        reading = Reading.of(read_at(metric, batch))
        run, rows, attention = _watched(subject, batch, graph, circuit, reading)
        clean = SenderOutputs.by(run, wiring)
        apart = differences(graph, clean, written_in(source, batch, clean))
        change = reading.take(apart)[[place for place, _ in wanted]]  # (component, read, d_model)
        return len(reading), (change * readout.scale(rows).to(change.device)).sum(1), attention

    attention: ByToken = defaultdict(lambda: defaultdict(float))
    raised: Tensor | None = None
    n_read = 0
    for _, (number, total, here) in over_texts(pairs, seen, execution, tokens=512, label="component cards"):
        raised = total if raised is None else raised + total
        n_read += number
        for name, shares in here.items():
            for token, share in shares.items():
                attention[name][token] += share
    table = []
    for number, (_, name) in enumerate(wanted):
        assert raised is not None  # there is at least one batch
        with subject.active():
            logits = readout.folded(raised[number] / n_read).to(readout.weight) @ readout.weight.T
        top = logits.topk(min(_SHOWN, logits.shape[-1]))
        tokens = ", ".join(
            f"{_quoted(subject, int(token))} {float(value):+.2f}" for token, value in zip(top.indices, top.values, strict=True)
        )
        most = heapq.nlargest(_SHOWN, attention[name].items(), key=lambda item: item[1])
        attends = ", ".join(f"{_quoted(subject, token)} {share / n_read:.0%}" for token, share in most if share)
        table.append({"component": name, "layer": graph.layer_of([name])[0], "attends_to": attends, "top_tokens": tokens})
    return pd.DataFrame(table, columns=["component", "layer", "attends_to", "top_tokens"])


def _watched(subject: Subject, batch: PairBatch, graph: Graph, circuit: Circuit, reading: Reading) -> tuple[CachedRun, Tensor, ByToken]:
    """Run the clean texts and add up each wanted head's attention by the token it goes to, however often the token occurs."""
    tokens, place = batch.clean[reading.example].unique(return_inverse=True)  # place: (read, key)
    attention: ByToken = {}

    def tap(call: AttentionCall) -> None:
        heads = graph.heads_of(call.layer)
        chosen = [head for head in range(graph.n_heads) if circuit.nodes[heads.start + head]]
        if not chosen:
            return
        shares = pattern(call, dtype=call.query.dtype)[reading.example, :, reading.position]  # (read, head, key)
        for head in chosen:
            own = shares[:, head].flatten().float()
            sums = own.new_zeros(len(tokens)).index_add(0, place.flatten().to(own.device), own)
            attention[f"a{call.layer}.h{head}"] = dict(zip(tokens.tolist(), sums.tolist(), strict=True))

    with observed(subject, tap):
        run = CachedRun(subject, batch.clean, batch.real, sites=SITES)
    return run, run.read(reading), attention


def _quoted(subject: Subject, token: int) -> str:
    # quotes show where a token begins and ends, spaces included
    return repr(subject.spelling.token(token))
