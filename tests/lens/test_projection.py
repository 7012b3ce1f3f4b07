"""What rows say about the vocabulary equals what whole logits say, sorted and summed slowly in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.instrument import unembed
from mechscope.lens import projection as module
from mechscope.lens.projection import Projection
from mechscope.lens.token_stats import GROUP, said_of
from mechscope.subject.load import Subject, load
from tests import families

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
SOME = ("gpt2", "llama", "gpt_neox", "gemma2", "phi", "qwen3", "opt")


@pytest.fixture(params=SOME)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def streams(subject: Subject, n: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, subject.anatomy.d_model, generator=generator, dtype=torch.float64).to(subject.dtype) * 3


def targets(n: int = 11) -> Tensor:
    chosen = torch.randint(0, families.VOCABULARY, (n,), generator=torch.Generator().manual_seed(5))
    chosen[3] = -1
    return chosen


def slow_ranks(logits: Tensor, wanted: Tensor) -> list[int]:
    ranks = []
    for row, token in zip(logits.tolist(), wanted.tolist(), strict=True):
        order = [word for _, word in sorted((-logit, word) for word, logit in enumerate(row))]
        ranks.append(0 if token < 0 else order.index(token) + 1)
    return ranks


def log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


@torch.no_grad()
def check(projection: Projection, hidden: Tensor, end: Tensor, *, k: int) -> None:
    """Compare everything that is said of some rows with the model's own unembedding."""
    lens, last = (log_probabilities(unembed(projection.subject, some)) for some in (hidden, end))
    wanted = targets(len(hidden))
    final = projection.final(projection.applied(end))
    said = projection.read(projection.applied(hidden), wanted, k=k, ranks=True, entropy=True, final=final)
    values, tokens = lens.sort(descending=True, stable=True)
    assert torch.equal(said.top, tokens[:, :k])
    torch.testing.assert_close(said.top_log_probability, values[:, :k], **CLOSE)
    assert said.target_log_probability is not None
    assert said.rank is not None
    assert said.target_log_probability[3].isnan()
    own = lens.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(said.target_log_probability[wanted >= 0], own[wanted >= 0], **CLOSE)
    assert said.rank.tolist() == slow_ranks(lens, wanted)
    torch.testing.assert_close(said.entropy, -(lens.exp() * lens).sum(-1), **CLOSE)
    torch.testing.assert_close(said.kl, (last.exp() * (last - lens)).sum(-1), **CLOSE)


def test_everything_that_is_said_of_rows_is_what_whole_logits_say(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    projection = Projection(families.subject(family, torch.float64))
    hidden, end = streams(projection.subject), streams(projection.subject, seed=1)
    check(projection, hidden, end, k=5)
    monkeypatch.setattr(module, "_HELD", 3 * 2 * GROUP * 8)  # three rows at a time,
    monkeypatch.setattr(module, "_SWEPT", 2 * 2 * GROUP * 8)  # swept two by two
    check(projection, hidden, end, k=5)


def test_all_words_can_be_asked_for() -> None:
    projection = Projection(families.subject("gpt2", torch.float64))
    check(projection, streams(projection.subject), streams(projection.subject, seed=1), k=families.VOCABULARY)


@pytest.mark.parametrize("family", ["gpt2", "phi", "gemma2"])
def test_a_familys_factor_on_its_logits_counts(family: str) -> None:
    projection = Projection(families.subject(family, torch.float64))
    projection.readout = replace(projection.readout, multiplier=0.25)
    hidden, end, wanted = streams(projection.subject), streams(projection.subject, seed=1), targets()
    with torch.no_grad():
        lens, last = (log_probabilities(projection.readout.capped(projection.readout.logits(some))) for some in (hidden, end))
        rows, ends = projection.readout.rows(hidden), projection.readout.rows(end)
    final = projection.final(ends)
    said = projection.read(rows, wanted, entropy=True, final=final)
    torch.testing.assert_close(said.top_log_probability, lens.topk(5).values, **CLOSE)
    torch.testing.assert_close(said.kl, (last.exp() * (last - lens)).sum(-1), **CLOSE)
    torch.testing.assert_close(projection.loss(rows, final)[0], said.kl, **CLOSE)


@torch.no_grad()
def test_a_parts_share_has_neither_shift_nor_bias_nor_cap(family: str) -> None:
    projection = Projection(families.subject(family, torch.float64))
    part, end, readout = streams(projection.subject), streams(projection.subject, seed=1), projection.readout
    scale = projection.scale(end)
    everything = torch.arange(families.VOCABULARY)
    share = log_probabilities(part @ readout.directions(everything).T * scale)  # the readout's own account of a part
    last = log_probabilities(readout.capped(readout.logits(end)))
    said = projection.read(projection.frozen(part, scale, part=True), entropy=True, final=projection.final(readout.rows(end)), part=True)
    torch.testing.assert_close(said.top_log_probability, share.topk(5).values, **CLOSE)
    torch.testing.assert_close(said.kl, (last.exp() * (last - share)).sum(-1), **CLOSE)


def test_rows_frozen_at_their_own_scale_read_as_they_are(family: str) -> None:
    projection = Projection(families.subject(family, torch.float64))
    hidden = streams(projection.subject)
    frozen = projection.frozen(hidden, projection.scale(hidden), part=False)
    torch.testing.assert_close(frozen, projection.readout.rows(hidden), **CLOSE)


def test_the_final_distribution_diverges_from_itself_by_nothing_at_all() -> None:
    for family in ("gpt2", "gemma2"):
        projection = Projection(families.subject(family, torch.float32))
        with torch.no_grad():
            rows = projection.applied(streams(projection.subject))
        final = projection.final(rows)
        kl = projection.read(rows, final=final).kl
        assert kl is not None
        assert kl.abs().max() < 5e-7


def test_equal_logits_are_ranked_by_their_ids() -> None:
    projection = Projection(families.subject("gpt2", torch.float64))
    nothing = torch.zeros(4, projection.subject.anatomy.d_model, dtype=torch.float64)
    wanted = torch.tensor([0, 7, 96, -1])
    said = projection.read(nothing, wanted, ranks=True, entropy=True, k=1)
    assert said.rank is not None
    assert said.rank.tolist() == [1, 8, 97, 0]
    torch.testing.assert_close(said.entropy, torch.full((4,), 97.0, dtype=torch.float64).log(), **CLOSE)


@pytest.mark.parametrize("places", [(0, 1, 2, 3, 4), (0, 64, 128, 192, 256), (63, 64, 199, 200, 299)])
def test_the_largest_are_found_wherever_they_stand(places: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator, dtype=torch.float64)
    logits[:, list(places)] += torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0], dtype=torch.float64) * 10
    padded = torch.nn.functional.pad(logits, (0, -len(logits[0]) % GROUP), value=-torch.inf)
    found, normaliser = said_of(padded, 300, None, k=5, ranks=False, entropy=False)
    assert found.top.tolist() == [list(places)] * 6
    torch.testing.assert_close(normaliser, logits.logsumexp(-1), **CLOSE)


