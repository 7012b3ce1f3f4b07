"""Edits write what is asked of the model's own keys, in its own forward pass, and nothing else of the model moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.edit import Delta, Request, Search, Setting, Spelled, alphaedit, applied, down_map, finetune, key_moments, memit, rome
from mechscope.edit.maps import shifted
from mechscope.edit.value import contexts, key_of, losses_of, shift_of
from mechscope.errors import DataError, ModelError
from mechscope.subject.load import Subject, load
from tests import families

REQUEST = Request("fact", "w9 w30", "w5 {} w12 w7", "w44 w45", "w20")
OTHER = Request("other", "w8 w31", "w6 {} w12", "w50", "w21")
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt"])


def made(family: str, dtype: torch.dtype = torch.float64) -> tuple[Subject, Setting]:
    """Return a tiny model with a tokenizer, and what edits of it share."""
    subject = load(families.build(family, dtype), tokenizer=families.tokenizer())
    documents = families.documents(seed=3, lengths=(20, 25, 30) * 6)
    texts = Pairs(tuple(PromptPair(str(at), tuple(text.tolist()), tuple(text.tolist())) for at, text in enumerate(documents)), "")
    moments = key_moments(subject, texts, layers=range(families.LAYERS))
    return subject, Setting.of(subject, moments, texts, number=3, search=Search(steps=12))


def weight(subject: Subject, layer: int) -> torch.Tensor:
    """Return a layer's last map as (output, input), by the parameter's name in the plain model."""
    here = down_map(subject, layer)
    own = subject.plain.get_parameter(here.parameter).detach().double()
    return own.T if type(here.module).__name__ == "Conv1D" else own


def plain_loss(subject: Subject, request: Request) -> float:
    """Return −log p of the target by a plain forward pass, the mean over its tokens."""
    words = request.text.split() + request.new.split()
    ids = torch.tensor([[int(word[1:]) for word in words]])
    targets = len(request.new.split())
    with torch.no_grad():
        logits = subject.plain(ids).logits[0].double().log_softmax(-1)
    at = range(ids.shape[1] - targets, ids.shape[1])
    return float(-sum(logits[place - 1, ids[0, place]] for place in at)) / targets


@FAMILIES
def test_rome_writes_the_value_for_the_key_and_moves_no_orthogonal_one(family: str) -> None:
    subject, setting = made(family)
    here, given = down_map(subject, 1), setting.contexts(subject, REQUEST)
    key = key_of(subject, here, given)
    # the key is what the plain model's map reads at the subject's last token, the mean over contexts
    seen: list[torch.Tensor] = []
    handle = here.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    for row, pair in enumerate(given.batch.pairs):
        with torch.no_grad():
            subject.plain(torch.tensor([pair.clean]))
        assert given.batch.clean[row, pair.segments["subject"][0][0]] == 30
    handle.remove()
    by_hand = torch.stack([rows[pair.segments["subject"][0][0]] for rows, pair in zip(seen, given.batch.pairs, strict=True)]).mean(0)
    torch.testing.assert_close(key, by_hand, rtol=1e-9, atol=1e-12)
    shift, losses = shift_of(subject, here, given, here.written(key[:, None])[:, 0], setting.search)
    assert losses[-1] < losses[0]
    delta = rome(subject, REQUEST, setting, layer=1)
    before = weight(subject, 1)
    c = setting.moments.mean(1, ridge=0.01)
    other = torch.randn(len(key), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = torch.linalg.solve(c, key)
    other = other - key * (other @ direction) / (key @ direction)
    with applied(subject, delta) as edited:
        after = weight(edited, 1)
        torch.testing.assert_close(after @ key, before @ key + shift, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after @ other, before @ other, rtol=1e-9, atol=1e-9)
        assert plain_loss(edited, REQUEST) < plain_loss(load(families.build(family, torch.float64)), REQUEST)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # norms of others compute in float32, too coarse for finite differences
def test_the_search_follows_the_gradient_of_the_loss(family: str) -> None:
    subject, setting = made(family)
    here, given = down_map(subject, 1), setting.contexts(subject, REQUEST)
    shift = 0.1 * torch.randn(families.WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift.requires_grad_(True)

    def loss(by: torch.Tensor) -> torch.Tensor:
        with shifted(here.module, given.batch.positions("subject"), by):
            return losses_of(subject, given.batch).mean()

    (gradient,) = torch.autograd.grad(loss(shift), shift)
    with torch.no_grad():
        for at in (0, 7, 31):
            step = torch.zeros_like(shift)
            step[at] = 1e-5
            assert float(loss(shift + step) - loss(shift - step)) / 2e-5 == pytest.approx(float(gradient[at]), rel=1e-4, abs=1e-8)


@FAMILIES
def test_the_loss_is_that_of_a_plain_forward_pass(family: str) -> None:
    subject, _ = made(family)
    batch = contexts(Spelled(subject.tokenizer), REQUEST, [(4, 5, 6)]).batch
    assert float(losses_of(subject, batch)[0].detach()) == pytest.approx(plain_loss(subject, REQUEST), rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_memit_shares_out_what_is_lacking_and_in_one_layer_is_rome_held_back(family: str) -> None:
    subject, setting = made(family)
    one = memit(subject, [REQUEST], setting, layers=[1], weight=2.0)
    (name,) = one.changes
    key = key_of(subject, down_map(subject, 1), setting.contexts(subject, REQUEST))
    length = float(key @ torch.linalg.solve(setting.moments.mean(1, ridge=0.01), key))
    whole = dense(rome(subject, REQUEST, setting, layer=1), name)
    torch.testing.assert_close(dense(one, name), whole * length / (2.0 + length), rtol=1e-6, atol=1e-8)
    spread = memit(subject, [REQUEST, OTHER], setting, layers=[0, 1], weight=1e-6)
    assert len(spread.changes) == 2
    assert spread.about["layers"] == [0, 1]
    before = [plain_loss(subject, request) for request in (REQUEST, OTHER)]
    with applied(subject, spread) as edited:
        assert [plain_loss(edited, request) < old for request, old in zip((REQUEST, OTHER), before, strict=True)] == [True, True]
    # heavier keys seen hold the change back
    heavy = memit(subject, [REQUEST], setting, layers=[1], weight=1e4)
    assert heavy.size(subject) < 0.1 * one.size(subject)


def test_alphaedit_stays_within_free_directions() -> None:
    subject, setting = made("gpt2")
    delta = alphaedit(subject, [REQUEST], setting, layers=[1], free=0.5, earlier=[OTHER])
    (name,) = delta.changes
    values, vectors = torch.linalg.eigh(setting.moments.mean(1))
    used = vectors[:, values >= 0.5 * values.mean()]
    change = dense(delta, name).T  # Conv1D keeps (input, output)
    assert float((change @ used).norm()) < 1e-6 * float(change.norm())
    # what is written for the fact's own key goes towards what is asked, and not beyond
    here, given = down_map(subject, 1), setting.contexts(subject, REQUEST)
    key = key_of(subject, here, given)
    shift, _ = shift_of(subject, here, given, here.written(key[:, None])[:, 0], setting.search)
    part = float((change @ key) @ shift / (shift @ shift))
    assert 0.05 < part <= 1
    torch.testing.assert_close(change @ key, part * shift, rtol=1e-6, atol=1e-9)


@FAMILIES
def test_fine_tuning_moves_no_weight_beyond_its_bound(family: str) -> None:
    subject, setting = made(family)
    delta = finetune(subject, REQUEST, setting, layer=2, bound=0.004, rate=0.003)
    (name,) = delta.changes
    assert float(dense(delta, name).abs().max()) == pytest.approx(0.004)
    before = plain_loss(subject, REQUEST)
    with applied(subject, delta) as edited:
        assert plain_loss(edited, REQUEST) < before


def dense(delta: Delta, name: str) -> torch.Tensor:
    """Return one change as a matrix, as it is stored."""
    own: Any = delta.changes[name]
    return own.double() if isinstance(own, torch.Tensor) else own.left.double() @ own.right.double().T


@pytest.mark.parametrize("method", [rome, finetune])
def test_bfloat16_is_solved_in_float64_and_rounded_once(method: Callable[..., Delta]) -> None:
    subject, setting = made("llama", torch.bfloat16)
    delta = method(subject, REQUEST, setting, layer=1)
    (name,) = delta.changes
    before = subject.plain.get_parameter(name).detach().clone()
    with applied(subject, delta):
        expected = (before.double() + dense(delta, name)).bfloat16()
        assert torch.equal(subject.plain.get_parameter(name).detach(), expected)
    assert torch.equal(subject.plain.get_parameter(name).detach(), before)


def test_what_cannot_be_edited_is_refused() -> None:
    subject, setting = made("gpt2")
    mixture = load(families.build("gpt_oss"), tokenizer=families.tokenizer())
    with pytest.raises(ModelError, match="mixture of 4 experts"):
        rome(mixture, REQUEST, setting, layer=0)
    normed = load(families.build("gemma2"), tokenizer=families.tokenizer())
    with pytest.raises(ModelError, match="a norm stands between the MLP of layer 0 and the residual stream"):
        memit(normed, [REQUEST], setting, layers=[0, 1])
    with pytest.raises(DataError, match="there is no fact"):
        memit(subject, [], setting, layers=[0])
    with pytest.raises(DataError, match="no tokenizer"):
        rome(load(families.build("gpt2")), REQUEST, setting, layer=0)
