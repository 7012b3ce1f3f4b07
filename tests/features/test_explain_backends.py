"""A model that explains in words is sent windows with marks, its lists are read strictly, and an endpoint's failures lose nothing finished."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from mechscope.errors import ModelError, SettingsError
from mechscope.features.explain import Endpoint, EndpointError, Evidence, LocalModel, Window, explain
from mechscope.features.explain.chat import Chat, listed
from mechscope.subject.load import load
from tests import families


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


def test_nothing_finished_is_lost_when_the_endpoint_goes_down() -> None:
    # three units, of ten windows each in which they are active and ten in which they are not: four questions of five windows
    active, silent = [[Window(tuple(range(at, at + 8)), (value,) * 8) for at in range(10)] for value in (1.0, 0.0)]
    sides = tuple(active), tuple(silent)
    evidence = [Evidence(f"resid1.f{latent}", 160, 80, *sides, *sides) for latent in range(3)]
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


@pytest.mark.parametrize(
    "habits",
    [
        {},
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 4, "length_penalty": -5.0},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
    ],
)
def test_a_local_model_answers_greedily_whatever_its_generation_file_says(habits: dict[str, Any]) -> None:
    subject = load(families.build("llama"), tokenizer=families.tokenizer())
    subject.plain.generation_config = GenerationConfig(**habits)
    judge = LocalModel(subject, families.tokenizer())
    ids = subject.tokenizer("w4 w5 w6\n\nAnswer:")["input_ids"]
    answer = list[int]()
    for _ in range(8):
        with torch.no_grad():
            answer.append(int(subject.model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    # else that none of them is the end proves nothing
    assert subject.tokenizer.eos_token_id not in answer
    said = judge.generate([{"role": "user", "content": "w4 w5 w6"}], tokens=8)
    assert said == subject.tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_a_question_that_a_local_model_cannot_read_is_not_cut() -> None:
    judge = LocalModel(load(families.build("llama"), tokenizer=families.tokenizer()), families.tokenizer())
    # "Answer:" is the last of its tokens
    assert judge.generate([{"role": "user", "content": "w4 " * (families.POSITIONS - 6)}], tokens=5)
    with pytest.raises(
        ModelError,
        match=r"a question of 60 tokens with an answer of up to 5 does not fit into the 64 positions of .*'examples' and 'window'",
    ):
        judge.generate([{"role": "user", "content": "w4 " * (families.POSITIONS - 5)}], tokens=5)
    with pytest.raises(ModelError, match="has no tokenizer"):
        LocalModel(families.subject("llama"), None)
