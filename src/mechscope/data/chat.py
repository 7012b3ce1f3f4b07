"""Documents and prompts as a conversation: the tokenizer's chat template around a user's message and the assistant's answer.

The user's message is a prompt with the document in it, the assistant's message is the summary. Both are rendered once, with `{document}` and `{summary}` in
the places of the texts, by the template that the tokenizer carries; the result is an ordinary `Template` with its control tokens written out. So an
article's own `<|im_start|>` stays letters and cannot begin a turn, only the document is ever cut, spans are exact, and a prompt to write from ends where
`add_generation_prompt` ends it. The ids are those of `tokenizer.apply_chat_template`, but for a tokenizer that would join what stands on both sides of a
border (`.` and a line feed): pieces are tokenised apart as everywhere, which is warned of once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mechscope.data.pairs import Pairs, PromptPair, Span
from mechscope.data.pieces import Pieces
from mechscope.data.template import FIELD, Frame, Template
from mechscope.errors import DataError

log = logging.getLogger(__name__)

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# of models that can think before they answer: the summary is their answer
_OPTIONS = {"enable_thinking": False}
_MADE: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, str], Template]] = WeakKeyDictionary()
_TRIED = ("Rain fell on Monday. It stopped.", "It rained.")


def chat_template(text: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Put a prompt and its answer into the turns of a tokenizer's chat template.

    Args:
        text: holds `{document}` once, and then `{summary}` or not: what stands before `{summary}` is the user's message, the rest is the assistant's.
        tokenizer: the tokenizer whose `chat_template` is applied, without thinking where it can be asked for or not.

    Returns:
        The text of both turns. What the model is to write ends where the template's `{% generation %}` block does; without such a block, behind the
        token that ends the turn.

    Raises:
        DataError: the tokenizer has no chat template, it cannot be applied or changes the messages, its prompt for an answer is not how it begins one,
            or `text` lacks its field.
    """
    known = _MADE.setdefault(tokenizer, {})
    key = text, str(getattr(tokenizer, "chat_template", None))
    if key not in known:  # made, and compared, once
        known[key] = _made(text, tokenizer)
    return known[key]


def _made(text: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{name} has no chat template, which setting 'chat' needs: leave it out, or pass tokenizer=… with that of a chat model of the same vocabulary"
        )
    if [match.group(1) for match in FIELD.finditer(text)] not in (["document"], ["document", "summary"]):
        raise DataError(f"template {text!r} must hold {{document}} once, and behind it {{summary}} once or not at all")
    asked, _, more = text.partition("{summary}")
    asked = asked.rstrip(" ")
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "{summary}" + more}]
    whole, prompt = _rendered(tokenizer, messages), _rendered(tokenizer, messages[:1], add_generation_prompt=True)
    if [match.group(1) for match in FIELD.finditer(whole)] != ["document", "summary"]:
        raise DataError(
            f"the chat template of {name} does not write a user's and an assistant's message once each: it makes {whole!r} of them"
        )
    before, _, closing = whole.partition("{summary}")
    if before.rstrip(" ") != prompt.rstrip(" "):
        raise DataError(
            f"the chat template of {name} asks for an answer with {prompt[-40:]!r} and begins one with {before[-40:]!r}: a model would write from another "
            "prompt than it is trained on; give the tokenizer a template where both agree"
        )
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    kept = _turn(tokenizer, messages, whole, closing, [token.content for token in added])
    written = tokenizer.get_chat_template()
    template = Template(
        whole[: len(whole) - len(closing) + kept],
        complete=True,
        after=closing[kept:],
        controls=tuple(token.content for token in added if not token.special and token.content in written),
    )
    _compare(tokenizer, template, [asked, "{summary}" + more])
    return template


