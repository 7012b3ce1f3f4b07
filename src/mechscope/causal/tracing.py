"""Causal tracing: where a fact is recalled (Meng et al. 2022).

The embeddings of the subject's tokens are corrupted with Gaussian noise, so that the answer is lost; then clean values are restored at one place and
one token at a time. What brings the answer back lies on the path of the fact. Noise is drawn several times and averaged per text. Tokens of
texts of different length are compared by their role: first, middle and last subject token, first subsequent token, further tokens, last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechscope.causal.effects import Effects, effects, place_columns
from mechscope.causal.places import edits_of, places
from mechscope.data.pairs import PairBatch, Pairs, PromptPair
from mechscope.data.scoring import PerText, Runs, check_fits, metric_of
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import CachedRun, Edit, intervene
from mechscope.instrument.execution import Execution
from mechscope.instrument.walk import Walk
from mechscope.subject import Subject

ROLES = ("first subject token", "middle subject tokens", "last subject token", "first subsequent token", "further tokens", "last token")


def causal_trace(
    subject: Subject,
    pairs: Pairs,
    *,
    site: str = "residual",
    segment: str = "subject",
    noise: float = 3.0,
    samples: int = 10,
    window: int = 1,
    metric: str = "probability",
    execution: Execution = Execution(),
) -> Effects:
    """Corrupt the subject with noise and restore clean values layer by layer and token by token.

    Args:
        subject: The model.
        pairs: Texts with a segment for the subject; only the clean ones are run.
        site: What is restored: `residual`, `mlp` or `attention`.
        segment: Name of the corrupted segment.
        noise: Standard deviation of the noise, in standard deviations of the texts' embeddings (Meng et al.: 3).
        samples: Draws of noise per text.
        window: Layers around each layer that are restored together (Meng et al.: 10 for MLP and attention).
        metric: `logit-diff`, `probability`, `loss` or `kl`; `probability` in the paper.
        execution: Tokens of a batch (512 by default), seed (of the noise), progress.

    Returns:
        One row per layer and role of a token; `normalised` is 0 where nothing was restored and 1 where the corruption is undone.

    Raises:
        MechscopeError: A text has no such segment, or the settings do not fit the model.
    """
    where = places(subject.anatomy, site)
    if where[0].site not in ("residual", "mlp_output", "attention_output", "mixer_output"):
        raise SettingsError(f"site {site!r} is not traced: use residual, mlp, attention or mixer")
    if samples < 1 or noise <= 0:
        raise SettingsError(f"noise {noise:g} and samples {samples}: both must be above zero")
    if not 1 <= window <= subject.anatomy.n_layers:
        raise SettingsError(
            f"a window of {window} layers does not fit a model of {subject.anatomy.n_layers}: choose 1 to {subject.anatomy.n_layers}"
        )
    check_fits(subject, pairs)
    gathered = PerText(pairs)
    spread = noise * _spread(subject, pairs)

    def traced(batch: PairBatch) -> dict[str, np.ndarray]:
        # each text has noise of its own, however texts are batched
        generators = [_generator(execution.seed, index) for index in batch.indices]
        clean = CachedRun(subject, batch.clean, batch.real, sites={where[0].site})
        by = metric_of(metric, batch, clean)
        unchanged = Runs(clean, by).unchanged()
        corrupted, restored = [], []
        masks = list(_roles(batch, segment))
        absent = np.stack([missing for _, missing in masks])

        def value(at: str, layer: int) -> Tensor:
            return clean.recording[at, layer]

        units: list[list[Edit]] = []
        for place in where:
            around = [other for other in where if -((window - 1) // 2) <= other.layer - place.layer <= window // 2]
            units += [edits_of(around, value, mask) for mask, _ in masks]
        for _ in range(samples):
            runs = Runs(_corrupted(clean, batch, segment, spread, generators, where[0].site), by)
            corrupted.append(runs.unchanged())
            restored.append(runs.of(units, progress=gathered.step))
        mean = np.mean(restored, axis=0).reshape(len(where), len(masks), -1)
        mean[:, absent] = np.nan
        return {"clean": unchanged, "corrupt": np.mean(corrupted, axis=0), "restored": mean.reshape(-1, mean.shape[-1])}

    gathered.run(traced, execution, tokens=512, label="tracing", units=len(where) * len(ROLES) * samples)
    rows = [place_columns(place, role) for place in where for role in ROLES]
    values, corrupt, clean = gathered["restored"], gathered["corrupt"], gathered["clean"]
    notes: dict[str, Any] = {"noise": float(spread), "samples": samples, "window": window}
    return effects(rows, values, corrupt, metric=metric, clean=clean, corrupt=corrupt, **notes)


def _spread(subject: Subject, pairs: Pairs) -> float:
    """Return the standard deviation of the texts' token embeddings, in the units of what the first block reads.

    Some families (Granite) multiply embeddings on the way there: how far tokens lie apart at the same position tells by how much.
    """
    ids = torch.tensor(sorted({token for pair in pairs for token in pair.clean}), device=subject.device)
    if len(ids) < 2:
        raise DataError(f"the texts hold no token but {int(ids[0])}: their embeddings have no spread that noise could be measured in")
    with torch.no_grad(), subject.active():
        embedded = subject.anatomy.embedding(ids).double()
        read = Walk(subject, ids[:, None]).hidden[:, 0].to(embedded)
    apart, apart_read = (vectors - vectors.mean(0) for vectors in (embedded, read))
    return float(embedded.std() * apart_read.std() / apart.std())


def _generator(seed: int, text: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, text)).generate_state(1)[0]))


def _corrupted(
    clean: CachedRun, batch: PairBatch, segment: str, spread: float, generators: Sequence[torch.Generator], site: str
) -> CachedRun:
    """Run the texts with noise on the embeddings of a segment."""
    embedding = clean.recording["embedding"]
    drawn = torch.zeros(embedding.shape, dtype=torch.float64)
    for row, pair in enumerate(batch.pairs):
        first, length = batch.shift(row), len(pair.clean)
        drawn[row, first : first + length] = torch.randn(length, embedding.shape[-1], generator=generators[row], dtype=torch.float64)
    drawn[~batch.positions(segment)] = 0.0
    noisy = embedding + (spread * drawn).to(embedding)
    with intervene(clean.subject, Edit("embedding", 0, noisy)):
        run = CachedRun(clean.subject, batch.clean, batch.real, sites={site})
    # reruns begin where something is restored, and the first block then reads this
    run.recording.values["embedding", 0] = noisy
    return run


def role_of(pair: PromptPair, segment: str) -> list[str]:
    """Return the role of each token of a text.

    Raises:
        DataError: The text has no such segment, or nothing follows it.
    """
    if segment not in pair.segments:
        known = ", ".join(pair.segments) or "none"
        raise DataError(f"pair {pair.id!r} has no segment {segment!r} to corrupt; its segments: {known}")
    inside = sorted({at for span in pair.segments[segment] for at in range(*span)})
    roles = ["further tokens"] * len(pair.clean)
    if not inside or inside[-1] >= len(pair.clean) - 1:
        raise DataError(f"pair {pair.id!r}: nothing follows segment {segment!r}, so there is no token that could recall it")
    for at in inside:
        roles[at] = "middle subject tokens"
    roles[inside[0]] = "first subject token"
    roles[inside[-1]] = "last subject token"
    roles[inside[-1] + 1] = "first subsequent token"
    roles[-1] = "last token"
    # tokens before the subject are untouched by its corruption
    return ["" if at < inside[0] else role for at, role in enumerate(roles)]


def _roles(batch: PairBatch, segment: str) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield each role's mask, and which texts have no such token."""
    each = [role_of(pair, segment) for pair in batch.pairs]
    for role in ROLES:
        mask = torch.zeros_like(batch.real)
        for row, roles in enumerate(each):
            for at, own in enumerate(roles):
                mask[row, at + batch.shift(row)] = own == role
        yield mask, ~mask.any(1).numpy()
