"""What a circuit's parts look like to a person: a card per component, for judging whether the circuit is plausible.

    attends_to      tokens a head looks at from where the metric is read, by their mean share of attention
    top_tokens      tokens whose logits the component raises most from the corrupt to the clean run, with the final norm's scale kept (direct
                    logit attribution, Elhage et al. 2021)

Cards describe; that a component matters is for the scores and the criteria to say.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.written import SITES, Source, Written, differences, require_source, written_in
from mechscope.data.metrics import read_at
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import SettingsError
from mechscope.instrument import Prefix, Reading, pattern
from mechscope.instrument.attention import AttentionCall, observed
from mechscope.instrument.norms import recognised
from mechscope.instrument.wiring import Wiring
from mechscope.scoring import batches, check_fits
from mechscope.subject import Subject

_SHOWN = 5


@torch.no_grad()
def component_cards(
    subject: Subject, pairs: Pairs, circuit: Circuit, *, metric: str = "logit-diff", source: Source = "corrupt", tokens_per_batch: int = 512
) -> pd.DataFrame:
    """Describe the heads and MLPs of a circuit.

    Args:
        subject: The model, with a tokenizer if tokens are to be shown as text.
        pairs: Clean and corrupt prompts.
        circuit: Which components.
        metric: Says at which tokens components are read.
        source: What the clean run is compared with.
        tokens_per_batch: Most tokens of a batch of pairs, padding included.

    Returns:
        One row per component: `component`, `layer`, `attends_to` (empty for MLPs), `top_tokens`.

    Raises:
        MechscopeError: Pairs, metric, circuit or source do not fit the model.
    """
    check_fits(subject, pairs)
    require_source(pairs, source)
    wiring, graph = Wiring(subject), Graph.of(subject)
    if circuit.graph != graph:
        raise SettingsError(f"a circuit of {circuit.graph} does not belong to this model, which is {graph}")
    wanted = [(place, name) for place, name in enumerate(graph.senders) if circuit.nodes[place] and name != "input"]
    looked: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    raised: Tensor | None = None
    read = 0
    for batch in batches(pairs, tokens_per_batch):
        reading = Reading.of(read_at(metric, batch))
        run, rows = _watched(subject, batch, graph, circuit, reading, looked)
        clean = Written.by(run, wiring)
        apart = differences(graph, clean, written_in(source, batch, clean))
        change = reading.take(apart)[[place for place, _ in wanted]]  # (component, read, d_model)
        scaled = _through_final_norm(subject, rows, change)
        total = scaled.sum(1)
        raised = total if raised is None else raised + total
        read += len(reading)
    spelled = _speller(subject)
    unembedding, projection = subject.anatomy.unembedding, subject.anatomy.projection_out
    table = []
    for number, (_, name) in enumerate(wanted):
        assert raised is not None  # there is at least one batch
        mean = raised[number] / read
        with subject.active():
            ends = torch.stack([mean, torch.zeros_like(mean)])
            # a difference, so that a bias of the unembedding is nobody's
            logits = torch.sub(*unembedding(ends if projection is None else projection(ends)))
        top = logits.topk(min(_SHOWN, logits.shape[-1]))
        tokens = ", ".join(f"{spelled(int(token))} {float(value):+.2f}" for token, value in zip(top.indices, top.values, strict=True))
        most = heapq.nlargest(_SHOWN, looked[name].items(), key=lambda found: found[1])
        attends = ", ".join(f"{spelled(token)} {share / read:.0%}" for token, share in most if share)
        table.append({"component": name, "layer": graph.layer_of([name])[0], "attends_to": attends, "top_tokens": tokens})
    return pd.DataFrame(table, columns=["component", "layer", "attends_to", "top_tokens"])


def _watched(
    subject: Subject, batch: PairBatch, graph: Graph, circuit: Circuit, reading: Reading, looked: dict[str, dict[int, float]]
) -> tuple[Prefix, Tensor]:
    """Run the clean texts and add up each wanted head's attention by the token it goes to, however often the token occurs."""
    tokens, place = batch.clean[reading.example].unique(return_inverse=True)  # place: (read, key)

    def tap(call: AttentionCall) -> None:
        heads = graph.heads_of(call.layer)
        chosen = [head for head in range(graph.n_heads) if circuit.nodes[heads.start + head]]
        if not chosen:
            return
        shares = pattern(call, dtype=call.query.dtype)[reading.example, :, reading.position]  # (read, head, key)
        for head in chosen:
            own = shares[:, head].flatten().float()
            sums = own.new_zeros(len(tokens)).index_add(0, place.flatten().to(own.device), own)
            found = looked[f"a{call.layer}.h{head}"]
            for token, share in zip(tokens.tolist(), sums.tolist(), strict=True):
                found[token] += share

    with observed(subject, tap):
        run = Prefix(subject, batch.clean, batch.real, sites=SITES)
    return run, run.read(reading)


def _through_final_norm(subject: Subject, rows: Tensor, change: Tensor) -> Tensor:
    """Carry changes of the rows that are read through the final norm with its scale kept."""
    norm = subject.anatomy.final_norm
    if norm is None:
        return change
    known = recognised(subject.family, norm)
    _, scale = known.normalised(rows)
    change = change - change.mean(-1, keepdim=True) if known.centred else change
    return change * scale * known.gain


def _speller(subject: Subject) -> Callable[[int], str]:
    if subject.tokenizer is None:
        return str
    return lambda token: repr(subject.tokenizer.decode([token]))