def in_turns(pairs: Pairs, tokenizer: PreTrainedTokenizerBase) -> Pairs:
    """Make prompts a user's messages: what comes next is the first token of the assistant's answer.

    Args:
        pairs: prompts; their answers are taken as the assistant would begin with them, so without the space before a word where the template has none.
        tokenizer: the tokenizer they were made with, which has a chat template.

    Raises:
        DataError: the chat template cannot be used (as for `chat_template`), an answer is several tokens there, or two texts are no longer of one length.
    """
    template, pieces = chat_template("{document}", tokenizer), Pieces(tokenizer)
    frame = Frame(pieces, template)

    def answers(pair: PromptPair, ids: Sequence[int]) -> tuple[int, ...]:
        texts = [tokenizer.decode([one]) for one in ids]
        written = pieces.ids([template.summary(text) for text in texts], control=True) if texts else []
        for text, tokens in zip(texts, written, strict=True):
            if len(tokens) != 1:
                raise DataError(
                    f"pair {pair.id!r}: answer {text!r} is {len(tokens)} tokens where an assistant's answer begins, not one: choose another"
                )
        return tuple(dict.fromkeys(tokens[0] for tokens in written))

    def begun(token: int) -> tuple[int, ...]:
        """Return a prompt's first token behind the space that the template puts before a message (`[INST] `); the rest of its word keeps its tokens."""
        text = tokenizer.decode([token])
        gap = template.document("")
        if not gap or text != text.strip() or pieces.ids([text]) != [[token]]:
            return (token,)
        return tuple(pieces.ids([gap + text])[0])

    def turned(pair: PromptPair) -> PromptPair:
        start = len(pieces.start_ids) if pair.clean[: len(pieces.start_ids)] == pieces.start_ids else 0
        firsts = [begun(ids[start]) for ids in (pair.clean, pair.corrupt)]
        if len({len(first) for first in firsts}) > 1:
            raise DataError(f"pair {pair.id!r}: behind the space of the chat template its clean and corrupt text are not of one length")
        shift = len(frame.head) - start + len(firsts[0]) - 1
        clean, corrupt = (
            (*frame.head, *first, *ids[start + 1 :], *frame.joint) for first, ids in zip(firsts, (pair.clean, pair.corrupt), strict=True)
        )

        def moved(span: Span) -> Span:
            # what begins with the text still does
            return len(frame.head) if span[0] == start else span[0] + shift, span[1] + shift

        return PromptPair(
            pair.id,
            clean,
            corrupt,
            answers(pair, pair.answers),
            answers(pair, pair.wrong_answers),
            target=None if pair.target is None else moved(pair.target),
            segments={name: tuple(map(moved, spans)) for name, spans in pair.segments.items()},
        )

    return Pairs(tuple(map(turned, pairs)), f"{pairs.source}, as a user's message", pairs.problems)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    return str(_applied(tokenizer, messages, tokenize=False, **options))


def _applied(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], **_OPTIONS, **options)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"the chat template of {type(tokenizer).__name__} cannot be applied to a user's and an assistant's message: {error}"
        ) from error


def _turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], whole: str, closing: str, added: Sequence[str]) -> int:
    """Return how many characters behind the summary are the assistant's to write."""
    start = len(whole) - len(closing)
    if tokenizer.is_fast and _MARKS.search(tokenizer.get_chat_template()):
        marked = _applied(
            tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": True}
        )
        ends = [end for (_, end), mine in zip(marked["offset_mapping"], marked["assistant_masks"], strict=True) if mine]
        if ends and max(ends) >= start:
            return max(ends) - start
    ended = re.search("|".join(map(re.escape, added)), closing) if added else None
    return ended.end() if ended else len(closing)


def _compare(tokenizer: PreTrainedTokenizerBase, template: Template, contents: Sequence[str]) -> None:
    """Warn where the template itself would make other tokens of a conversation."""
    document, summary = _TRIED
    pieces = Pieces(tokenizer)
    frame = Frame(pieces, template)
    try:
        article, answer = (
            pieces.ids([template.document(document)], first=frame.document_is_first)[0],
            pieces.ids([template.summary(summary)])[0],
        )
    except DataError:  # a tokenizer of other words than these
        return
    ids = [*frame.head, *article, *frame.joint, *answer, *frame.tail, *frame.after]
    filled = [text.replace("{document}", document).replace("{summary}", summary) for text in contents]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), filled, strict=True)]
    expected = list(_applied(tokenizer, messages, return_dict=False))
    if ids != expected:
        at = next((at for at, (one, other) in enumerate(zip(ids, expected, strict=False)) if one != other), min(len(ids), len(expected)))
        log.warning(
            "chat: from token %d on %s makes other tokens of the whole conversation (%r) than of its parts (%r): it joins characters across the border of "
            "document or summary, which are cut apart here; a message that ends in {document} has no such border",
            at,
            type(tokenizer).__name__,
            tokenizer.decode(expected[max(at - 1, 0) : at + 2]),
            tokenizer.decode(ids[max(at - 1, 0) : at + 2]),
        )
