"""What is active on known tokens is explained by just these and scores 1, another unit's explanation by chance; questions to a model are kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.features import Dictionary, ExplainSettings, Rule, autoencoder
from mechscope.features.explain import Baseline, Endpoint, EndpointError, Evidence, Explanation, LocalModel, Window, explain, gather, score
from mechscope.features.explain.chat import Chat, listed
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
    halves = [{window: pair for pair in pairs.pairs[at::2] for window in _windows(pair.clean)} for at in (0, 1)]
    places = set[int]()
    for latent, each in enumerate(evidence):
        for windows, half, active in (
            (each.train, halves[0], True),
            (each.train_silent, halves[0], False),
            (each.test, halves[1], True),
            (each.test_silent, halves[1], False),
        ):
            assert len(windows) == (8 if half is halves[0] else 10)
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


# a judge in words


class Scripted(Chat):
    """Answers from a list."""

    def __init__(self, *answers: str) -> None:
        super().__init__("scripted", families.tokenizer())
        self._answers = list(answers)

    def generate(self, messages: Any, *, tokens: int) -> str:
        return self._answers.pop(0)


def test_a_model_is_sent_windows_with_marks_and_its_lists_are_read() -> None:
    windows = [Window((4, 5, 6, 7), (0.0, 2.0, 4.0, 0.0)), Window((8, 9, 4, 4), (0.0,) * 4)]
    judge = Scripted("w5 and  w6\n", "[1, 0]", "I think [0,1]", "no idea", "[0, 5, 10, 0]", "[1, 2]", "[2]")
    explanation = judge.explain(Evidence("resid0.f0", 8, 2, tuple(windows[:1]), (), (), ()))
    assert explanation.text == "w5 and w6"
    assert judge.detect(explanation, windows) == [True, False]
    assert judge.fuzz(explanation, windows, [[1], [0, 3]]) == [False, True]
    assert judge.fuzz(explanation, windows, [[1], [0, 3]]) == [None, None]
    assert judge.simulate(explanation, windows) == [[0, 5, 10, 0], None]
    assert judge.intrude(explanation, windows) == 1
    sent = judge.taken()
    assert [each.purpose for each in sent] == ["explanation", "detection", "fuzzing", "fuzzing", "simulation", "simulation", "intruder"]
    asked = sent[0].messages[1]["content"]
    assert "1: w4«w5 w6»w7" in asked.replace(" «", "«").replace("» ", "»")
    assert "(w5 5, w6 10)" in asked
    marked = sent[2].messages[1]["content"].replace(" «", "«").replace("» ", "»")
    assert "1: w4«w5»w6 w7" in marked
    assert "2:«w8»w9 w4«w4»" in marked.replace("2: ", "2:")
    # an intruder is sought without an explanation
    assert "w5 and w6" not in sent[-1].messages[1]["content"]
    assert judge.taken() == []


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[1, 0, 1]", [1, 0, 1]),
        ("First [2] and then [1,0,0].", [1, 0, 0]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[1, 0, yes]", None),
        ("[1, 0, -1]", None),
        ("1, 0, 1", None),
        ("", None),
    ],
)
def test_only_a_list_of_the_right_length_is_read(answer: str, found: list[int] | None) -> None:
    assert listed(answer, 3, 1) == found


# an endpoint

Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


@contextmanager
def endpoint(answer: Answer) -> Iterator[tuple[str, list[tuple[str, dict[str, str], dict[str, Any]]]]]:
    """Serve chat completions here; yields the address and what was received: path, headers, body."""
    received: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.path, dict(self.headers), body))
            code, content = answer(body)
            self.send_response(code)
            if code == 302:
                self.send_header("Location", content.decode())
            # more than there is, where the connection is to break off
            self.send_header("Content-Length", str(len(content) + (9 if content.endswith(b"CUT") else 0)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", received
    finally:
        server.shutdown()
        server.server_close()


def completion(text: str) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def test_an_endpoint_is_sent_what_the_protocol_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with endpoint(lambda body: completion(" [1] ")) as (url, received):
        asked = Endpoint(f"{url}/", "small", families.tokenizer(), seed=7)
        assert asked.generate([{"role": "user", "content": "?"}], tokens=9) == "[1]"
    ((path, headers, body),) = received
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {"model": "small", "messages": [{"role": "user", "content": "?"}], "temperature": 0, "max_tokens": 9, "seed": 7}


@pytest.mark.parametrize(
    ("answers", "message", "asked"),
    [
        ([(500, b"overloaded")] * 4, "it says 500 Internal Server Error overloaded", 4),
        ([(401, b'{"error": "no key"}')], "it says 401 Unauthorized .*no key", 1),
        ([(200, b"<html>")], r"its answer is no chat completion \(JSONDecodeError", 1),
        ([(200, b'{"choices": []}')], r"its answer is no chat completion \(IndexError", 1),
        ([(200, b'{"choices": [{"message": {"content": null}}]}')], "no text in it", 1),
    ],
)
def test_an_endpoint_that_does_not_answer_gives_one_clear_line(answers: list[tuple[int, bytes]], message: str, asked: int) -> None:
    left, waited = list(answers), list[float]()
    with endpoint(lambda body: left.pop(0)) as (url, received):
        judge = Endpoint(url, "small", None, pause=waited.append)
        with pytest.raises(EndpointError, match=message) as error:
            judge.generate([], tokens=1)
    assert len(received) == asked
    assert len(waited) == asked - 1
    assert "\n" not in str(error.value)
    # nobody is there any more
    with pytest.raises(EndpointError, match="refused"):
        judge.generate([], tokens=1)


def test_the_key_and_the_texts_stay_with_the_endpoint_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    with (
        endpoint(lambda body: completion("yes")) as (elsewhere, gone),
        endpoint(lambda body: (302, elsewhere.encode())) as (url, received),
        pytest.raises(EndpointError, match="it says 302"),
    ):
        Endpoint(url, "small", None).generate([], tokens=1)
    assert len(received) == 1
    assert gone == []
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    with pytest.raises(SettingsError, match=r"^the key in the environment variable OPENAI_API_KEY has characters [a-z: ]+$"):
        Endpoint(url, "small", None)


@pytest.mark.parametrize("code", [200, 400])
def test_an_answer_that_breaks_off_gives_one_clear_line(code: int) -> None:
    with endpoint(lambda body: (code, b"CUT")) as (url, _), pytest.raises(EndpointError, match=r"does not answer: .*(Incomplete|400)"):
        Endpoint(url, "small", None, pause=lambda seconds: None).generate([], tokens=1)


@pytest.mark.parametrize(
    "url", ["http://", "http://h:x/v1", "http://h:0/v1", "http://h:99999/v1", "http://h/v1?a=b", "http://h/v 1", "http://[h/v1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="is no address of http"):
        Endpoint(url, "small", None)
    with pytest.raises(SettingsError, match="holds a user's name or password") as error:
        Endpoint("http://me:hidden@h/v1", "small", None)
    assert "hidden" not in str(error.value)


def test_a_busy_endpoint_is_asked_again() -> None:
    left = [(429, b""), (503, b""), completion("yes")]
    with endpoint(lambda body: left.pop(0)) as (url, _):
        assert Endpoint(url, "small", None, pause=lambda seconds: None).generate([], tokens=1) == "yes"


def test_nothing_finished_is_lost_when_the_endpoint_goes_down(evidence: list[Evidence]) -> None:
    answered = 0

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        nonlocal answered
        answered += 1
        asked = body["messages"][1]["content"]
        count = asked.count("\n1: ") and len([line for line in asked.splitlines() if line[:2] in {f"{n}:" for n in range(1, 6)}])
        return completion("a token" if "in common" in asked else str([1] * count)) if answered <= 12 else (400, b"gone")

    kept: dict[str, Any] = {}
    with endpoint(answer) as (url, received):
        judge = Endpoint(url, "small", families.tokenizer())
        with pytest.raises(EndpointError, match="gone"):
            explain(evidence, judge, scorers=["detection"], kept=kept)
        # three explanations, two units of four questions, and one begun
        assert sorted(kept) == [
            "resid1.f0 explanation",
            "resid1.f0 scores",
            "resid1.f1 explanation",
            "resid1.f1 scores",
            "resid1.f2 explanation",
        ]
        before = len(received)
        answered = -100
        judge = Endpoint(url, "small", families.tokenizer())
        found = explain(evidence, judge, scorers=["detection"], kept=kept)
        # what is left: one unit, and the control of three
        assert len(received) - before == 4 + 3 * 4
    own = found.scores[found.scores["control"] == ""]
    # who says yes to all is right by chance
    assert own["score"].tolist() == [0.5, 0.5, 0.5]
    assert (own["unreadable"] == 0).all()
    assert len(found.sent) == 3 + 3 * 4 * 2
    assert found.sent.query("purpose == 'explanation'")["answer"].tolist() == ["a token"] * 3


def test_a_local_model_answers_from_its_own_text(planted: tuple[Subject, Dictionary]) -> None:
    subject = load(families.build("llama"), tokenizer=families.tokenizer())
    judge = LocalModel(subject, planted[0].tokenizer)
    question = [{"role": "user", "content": "w4 w5 w6"}]
    answer = judge.generate(question, tokens=5)
    ids = torch.tensor([subject.tokenizer("w4 w5 w6\n\nAnswer:")["input_ids"]])
    made = subject.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer == subject.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    # a question that is too long keeps its end
    assert judge.generate([{"role": "user", "content": "w4 " * 500}], tokens=5)
    with pytest.raises(ModelError, match="has no tokenizer"):
        LocalModel(families.subject("llama"), None)


def test_what_cannot_be_asked_is_refused(planted: tuple[Subject, Dictionary]) -> None:
    with pytest.raises(SettingsError, match="scorer 'guess' is not known"):
        scorers_of("detection,guess")
    with pytest.raises(SettingsError, match="no scorer is named"):
        scorers_of(",")
    assert scorers_of("intruder, detection") == ("detection", "intruder")
    with pytest.raises(SettingsError, match="is no address of http"):
        Endpoint("ftp://there", "small", None)
    with pytest.raises(DataError, match="cannot be halved"):
        gather(Latents(*planted, many()), many().first(1))
