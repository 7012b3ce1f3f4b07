"""What is active on known tokens is explained by just these and scores 1, another unit's explanation by chance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, SettingsError
from mechscope.features import Dictionary, ExplainSettings, Rule, autoencoder
from mechscope.features.explain import Baseline, Endpoint, Evidence, Explanation, Window, explain, gather, halves, score
from mechscope.features.explain.explaining import CONTROL, scorers_of
from mechscope.features.observed import Heads, Latents, Neurons
from mechscope.instrument import Execution
from mechscope.subject import Subject
from mechscope.subject.load import load
from tests import families
from tests.features.test_harvest import texts

SETTINGS = ExplainSettings(examples=8, windows=10, window=8, longest=2)
TOKENS = {0: (11,), 1: (23, 40), 2: (60,)}


@pytest.fixture(scope="module")
def planted() -> tuple[Subject, Dictionary]:
    """Return a model whose residual stream is the embedding, and latents that are active on known tokens alone, each as strong as its token is."""
    model = families.build("gpt2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "wpe" in name:
                parameter.zero_()
        rows = torch.randn(families.VOCABULARY, families.WIDTH, generator=torch.Generator().manual_seed(0))
        model.transformer.wte.weight.copy_(rows / rows.norm(dim=1, keepdim=True))
    layout = autoencoder("resid1", families.WIDTH, len(TOKENS), Rule("relu"))
    tensors = layout.tensors()
    # what is active on two tokens reads their sum, which no other token comes near
    directions = torch.stack([model.transformer.wte.weight[list(tokens)].sum(0) for tokens in TOKENS.values()]).detach()
    products = model.transformer.wte.weight @ directions.T
    for latent, tokens in TOKENS.items():
        others = torch.ones(families.VOCABULARY, dtype=torch.bool)
        others[list(tokens)] = False
        assert products[others, latent].max() < products[list(tokens), latent].min()
        tensors["encoder_bias"][latent] = -(products[others, latent].max() + products[list(tokens), latent].min()) / 2
    tensors["encoder.0"] = directions.clone()
    return load(model, tokenizer=families.tokenizer()), Dictionary.plain(layout, tensors)


def many(seed: int = 0) -> Pairs:
    return texts((30,) * 120, seed=seed)


@pytest.fixture(scope="module")
def evidence(planted: tuple[Subject, Dictionary]) -> list[Evidence]:
    subject, dictionary = planted
    return gather(Latents(subject, dictionary, many()), many(), settings=SETTINGS, execution=Execution(seed=1))


def test_planted_tokens_are_found_and_score_one_and_anothers_explanation_scores_by_chance(
    planted: tuple[Subject, Dictionary], evidence: list[Evidence]
) -> None:
    found = explain(evidence, Baseline(planted[0].tokenizer, longest=2), execution=Execution(seed=2))
    spelled = [[f"“{planted[0].tokenizer.decode([token])}”" for token in tokens] for tokens in TOKENS.values()]
    for text, words in zip(found.explanations["explanation"], spelled, strict=True):
        assert sorted(text.removeprefix("the token").removeprefix("s").strip().split(", ")) == sorted(words)
    scores = found.scores.pivot(index="component", columns=["control", "scorer"], values="score")
    for scorer in ("detection", "fuzzing", "intruder"):
        assert (scores["", scorer] == 1).all()
    assert (scores["", "simulation"] > 0.9).all()
    # a unit on two tokens of different strength is not constant where it is active; those of one are
    assert scores["", "simulation"]["resid1.f0"] == pytest.approx(1)
    for scorer, chance, slack in (("detection", 0.5, 0.15), ("fuzzing", 0.5, 0.1), ("simulation", 0.0, 0.15), ("intruder", 0.2, 0.35)):
        assert scores[CONTROL, scorer].mean() == pytest.approx(chance, abs=slack), scorer
    assert (found.scores["unreadable"] == 0).all()
    assert found.sent.empty
    summary = found.summary.set_index(["control", "scorer"])
    assert summary.loc[("", "detection"), "score"] == 1
    assert summary.loc[("", "detection"), "n"] == 3


def test_latents_are_judged_by_explanations_of_their_own_dictionary(evidence: list[Evidence]) -> None:
    # two dictionaries with the same latents: one's explanation is right of the other's
    both = [replace(each, dictionary=name) for name in ("a", "b b") for each in evidence[:2]]
    for seed in range(4):
        found = explain(both, Baseline(), scorers=("detection",), execution=Execution(seed=seed))
        scores = found.scores.set_index(["dictionary", "component", "control"])["score"]
        for each in both:
            assert scores[(*each.key, "")] == 1
            assert scores[(*each.key, CONTROL)] < 0.8
    assert found.summary[["dictionary", "control", "n"]].to_numpy().tolist() == [
        ["a", "", 2],
        ["b b", "", 2],
        ["a", CONTROL, 2],
        ["b b", CONTROL, 2],
    ]


def test_shuffled_labels_score_by_chance(evidence: list[Evidence]) -> None:
    random, values = np.random.default_rng(0), []
    baseline = Baseline()
    for each in evidence * 8:
        windows = [*each.test, *each.test_silent]
        order = random.permutation(len(windows))
        half = len(each.test)
        mixed = Evidence(
            each.unit, each.tokens, each.active, each.train, each.train_silent,
            tuple(windows[at] for at in order[:half]), tuple(windows[at] for at in order[half:]),
        )  # fmt: skip
        (found,) = score(baseline, baseline.explain(each), mixed, ["detection"])
        values.append(found.value)
    assert np.mean(values) == pytest.approx(0.5, abs=0.06)


def test_no_text_is_on_both_sides_and_windows_are_what_the_unit_does(planted: tuple[Subject, Dictionary], evidence: list[Evidence]) -> None:
    pairs = many()
    sides = [{window for pair in half for window in _windows(pair.clean)} for half in halves(pairs, 1)]
    places = set[int]()
    for latent, each in enumerate(evidence):
        for windows, half, active in (
            (each.train, sides[0], True),
            (each.train_silent, sides[0], False),
            (each.test, sides[1], True),
            (each.test_silent, sides[1], False),
        ):
            assert len(windows) == (8 if half is sides[0] else 10)
            for window in windows:
                assert window.ids in half
                assert len(window.ids) == 8
                # active on its tokens and nowhere else
                assert window.active == tuple(at for at, token in enumerate(window.ids) if token in TOKENS[latent])
                assert bool(window.active) is active
                places.update(window.active[:1])
        assert each.tokens == 120 * 29
        assert each.active == sum(token in TOKENS[latent] for pair in pairs for token in pair.clean[1:])
    # the token stands anywhere in its window
    assert len(places) == 8


def test_texts_that_come_twice_are_in_one_half(planted: tuple[Subject, Dictionary]) -> None:
    # each beside its double, as where every other one is held out
    pairs = Pairs(tuple(pair for pair in many() for _ in range(2)), "doubled")
    first, second = halves(pairs, 1)
    assert not {pair.clean for pair in first} & {pair.clean for pair in second}
    assert len(first) == len(second) == 120
    for each in gather(Latents(*planted, pairs), pairs, settings=SETTINGS, execution=Execution(seed=1)):
        made, judged = ({window.ids for window in windows} for windows in (each.train + each.train_silent, each.test + each.test_silent))
        assert not made & judged
        assert judged <= {window for pair in second for window in _windows(pair.clean)}


def _windows(ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [ids[at : at + 8] for at in range(1, len(ids) - 7)]


def test_a_unit_that_follows_two_tokens_is_explained_by_both() -> None:
    # active on token 5 behind token 4 only
    random = np.random.default_rng(0)
    windows = []
    for number in range(40):
        ids = random.integers(10, 50, 12)
        ids[3], ids[8] = 5, 5
        if number % 2:
            ids[2] = 4
        windows.append(Window(tuple(map(int, ids)), tuple(float(at == 3 and number % 2) for at in range(12))))
    evidence = Evidence("resid0.f0", 480, 20, tuple(windows[1:20:2]), tuple(windows[:20:2]), tuple(windows[21::2]), tuple(windows[20::2]))
    baseline = Baseline(longest=2)
    found = baseline.explain(evidence)
    assert dict(found.grams) == {(4, 5): 1.0}
    assert [one.value for one in score(baseline, found, evidence, ["detection", "simulation", "intruder"])] == [1, 1, 1]
    alone = Baseline(longest=1).explain(evidence)
    assert (4, 5) not in alone.grams


def test_scores_are_shares_with_wilsons_intervals_and_what_is_unreadable_is_wrong(evidence: list[Evidence]) -> None:
    class Half(Baseline):
        """Answers every other question, and is right."""

        def detect(self, explanation: Explanation, windows: Any) -> list[bool | None]:
            return [bool(window.active) if at % 2 else None for at, window in enumerate(windows)]

        def simulate(self, explanation: Explanation, windows: Any) -> list[list[float] | None]:
            return [list(window.values) if window.active else None for window in windows]

    half = Half()
    detection, simulation = score(half, Explanation(""), evidence[0], ["detection", "simulation"])
    assert detection.unreadable == 0.5
    assert detection.value == pytest.approx(0.5, abs=0.2)
    assert 0 <= detection.low < detection.value < detection.high <= 1
    assert simulation.unreadable == 0.5
    assert simulation.value == pytest.approx(1)
    few = Evidence("resid1.f0", 1, 1, (), (), evidence[0].test[:4], evidence[0].test_silent)
    (withheld,) = score(half, Explanation(""), few, ["detection"])
    assert withheld.withheld == "too few held-out windows: 4 windows in which it is active, of at least 5"
    assert np.isnan(withheld.value)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_neurons_and_heads_are_explained_too(family: str) -> None:
    subject, pairs = families.subject(family), texts((30,) * 60)
    for observed in (Neurons(subject, ["m1.n3", "m1.n4"], pairs, share=0.05), Heads(subject, ["a1.h2", "a0.h0"], pairs, share=0.05)):
        evidence = gather(observed, pairs, settings=SETTINGS)
        found = explain(evidence, Baseline(), scorers=["detection", "simulation"])
        assert found.explanations["component"].tolist() == list(observed.names)
        assert found.explanations["density"].tolist() == pytest.approx([0.05, 0.05], abs=0.04)
        own = found.scores[found.scores["control"] == ""]
        assert own["score"].notna().all()


def test_what_cannot_be_asked_is_refused(planted: tuple[Subject, Dictionary]) -> None:
    with pytest.raises(SettingsError, match="scorer 'guess' is not known"):
        scorers_of("detection,guess")
    with pytest.raises(SettingsError, match="no scorer is named"):
        scorers_of(",")
    assert scorers_of("intruder, detection") == ("detection", "intruder")
    with pytest.raises(SettingsError, match="is no address of http"):
        Endpoint("ftp://there", "small", None)
    with pytest.raises(DataError, match="has 1 different text: some are learned from and others judged on, so give at least two"):
        gather(Latents(*planted, many()), Pairs(many().pairs[:1] * 2, "one"))
