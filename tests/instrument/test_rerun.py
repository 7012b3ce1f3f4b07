"""Running again from the middle gives what a whole forward pass with the same changes gives, for every family, site and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.instrument import CachedRun, Edit, Knockout, Reading, intervene, observed, unembed
from mechscope.instrument.edits import EDIT_SITES as ALL_SITES
from mechscope.instrument.walk import model_inputs
from mechscope.subject.load import Subject
from tests import families

# those of dense families; experts are in test_experts
EDIT_SITES = tuple(site for site in ALL_SITES if site not in ("expert_output", "mixer_output"))
TEXTS, OTHERS = families.documents(seed=0), families.documents(seed=1)
every_padding = pytest.mark.parametrize("padding", ["none", "left", "right"])
every_family = pytest.mark.parametrize("family", families.FAMILIES)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def whole(subject: Subject, texts: families.Texts, *changes: Any) -> Tensor:
    """Return the logits at real tokens of one ordinary forward pass with changes."""
    with observed(subject), intervene(subject, *changes):  # Gemma 2 alone would take its softmax in float32
        return subject.plain(**model_inputs(texts.ids, texts.real), use_cache=False).logits[texts.real]


def runs(subject: Subject, padding: str) -> tuple[families.Texts, CachedRun, CachedRun, Reading]:
    texts, others = families.padded(TEXTS, padding), families.padded(OTHERS, padding)
    clean, corrupt = (CachedRun(subject, x.ids, x.real, sites=EDIT_SITES) for x in (texts, others))
    return texts, clean, corrupt, Reading.of(texts.real)


def edit(site: Any, layer: int, source: CachedRun, **where: Any) -> Edit:
    return Edit(site, layer, source.recording[site, layer], **where)


def rerun(subject: Subject, prefix: CachedRun, reading: Reading, *units: Any, **options: Any) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for indices, hidden in prefix.rerun(units, reading, **options):
        found.update(zip(indices, unembed(subject, hidden).detach(), strict=True))
    return [found[index] for index in range(len(units))]


@every_padding
@every_family
def test_every_site_patched_in_the_middle_equals_a_whole_pass_with_the_same_patch(family: str, padding: str) -> None:
    subject = families.subject(family, torch.float64)
    texts, clean, corrupt, reading = runs(subject, padding)
    some = texts.real & (torch.arange(texts.ids.shape[1]) % 3 == 1)
    units = [
        (
            edit(
                site,
                layer,
                corrupt,
                positions=positions,
                **({"heads": (1, 2)} if site in ("query", "key", "value", "pattern", "z") else {}),
            ),
        )
        for site in EDIT_SITES
        for layer in ((0,) if site == "embedding" else (0, 2))
        for positions in (None, some)
    ]
    unchanged = whole(subject, texts)
    for unit, found in zip(units, rerun(subject, clean, reading, *units), strict=True):
        expected = whole(subject, texts, *unit)
        close(found, expected)
        assert (expected - unchanged).abs().max() > 1e-4, unit[0].site


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2", "opt", "phi"])
def test_changes_in_several_layers_and_sites_of_one_run_compose(family: str) -> None:
    subject = families.subject(family, torch.float64)
    texts, clean, corrupt, reading = runs(subject, "left")
    everywhere = texts.real
    units = [
        (edit("z", 0, corrupt, heads=(0,)), edit("mlp_output", 0, corrupt), edit("key", 2, corrupt, heads=(3,))),
        (
            edit("neuron", 1, corrupt, features=(3, 5)),
            edit("mlp_output", 1, corrupt, features=(0, 1)),
            edit("residual", 1, corrupt, features=(7,)),
        ),
        (
            edit("attention_output", 1, corrupt),
            edit("neuron", 2, corrupt, features=tuple(range(20))),
            edit("mlp_output", 2, corrupt, features=(4,)),
        ),
        (edit("embedding", 0, corrupt, features=(2, 3)), edit("z", 0, corrupt, heads=(1,)), edit("residual", 2, corrupt, features=(0,))),
        (
            Knockout(1, everywhere, everywhere & (torch.arange(everywhere.shape[1]) == 8), heads=(2,)),
            edit("pattern", 1, corrupt, heads=(1,)),
        ),
        (),
    ]
    for unit, found in zip(units, rerun(subject, clean, reading, *units), strict=True):
        close(found, whole(subject, texts, *unit))


@every_family
def test_patching_a_run_with_its_own_values_changes_nothing(family: str) -> None:
    subject = families.subject(family, torch.float64)
    texts, clean, _, reading = runs(subject, "left")
    units = [(edit(site, layer, clean),) for site in EDIT_SITES for layer in ((0,) if site == "embedding" else range(3))]
    for found in rerun(subject, clean, reading, *units):
        close(found, whole(subject, texts))


@every_family
def test_patching_everything_a_block_reads_gives_the_other_run(family: str) -> None:
    subject = families.subject(family, torch.float64)
    _, clean, corrupt, reading = runs(subject, "right")
    others = families.padded(OTHERS, "right")
    units = [(edit("embedding", 0, corrupt),), *[(edit("residual", layer, corrupt),) for layer in range(3)]]
    for found in rerun(subject, clean, reading, *units):
        close(found, whole(subject, others))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
def test_patching_all_sublayers_and_the_embedding_gives_the_other_run(family: str) -> None:
    subject = families.subject(family, torch.float64)
    _, clean, corrupt, reading = runs(subject, "none")
    unit = [edit("embedding", 0, corrupt)]
    unit += [edit(site, layer, corrupt) for layer in range(3) for site in ("attention_output", "mlp_output")]
    (found,) = rerun(subject, clean, reading, tuple(unit))
    close(found, whole(subject, families.padded(OTHERS, "none")))


def test_how_many_runs_share_a_pass_does_not_matter() -> None:
    subject = families.subject("qwen3", torch.float64)
    _, clean, corrupt, reading = runs(subject, "left")
    units = [(edit("z", layer, corrupt, heads=(head,)),) for layer in range(3) for head in range(4)]
    one_by_one = rerun(subject, clean, reading, *units, tokens_per_pass=1)
    for found, expected in zip(rerun(subject, clean, reading, *units, tokens_per_pass=10_000), one_by_one, strict=True):
        close(found, expected)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "phi"])
def test_reading_only_the_last_token_gives_the_same_rows(family: str) -> None:
    subject = families.subject(family, torch.float64)
    texts, clean, corrupt, _ = runs(subject, "left")
    last = torch.zeros_like(texts.real)
    last[:, -1] = True
    units = [(edit("z", layer, corrupt, heads=(1,)),) for layer in range(3)] + [
        (edit("mlp_output", 1, corrupt),),
        (edit("mlp_output", 2, corrupt),),
    ]
    for unit, found in zip(units, rerun(subject, clean, Reading.of(last), *units), strict=True):
        every = torch.zeros(*texts.ids.shape, found.shape[-1], dtype=torch.float64)
        every[texts.real] = whole(subject, texts, *unit)
        close(found, every[:, -1])


def test_the_model_is_as_before_after_a_sweep() -> None:
    subject = families.subject("llama", torch.float64)
    texts, clean, corrupt, reading = runs(subject, "none")
    before, hooks = whole(subject, texts), state(subject)
    rerun(subject, clean, reading, (edit("z", 0, corrupt),), (edit("attention_output", 1, corrupt), edit("mlp_output", 2, corrupt)))
    assert torch.equal(whole(subject, texts), before)
    assert state(subject) == hooks


def state(subject: Subject) -> list[Any]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks), vars(module).get("forward")) for module in subject.plain.modules()]


def test_a_site_that_was_not_kept_is_named() -> None:
    subject = families.subject("gpt2", torch.float64)
    texts = families.padded(TEXTS, "none")
    prefix = CachedRun(subject, texts.ids, texts.real)
    with pytest.raises(SettingsError, match="did not keep 'mlp_output': name the sites"):
        list(prefix.rerun([(Edit("mlp_output", 0, 0.0),)], Reading.of(texts.real)))
    with pytest.raises(SettingsError, match=r"did not keep attention: name the sites .* sites=\('z',\)"):
        list(prefix.rerun([(Edit("z", 0, 0.0),)], Reading.of(texts.real)))
