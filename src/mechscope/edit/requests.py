"""What is to be changed: facts in CounterFact's format, as texts and as tokens.

A row has a `prompt` with {} in the place of the `subject`, what shall follow (`target_new`) and, where known, what follows now (`target_true`); how else the
fact is asked for (`paraphrase_prompts`) and prompts about others, for which `target_true` is right and stays so (`neighborhood_prompts`). CounterFact keeps the
first four under `requested_rewrite` and targets as {"str": …}; both forms are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.data.pieces import Pieces
from mechscope.data.sources import file_rows
from mechscope.errors import DataError
from mechscope.shapes import by_shape
from mechscope.store.hashing import hash_json

SUBJECT, TARGET = "subject", "target"


@dataclass(frozen=True)
class Request:
    """One fact to be changed.

    Attributes:
        id: Its name.
        subject: Whom it is about.
        prompt: With {} in the place of the subject.
        new: What shall follow.
        true: What follows now; empty where not known.
        paraphrases: Other prompts for the same fact, written out.
        neighbours: Prompts about others, for which `true` is right.
    """

    id: str
    subject: str
    prompt: str
    new: str
    true: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True)
class Requests:
    """Facts to be changed, and where they come from."""

    requests: tuple[Request, ...]
    source: str

    __repr__ = by_shape

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def hash(self) -> str:
        """Of all facts in order."""
        return hash_json([vars(request) for request in self.requests])


def read_requests(source: str | Path, *, limit: int | None = None) -> Requests:
    """Read facts to be changed.

    Args:
        source: A JSONL (JSON, Parquet) file in CounterFact's format.
        limit: Facts at most, from the start.

    Raises:
        DataError: The file cannot be read, or a row lacks something; the message names the row.
    """
    path = Path(source).expanduser()
    made: list[Request] = []
    for number, row in enumerate(file_rows(path), start=1):
        if limit is not None and len(made) >= limit:
            break
        place = f"{path}, {row.place}"
        if row.values is None:
            raise DataError(f"{place}: bytes that are not UTF-8: save the file as UTF-8")
        made.append(_request(row.values, f"{path.stem}-{number}", place))
    if not made:
        raise DataError(f"{path} holds no edit: write one fact per row")
    return Requests(tuple(made), str(source))


def _request(values: Mapping[str, Any], name: str, place: str) -> Request:
    nested = values.get("requested_rewrite")
    own = {**values, **(nested if isinstance(nested, Mapping) else {})}
    subject, prompt, new = (_text(own, key, place) for key in ("subject", "prompt", "target_new"))
    true = _text(own, "target_true", place) if own.get("target_true") is not None else ""
    if prompt.count("{}") != 1:
        raise DataError(
            f"{place}: the prompt {prompt!r} has {{}} {prompt.count('{}')} times: write it once, in the place of the subject {subject!r}"
        )
    if new.strip() == true.strip():
        raise DataError(f"{place}: target_new and target_true are both {new!r}: there is nothing to edit")
    identity = values.get("id", values.get("case_id"))
    paraphrases, neighbours = (_list(values, key, place) for key in ("paraphrase_prompts", "neighborhood_prompts"))
    return Request(name if identity is None else str(identity), subject, prompt, new, true, paraphrases, neighbours)


def _text(values: Mapping[str, Any], key: str, place: str) -> str:
    value = values.get(key)
    if isinstance(value, Mapping):
        value = value.get("str")
    if not isinstance(value, str) or not value.strip():
        has = ", ".join(map(repr, values)) or "nothing"
        raise DataError(
            f"{place} has no text {key!r}; it has {has}: an edit needs subject, prompt (with {{}} for the subject) and target_new"
        )
    return value


def _list(values: Mapping[str, Any], key: str, place: str) -> tuple[str, ...]:
    value = values.get(key)
    if value is None:
        return ()
    if not isinstance(value, Sequence) and not hasattr(value, "tolist"):
        raise DataError(f"{place}: {key!r} is a {type(value).__name__}: write a list of prompts")
    texts = tuple(value) if not isinstance(value, str) else (value,)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{place}: {key!r} holds something that is no text: write a list of prompts")
    return texts


class Spelled:
    """Facts as tokens of one tokenizer: prompts with the subject's place, and with what follows them."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a Hugging Face tokenizer that gives offsets."""
        self.pieces = Pieces(tokenizer)

    def target(self, text: str) -> tuple[int, ...]:
        """Return the tokens of what follows a prompt, behind a space."""
        return tuple(self.pieces.ids([text if text[:1].isspace() else f" {text}"])[0])

    def prompt(self, request: Request, *, before: Sequence[int] = ()) -> tuple[tuple[int, ...], int]:
        """Return a prompt's tokens and the place of its subject's last one.

        Args:
            request: The fact.
            before: Tokens of a text that stands before the prompt.

        Raises:
            DataError: The tokenizer has a token for the end of the subject and what follows it.
        """
        return self.with_subject(request.prompt, request.subject, before=before)

    def with_subject(self, prompt: str, subject: str, *, before: Sequence[int] = ()) -> tuple[tuple[int, ...], int]:
        """Return the tokens of a prompt with {} for its subject, and the place of the subject's last token; as `prompt`."""
        first = not before
        text = ("" if first else " ") + prompt.replace("{}", subject)
        start = prompt.index("{}") + (not first)
        end = start + len(subject)
        (inside,) = self.pieces.token_spans(text, [(start, end)], first=first)
        following = next((at for at in range(end, len(text)) if not text[at].isspace()), None)
        if following is not None:
            (behind,) = self.pieces.token_spans(text, [(following, following + 1)], first=first)
            if behind[0] < inside[1]:
                raise DataError(
                    f"the tokenizer splits the subject {subject!r} in {text.strip()!r} elsewhere than where it ends: one token holds its end and what "
                    "follows; end the subject at a word"
                )
        lead = (*self.pieces.start_ids, *before)
        ids = self.pieces.ids([text], first=first)[0]
        return (*lead, *ids), len(lead) + inside[1] - 1

    def asked(self, text: str, target: str, name: str) -> PromptPair:
        """Return a prompt followed by a target, whose tokens are to be predicted."""
        prompt = (*self.pieces.start_ids, *self.pieces.ids([text], first=True)[0])
        following = self.target(target)
        if not prompt:
            raise DataError(f"{name}: the prompt {text!r} has no token: write one")
        ids = (*prompt, *following)
        return PromptPair(name, ids, ids, target=(len(prompt), len(ids)))

    def traced(self, requests: Requests) -> Pairs:
        """Return prompts whose subject can be blurred and whose known answer's first token is measured, for causal tracing.

        Raises:
            DataError: A fact says not what is true now, or nothing stands between the subject and the answer.
        """
        pairs = []
        for request in requests.requests:
            if not request.true:
                raise DataError(f"edit {request.id!r} has no target_true, which tracing measures: give it, or name the layer")
            ids, last = self.prompt(request)
            first = request.prompt.index("{}")
            (inside,) = self.pieces.token_spans(request.text, [(first, first + len(request.subject))], first=True)
            start = len(self.pieces.start_ids) + inside[0]
            pairs.append(PromptPair(request.id, ids, ids, self.target(request.true)[:1], segments={SUBJECT: ((start, last + 1),)}))
        return Pairs(tuple(pairs), requests.source)


def check_requests(requests: Requests, tokenizer: Any, max_positions: int) -> None:
    """Refuse facts that cannot be edited or measured, before anything runs.

    Raises:
        DataError: A subject is split by the tokenizer, a target has no token, or a prompt is longer than the model reads.
    """
    spelled = Spelled(tokenizer)
    for request in requests.requests:
        spelled.prompt(request)
        for target in filter(None, (request.new, request.true)):
            for text in (request.text, *request.paraphrases, *request.neighbours):
                pair = spelled.asked(text, target, request.id)
                if len(pair.clean) > max_positions:
                    raise DataError(
                        f"edit {request.id!r}: {text[:40]!r} with its target has {len(pair.clean)} tokens, the model reads {max_positions}"
                    )
