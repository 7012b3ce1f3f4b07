"""Examples are the largest values of each latent, one of a text; promoted tokens are those that the model's own readout adds to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechscope.errors import ModelError, SettingsError
from mechscope.features.examples import promoted_tokens, top_examples
from mechscope.features.layout import autoencoder, transcoder
from mechscope.features.rules import Rule
from mechscope.instrument import Execution
from tests import families
from tests.features import oracle
from tests.features.test_harvest import texts
from tests.features.test_measures import ALL, LENGTHS, M, W, every_family, given, kept_rows
from tests.features.test_splice import made


@every_family
@pytest.mark.parametrize("tokens_per_batch", [10_000, 30])
def test_examples_are_the_largest_values_of_each_text(family: str, tokens_per_batch: int) -> None:
    subject, pairs, dictionary = families.subject(family), texts(LENGTHS), given()
    found = top_examples(subject, dictionary, pairs, count=3, tokens=ALL, execution=Execution(tokens_per_batch=tokens_per_batch))
    # texts by latents: the largest value of a text, and where; the first token of each text was left out
    codes = [oracle.encode(dictionary, [x]) for x in kept_rows(subject, dictionary, pairs)[0]]
    largest = torch.stack([f.max(0).values for f in codes]).double().numpy()
    where = torch.stack([f.max(0).indices for f in codes]).numpy() + 1
    np.testing.assert_allclose(found.energy, sum(f.double().square().sum(0).numpy() for f in codes), rtol=1e-5, atol=1e-9)
    assert found.tokens == sum(len(f) for f in codes)
    by_latent = dict(tuple(found.table.groupby("latent")))
    for latent in range(M):
        order = [text for text in np.argsort(-largest[:, latent], kind="stable") if largest[text, latent] > 0][:3]
        if not order:
            assert latent not in by_latent
            continue
        rows = by_latent[latent]
        assert rows["rank"].tolist() == list(range(1, len(order) + 1))
        assert rows["text"].tolist() == order
        assert rows["position"].tolist() == [where[text, latent] for text in order]
        np.testing.assert_allclose(rows["value"], largest[order, latent], rtol=1e-4)
    assert found.strongest(4) == np.argsort(-found.energy, kind="stable")[:4].tolist()
    assert all(found.energy[latent] > 0 for latent in found.strongest(M))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
def test_promoted_tokens_are_read_off_the_models_own_norm_and_unembedding(family: str) -> None:
    subject, dictionary = families.subject(family, torch.float64), given().to(torch.float64)
    (up, down), (other, _) = promoted_tokens(subject, dictionary, [3, 8], k=5)
    d = dictionary.directions([3], dictionary.layout.outputs[0])[0].detach()
    # a stream along the direction, so long that the norm's scale no longer changes: what the model itself would predict of it
    norm, unembed = subject.anatomy.final_norm, subject.model.get_output_embeddings()
    assert norm is not None
    with torch.no_grad():
        logits = unembed(norm(1e6 * d)) - unembed(norm(0 * d))
    assert up == logits.topk(5).indices.tolist()
    assert down == (-logits).topk(5).indices.tolist()
    assert up != other


def test_what_cannot_be_asked_is_refused() -> None:
    subject, pairs = families.subject("gpt2"), texts(LENGTHS)
    with pytest.raises(SettingsError, match="at least one example"):
        top_examples(subject, given(), pairs, count=0)
    with pytest.raises(ModelError, match="has width 33 at resid1"):
        top_examples(subject, made(autoencoder("resid1", W + 1, M, Rule("topk", 8))), pairs)
    inside = made(autoencoder("m1.in", W, M, Rule("topk", 8)))
    with pytest.raises(SettingsError, match=r"writes m1\.in adds nothing to the residual stream"):
        promoted_tokens(subject, inside, [0])
    assert promoted_tokens(subject, made(transcoder(1, W, M, Rule("topk", 8))), [0], k=2)
