"""Language models that can be asked: one that runs here, and one behind an endpoint that speaks OpenAI's protocol of chat completions."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import torch

from mechscope.data.prompt import pad_id
from mechscope.errors import ModelError, RunError, SettingsError
from mechscope.features.explain.chat import Chat
from mechscope.features.explain.evidence import Messages
from mechscope.instrument.decoding import continuations
from mechscope.settings.addresses import check_address
from mechscope.settings.decoding import Decoding
from mechscope.subject import Subject

KEY = "OPENAI_API_KEY"
"""The environment variable whose value, where there is one, is sent to an endpoint as its key; it is kept nowhere."""
# seconds before an endpoint that is busy is asked again
_PAUSES = (1.0, 4.0, 10.0)
_BUSY = {408, 409, 429, 500, 502, 503, 504}


class EndpointError(RunError):
    """An endpoint that does not answer as it should; what was finished before is kept."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key and the texts are for the address that was named."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        """Give no other address to ask."""


_OPENER = urllib.request.build_opener(_Stay)


class LocalModel(Chat):
    """A Hugging Face model that runs here, greedily, whatever its generation file says."""

    def __init__(self, model: Subject, tokenizer: Any) -> None:
        """Take the model that explains, and the tokenizer of the one that is studied.

        Raises:
            ModelError: It has no tokenizer of its own.
        """
        if model.tokenizer is None:
            raise ModelError(f"model {model.source!r} has no tokenizer, which one that explains needs: load it with one")
        super().__init__(f"local:{model.source}", tokenizer)
        self._model = model

    def generate(self, messages: Messages, *, tokens: int) -> str:
        """Continue a conversation, or where the tokenizer has no template for one, its text.

        Raises:
            ModelError: The question and its answer are longer than what the model reads.
        """
        tokenizer, model = self._model.tokenizer, self._model
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer("\n\n".join(message["content"] for message in messages) + "\n\nAnswer:")["input_ids"]
        if len(ids) + tokens > (most := model.anatomy.max_positions):
            # cut, it would be another question
            raise ModelError(
                f"a question of {len(ids):,} tokens with an answer of up to {tokens} does not fit into the {most:,} positions of {model.source!r}: "
                "explain by a model that reads longer texts, or lower settings 'examples' and 'window'"
            )
        given = torch.tensor([ids], device=model.device)
        decoding, pad = Decoding(max_new_tokens=tokens), pad_id(tokenizer)
        with model.active():
            (answer,) = continuations(model.plain, given, decoding=decoding, pad=pad, ends=[tokenizer.eos_token_id])
        return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


class Endpoint(Chat):
    """A model behind an endpoint, `POST {url}/chat/completions`; temperature 0."""

    def __init__(
        self, url: str, model: str, tokenizer: Any, *, timeout: float = 60.0, seed: int = 0, pause: Callable[[float], None] = time.sleep
    ) -> None:
        """Name an endpoint; nothing is sent before something is asked.

        Args:
            url: Its address, such as http://localhost:8000/v1.
            model: The model's name there.
            tokenizer: Of the model that is studied.
            timeout: Seconds to wait for an answer.
            seed: Sent along.
            pause: Waits so many seconds.

        Raises:
            SettingsError: The address is none of http or https, or the key cannot be sent.
        """
        address = check_address(url)
        check_key()
        super().__init__(f"endpoint:{model}", tokenizer)
        self.url, self._model, self._timeout, self._seed, self._pause = address, model, timeout, seed, pause

    def generate(self, messages: Messages, *, tokens: int) -> str:
        """Ask; busy endpoints are asked again, some seconds later.

        Raises:
            EndpointError: It is not there, refuses, or answers something else than the protocol says.
        """
        body = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": tokens, "seed": self._seed}
        for pause in (*_PAUSES, None):
            try:
                return _content(self._sent(body))
            except urllib.error.HTTPError as error:
                reason = f"it says {error.code} {error.reason} {_read(error)}"
                if error.code not in _BUSY:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"its answer is no chat completion ({type(error).__name__}: {error})"
                break
            if pause is not None:
                self._pause(pause)
        said = " ".join(reason.split())[:300]
        raise EndpointError(f"endpoint {self.url} does not answer: {said}; what was finished is kept, and the same command goes on there")

    def _sent(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := check_key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers, method="POST")
        with _OPENER.open(request, timeout=self._timeout) as answer:
            return bytes(answer.read())


def check_key() -> str:
    """Return the key that is sent to an endpoint, empty for none; `SettingsError`, which does not repeat it, where no header can hold it."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise SettingsError(f"the key in the environment variable {KEY} has characters that cannot be sent: set it to the key alone")
    return key


def _read(error: urllib.error.HTTPError) -> str:
    """Return the beginning of what came with an error, as far as it arrived."""
    try:
        return error.read(300).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def _content(answer: bytes) -> str:
    content = json.loads(answer)["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise TypeError("no text in it")
    return content.strip()
