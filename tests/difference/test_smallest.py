"""Smallest effects of interest: what a model differs from itself by in another precision, or what is set."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.data.prompt import Encoded
from mechscope.difference import difference, smallest, smallest_effects
from mechscope.difference.lockstep import HEAD_MEASURES, LAYER_MEASURES, OUTPUT_MEASURES
from mechscope.difference.smallest import QUANTITIES, precision_floor
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load
from tests import families
from tests.difference import oracle

NAMES = {"heads": HEAD_MEASURES, "layers": LAYER_MEASURES, "outputs": OUTPUT_MEASURES}
MANY = tuple(10 + 3 * (index % 7) for index in range(24))


@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_floor_is_the_worst_place_of_the_model_against_itself(family: str, dtype: torch.dtype, other: torch.dtype) -> None:
    model = families.build(family).to(dtype)
    floors = precision_floor(load(model), oracle.examples())
    # by the oracle's whole maps, a document at a time; bfloat16's own rounding is the same, but for the order of sums
    truth = oracle.compare(copy.deepcopy(model).float(), copy.deepcopy(model).to(torch.bfloat16).float(), family, oracle.examples())
    assert set(floors) == {(one.table, one.name) for one in QUANTITIES}
    for one in QUANTITIES:
        values = getattr(truth, one.table)[:, :, NAMES[one.table].index(one.name)]
        rounding_of_weights = np.abs(np.nanmean(values, axis=0)).max()
        # what the arithmetic adds to the rounding of the weights is of their size: more than nothing, no more than a hundred times
        assert 0 < floors[one.table, one.name] < 1.0
        if dtype == torch.float32:
            assert floors[one.table, one.name] > rounding_of_weights / 10, one


def test_smallest_effects_are_twice_the_floor_or_what_is_set() -> None:
    subject = load(families.build("llama"))
    effects = smallest_effects(subject, oracle.examples(), given={("heads", "entropy_change"): 0.25}, documents=3)
    table = effects.table
    assert list(table.columns) == ["table", "quantity", "smallest", "unit", "source", "floor", "n"]
    assert (table["n"] == 3).all()
    measured = table[table["source"] == "twice what the base model differs by in bfloat16 against float32"]
    assert len(measured) == len(QUANTITIES) - 1
    np.testing.assert_allclose(measured["smallest"], 2 * measured["floor"])
    assert effects["heads", "entropy_change"] == 0.25
    assert dict(effects)["layers", "mlp_write_change"] == effects["layers", "mlp_write_change"] > 1e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({("heads", "distance"): 0.1}, r"smallest effect 0.1 of heads.distance: give a number above zero for one of heads.entropy_change"),
        ({("heads", "write_change"): 0.0}, r"smallest effect 0.0 of heads.write_change"),
    ],
)
def test_what_is_no_quantity_or_no_size_is_refused(given: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        smallest_effects(load(families.build("gpt2")), oracle.examples(), given=given)


def test_a_model_that_does_not_fit_twice_has_no_smallest_effects_and_no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smallest, "free_memory", lambda device: 1000)
    both = oracle.models("gpt2")
    effects = smallest_effects(both.base, oracle.examples())
    assert effects.table["smallest"].isna().all()
    assert effects.table["source"].str.startswith("not measured").all()
    found = difference(both, oracle.encoded(), replicates=2, smallest=effects)
    verdicts = [table[name] for table in (found.heads, found.layers, found.outputs) for name in table if str(name).endswith("_verdict")]
    assert len(verdicts) == len(QUANTITIES)
    assert set(pd.concat(verdicts)) == {"not measured"}


def test_an_adapter_s_base_is_measured_without_it() -> None:
    from peft import LoraConfig, get_peft_model

    plain = families.build("llama")
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    tuned = load(model)
    found, expected = (precision_floor(base, oracle.examples()[:2]) for base in (tuned.without_adapter(), load(plain)))
    assert found == pytest.approx(expected, rel=1e-6)


def judged(tuned: torch.nn.Module, base: torch.nn.Module) -> dict[tuple[str, str], set[str]]:
    both = oracle.two(base, tuned)
    documents = oracle.encoded(lengths=MANY)
    effects = smallest_effects(both.base, documents.examples)
    found = difference(both, documents, replicates=2, smallest=effects, execution=Execution(tokens_per_batch=4096))
    tables = {"heads": found.heads, "layers": found.layers, "outputs": found.outputs}
    every = {name: table[table["rows"] == "all"] for name, table in tables.items()}
    return {(one.table, one.name): set(every[one.table][f"{one.name}_verdict"]) for one in QUANTITIES}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_model_twice_is_negligible_everywhere(family: str) -> None:
    base = families.build(family)
    assert set().union(*judged(copy.deepcopy(base), base).values()) == {"negligible"}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_same_model_in_bfloat16_did_not_change(family: str) -> None:
    base = families.build(family)
    found = judged(copy.deepcopy(base).bfloat16(), base)
    assert "changed" not in set().union(*found.values()), found


def test_a_large_change_is_one() -> None:
    base = families.build("llama")
    found = judged(oracle.perturbed(base, 0.3), base)
    for key in (("heads", "write_change"), ("layers", "mlp_write_change"), ("layers", "cosine_distance"), ("outputs", "kl_base_tuned")):
        assert found[key] == {"changed"}, key


def test_what_is_measured_does_not_hang_on_the_smallest_effects() -> None:
    both, documents = oracle.models("gpt2"), Encoded(oracle.examples(lengths=MANY), {})
    effects = smallest_effects(both.base, documents.examples)
    one, other = (
        difference(both, documents, replicates=2, smallest=given, execution=replace(Execution(), seed=1)) for given in (None, effects)
    )
    for name in ("heads", "layers", "outputs"):
        first, second = (getattr(found, name) for found in (one, other))
        same = [column for column in first if not column.endswith("_verdict")]
        pd.testing.assert_frame_equal(first[same], second[same], check_exact=True)
        assert not first.drop(columns=same).equals(second.drop(columns=same))
