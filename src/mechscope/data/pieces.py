"""Tokens of a piece of text as it stands inside a longer one.

Some tokenizers (SentencePiece's, Llama 2's among them) put an invisible space before whatever they are given, which is right at the start of a
text and wrong in its middle. A piece from the middle is therefore tokenised behind an anchor, a line feed, whose tokens are cut off
again. Tokenizers without that habit (byte-level ones) tokenise the piece alone. Which kind it is, and which start token it sets, is found by
trying.
"""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from weakref import WeakKeyDictionary

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from mechscope.errors import DataError

ANCHOR = "\n"
PROBE = "a"
# texts that a tokenizer is given at once
AT_ONCE = 1024
# copies of tokenizers to which more tokens are special, by which: copying one of 150,000 words takes a second
_SPECIAL: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, ...], PreTrainedTokenizerBase]] = WeakKeyDictionary()


def _bare(text: str) -> str:
    """Reduce a text to what normalising tokenizers leave alone: no case, no compatibility forms, no white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _with_special(tokenizer: PreTrainedTokenizerBase, controls: tuple[str, ...]) -> PreTrainedTokenizerBase:
    known = _SPECIAL.setdefault(tokenizer, {})
    if controls not in known:
        known[controls] = copy.deepcopy(tokenizer)
        known[controls].add_tokens([AddedToken(token, special=True, normalized=False) for token in controls], special_tokens=True)
    return known[controls]


class Pieces:
    """A tokenizer applied to pieces of texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: Sequence[str] = ()) -> None:
        """Take a tokenizer.

        Args:
            tokenizer: Any Hugging Face tokenizer.
            controls: Tokens beside its special ones that are letters where a text quotes them: some chats mark turns with ordinary added tokens.
        """
        self.tokenizer = tokenizer
        self._splitting = _with_special(tokenizer, tuple(controls)) if controls else tokenizer
        self._ids: dict[int, int] = {}

    @cached_property
    def _probe(self) -> str:
        """A text that the tokenizer can spell: a letter, or of a tokenizer of words one of its own."""
        try:
            self._tokenise([PROBE])
        except DataError:
            special = set(self.tokenizer.all_special_tokens)
            return next((word for word in self.tokenizer.get_vocab() if word not in special), PROBE)
        return PROBE

    @cached_property
    def start_ids(self) -> tuple[int, ...]:
        """The tokens that the tokenizer sets before a text by itself (a BOS token, or none)."""
        probe = self._probe
        plain = self._tokenise([probe])[0]
        special = list(self.tokenizer(probe, add_special_tokens=True)["input_ids"])
        starts = [at for at in range(len(special) - len(plain) + 1) if special[at : at + len(plain)] == plain]
        return tuple(special[: starts[0]]) if starts else ()

    @cached_property
    def anchor_ids(self) -> list[int]:
        """The anchor's tokens, or none where a piece can be tokenised alone."""
        try:
            alone, anchor, both = self._tokenise([self._probe, ANCHOR, ANCHOR + self._probe])
        except DataError:  # a tokenizer of words that knows no line feed
            return []
        return anchor if both == anchor + both[len(anchor) :] and both[len(anchor) :] != alone else []

    def ids(self, texts: Sequence[str], *, first: bool = False, control: bool = False) -> list[list[int]]:
        """Tokenise pieces, each on its own, without adding special tokens.

        Args:
            texts: The pieces.
            first: They stand at the start of a text rather than inside one.
            control: Special tokens written out in them are meant (`<|user|>` in a template); else they are text, as in an article that quotes one.
        """
        anchor = [] if first else self.anchor_ids
        if not anchor:
            return self._tokenise(texts, control=control)
        anchored = self._tokenise([ANCHOR + text for text in texts], control=control)
        # a merge across the anchor (several line feeds in one token) leaves only the piece alone to go by
        merged = [at for at, ids in enumerate(anchored) if ids[: len(anchor)] != anchor]
        alone = dict(zip(merged, self._tokenise([texts[at] for at in merged], control=control), strict=True)) if merged else {}
        return [alone[at] if at in alone else ids[len(anchor) :] for at, ids in enumerate(anchored)]

    def single(self, words: Sequence[str]) -> list[int | None]:
        """Return the token of each word behind a space; None where it is several, unknown, or cannot be spelled."""
        try:
            spelled = self.ids([f" {word}" for word in words])
        except DataError:  # one of them: each by itself
            spelled = [self._alone(f" {word}") for word in words]
        return [ids[0] if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id else None for ids in spelled]

    def _alone(self, text: str) -> list[int]:
        try:
            return self.ids([text])[0]
        except DataError:
            return []

    def opened(self, text: str) -> tuple[int, ...]:
        """Tokenise what a user writes as the start of a text: behind the start token, once, and with the special tokens that are written out in it."""
        ids = tuple(self.ids([text], first=True, control=True)[0])
        return ids if ids[: len(self.start_ids)] == self.start_ids else (*self.start_ids, *ids)

    def token_spans(
        self, text: str, spans: Sequence[tuple[int, int]], *, first: bool = False, control: bool = False
    ) -> list[tuple[int, int]]:
        """Find the tokens that hold given characters of a piece.

        Args:
            text: the piece.
            spans: half-open character spans in it.
            first: whether the piece stands at the start of a text rather than inside one.
            control: whether special tokens written out in it are meant, as in `ids`.

        Returns:
            Half-open token spans, each the fewest tokens that cover its characters.

        Raises:
            DataError: the tokenizer gives no offsets, or wrong ones (some do after a character that they have no token for).
        """
        if not self.tokenizer.is_fast:
            raise DataError(f"{type(self.tokenizer).__name__} gives no character offsets: use the fast version of this tokenizer")
        anchor = [] if first else self.anchor_ids
        encoded = self._call([ANCHOR + text if anchor else text], control=control, return_offsets_mapping=True)
        skip = len(anchor) if list(encoded["input_ids"][0][: len(anchor)]) == anchor else None
        if skip is None:
            encoded, skip = self._call([text], control=control, return_offsets_mapping=True), 0
        shift = len(ANCHOR) if skip else 0
        offsets = [(begin - shift, end - shift) for begin, end in encoded["offset_mapping"][0][skip:]]
        ids = encoded["input_ids"][0][skip:]
        covering = []
        for begin, end in spans:
            inside = [at for at, (left, right) in enumerate(offsets) if left < end and begin < right]
            read = self.tokenizer.decode(ids[inside[0] : inside[-1] + 1]) if inside else ""
            if not inside or _bare(text[begin:end]) not in _bare(read):
                name = type(self.tokenizer).__name__
                raise DataError(
                    f"{name} places {text[begin:end]!r} at tokens that read {read!r}: its offsets do not fit this text; use another tokenizer"
                )
            covering.append((inside[0], inside[-1] + 1))
        return covering

    def _tokenise(self, texts: Sequence[str], *, control: bool = False) -> list[list[int]]:
        tokens: list[list[int]] = []
        # a part at a time: what the tokenizer notes of every token is many times its id
        for start in range(0, len(texts), AT_ONCE):
            parts = self._call(texts[start : start + AT_ONCE], control=control)["input_ids"]
            # one object per word of the vocabulary, not per token of the corpus: 8 bytes for each of these instead of 36
            tokens += [[self._ids.setdefault(token, token) for token in ids] for ids in parts]
        return tokens

    def _call(self, texts: Sequence[str], *, control: bool, **options: bool) -> dict[str, list]:
        # split_special_tokens: "<|endoftext|>" written in an article is text and must not end the prompt
        try:
            tokenizer = self.tokenizer if control else self._splitting
            return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=not control, verbose=False, **options)
        except Exception as error:  # tokenizers raises no other kind
            if type(error) is not Exception:
                raise
            raise DataError(
                f"{type(self.tokenizer).__name__} cannot spell {texts[0][:40]!r}{' or a text beside it' if len(texts) > 1 else ''}: it has no token for some "
                f"of its words and none for unknown ones ({error})"
            ) from error
