"""The words around a document and its summary.

They are a user's own, or what a tokenizer's chat template makes of them (`mechscope.data.chat`). A space before a field goes with the field (` The`, not
`: ` and `The`), as byte-level tokenizers would cut the whole text themselves. So the prompt to generate from ends in `Summary:` and the summary's first
token carries its own space, as in training.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mechscope.data.pieces import Pieces
from mechscope.errors import DataError

FIELD = re.compile(r"\{(document|summary)\}")


@dataclass(frozen=True)
class Template:
    """The text around a document and its summary.

    Attributes:
        text: holds `{document}` and `{summary}` once each, in this order; other braces are ordinary text.
        complete: whether the text has its start and end tokens written out, as a chat has; else those that the tokenizer sets are put around it.
        after: what stands behind all that the model is to write, such as a chat's line feed behind the token that ends a turn.
        controls: tokens that mark turns and are not special to the tokenizer: in a document or summary they are letters all the same.

    Raises:
        DataError: a field is absent, repeated or in the wrong order, or nothing stands between the two.
    """

    text: str = "Article: {document}\nSummary: {summary}"
    complete: bool = False
    after: str = ""
    controls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fields = [match.group(1) for match in FIELD.finditer(self.text)]
        if fields != ["document", "summary"]:
            named = ", ".join(f"{{{name}}}" for name in fields) or "neither"
            raise DataError(f"template {self.text!r} must hold {{document}} once and then {{summary}} once; found: {named}")
        if not self.joint.strip():
            raise DataError(
                f"template {self.text!r} has no words between {{document}} and {{summary}}: the model could not tell where to begin"
            )

    @property
    def opening(self) -> str:
        """The text before the document, without the space that goes with the document."""
        return FIELD.split(self.text)[0].rstrip(" ")

    @property
    def joint(self) -> str:
        """The text between document and summary, up to and including `Summary:`."""
        return FIELD.split(self.text)[2].rstrip(" ")

    @property
    def closing(self) -> str:
        """The text after the summary."""
        return FIELD.split(self.text)[4]

    def document(self, text: str) -> str:
        """Return a document with the space that the template puts before it."""
        return _gap(FIELD.split(self.text)[0]) + text.strip()

    def summary(self, text: str) -> str:
        """Return a summary with the space that the template puts before it."""
        return _gap(FIELD.split(self.text)[2]) + text.strip()


def _gap(text: str) -> str:
    return text[len(text.rstrip(" ")) :]


class Frame:
    """A template's own tokens, encoded once for many documents.

    Attributes:
        head: the start token, where the tokenizer sets one, and the opening.
        joint: the tokens between document and summary.
        tail: the closing and the end token, where the tokenizer has one.
        after: what stands behind all that the model is to write.
        ends: tokens that end a turn of a chat, at which writing stops; none where the tokenizer's end token does.
        document_is_first: whether the document opens the text.
    """

    def __init__(self, pieces: Pieces, template: Template) -> None:
        self.document_is_first = not template.opening
        self.joint = tuple(pieces.ids([template.joint], control=True)[0])
        closing, after = (tuple(pieces.ids([text], control=True)[0]) if text else () for text in (template.closing, template.after))
        self.after = after
        self.ends: tuple[int, ...] = ()
        if template.complete:
            self.head = tuple(pieces.ids([template.opening], first=True, control=True)[0]) if template.opening else ()
            self.tail = closing
            added = pieces.tokenizer.added_tokens_decoder
            # white space can be an added token (Gemma's line feed), which ends nothing
            self.ends = tuple(token for token in closing if token in added and added[token].content.strip())[-1:]
        else:
            end = pieces.tokenizer.eos_token_id
            self.head = pieces.opened(template.opening) if template.opening else pieces.start_ids
            self.tail = (*closing, *(() if end is None or closing[-1:] == (end,) else (end,)))
        self.around = len(self.head) + len(self.joint) + len(self.tail) + len(self.after)