def test_logits_of_any_size_neither_overflow_nor_vanish() -> None:
    logits = torch.randn(2, 2 * GROUP, generator=torch.Generator().manual_seed(0)) + torch.tensor([[900.0], [-900.0]])
    found, normaliser = said_of(logits, 2 * GROUP, None, k=1, ranks=False, entropy=True)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(normaliser.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy.double(), -(expected.exp() * expected).sum(-1), rtol=0, atol=2e-3)


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_the_derivative_of_the_loss_is_that_of_autograd(family: str, multiplier: float) -> None:
    projection = Projection(families.subject(family, torch.float64))
    readout = projection.readout = replace(projection.readout, multiplier=multiplier)
    rows, ends = (readout.rows(streams(projection.subject, seed=seed)).detach() for seed in (0, 1))
    rows.requires_grad_()
    logits, last = ((some @ readout.weight.T + (0 if readout.bias is None else readout.bias)) * readout.multiplier for some in (rows, ends))
    lens, final = readout.capped(logits).log_softmax(-1), readout.capped(last).log_softmax(-1)
    kl = (final.exp() * (final - lens)).sum(-1)
    (expected,) = torch.autograd.grad(kl.sum(), rows)
    found, gradient = projection.loss(rows.detach(), projection.final(ends))
    torch.testing.assert_close(found, kl.detach(), **CLOSE)
    torch.testing.assert_close(gradient, expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
@torch.no_grad()
def test_half_precision_is_measured_in_float32(family: str) -> None:
    subject = load(families.build(family, torch.bfloat16))
    projection = Projection(subject)
    hidden, end, wanted = streams(subject), streams(subject, seed=1), targets()
    lens, last = (log_probabilities(unembed(subject, some)) for some in (hidden, end))  # of the model's own coarse logits
    final = projection.final(projection.applied(end))
    said = projection.read(projection.applied(hidden), wanted, ranks=True, entropy=True, final=final)
    assert said.kl is not None
    assert said.kl.dtype == torch.float32
    torch.testing.assert_close(said.kl.double(), (last.exp() * (last - lens)).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said.entropy, -(lens.exp() * lens).sum(-1).float(), rtol=1e-4, atol=1e-4)
    assert said.rank is not None
    assert said.rank.tolist() == slow_ranks(unembed(subject, hidden).float(), wanted)


def test_no_more_rows_are_held_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    projection = Projection(families.subject("gpt2", torch.float32))
    monkeypatch.setattr(module, "_HELD", 4 * 2 * GROUP * 4)
    held = [(where, logits.untyped_storage().nbytes()) for where, logits in projection._chunks(streams(projection.subject))]
    assert [(where.start, where.stop) for where, _ in held] == [(0, 4), (4, 8), (8, 11)]
    assert {size for _, size in held} == {4 * 2 * GROUP * 4}


def test_what_cannot_be_asked_is_refused_with_what_can() -> None:
    projection = Projection(families.subject("gpt2", torch.float64))
    with pytest.raises(SettingsError, match="ask for 1 to 97"):
        projection.read(streams(projection.subject), k=98)
    with pytest.raises(SettingsError, match="give a target token per row"):
        projection.read(streams(projection.subject), ranks=True)
