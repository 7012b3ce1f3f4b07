"""Which tokens of a marked prompt a forward pass holds, `generate` included, by counting the tokens of the passes.

A cache only tells that a pass goes on with the text before it. Without one a pass begins anew, with the prompt or with all that was generated since,
one token more than the pass before. Beam search runs every text several times, side by side.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from mechscope.errors import SettingsError


class MarkedPrompt:
    """A prompt some of whose tokens are marked.

    Attributes:
        positions: ``(batch, token)``, True where a token of the prompt is marked; padding included.
        first: Tokens of the text before the pass that was noticed last.
        seen: Tokens of the text up to its end; 0 before any.
        copies: How often each text stands in the batch.
        known: Whether the marks are those of this text.
    """

    def __init__(self, positions: Bool[Tensor, "batch token"]) -> None:
        """Expect the prompt."""
        self.positions = positions
        self.first, self.seen, self.copies = 0, 0, 1
        self.known = True

    def notice(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a pass of the model (a forward pre-hook)."""
        given = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        cache, width = kwargs.get("past_key_values"), self.positions.shape[1]
        goes_on = cache is not None and int(cache.get_seq_length()) > 0
        grown = self.seen >= width and given.shape[1] == self.seen + 1
        self.known = self.seen >= width if goes_on else given.shape[1] == width or grown
        self.first = self.seen if goes_on else 0
        self.seen = self.first + given.shape[1]
        if not goes_on and not grown:
            self.copies = _copies(given, len(self.positions))

    def marks(self, part: Tensor) -> Bool[Tensor, "batch token"]:
        """Return the marks of the tokens whose values these are; what is generated is not marked.

        Raises:
            SettingsError: The marks are not those of the prompt.
        """
        rows, tokens = len(self.positions), self.positions.shape[1]
        # blocks can also be run one by one, which is no pass of the model
        known = self.known and self.seen == self.first + part.shape[1] if self.seen else part.shape[1] == tokens
        if not known or (rows > 1 and rows * self.copies != len(part)):
            raise SettingsError(
                f"positions of shape {(rows, tokens)} do not fit {len(part)} texts of {self.first + part.shape[1]} tokens: "
                "give one mark per token of the prompt, padding included"
            )
        here = self.positions[:, self.first : self.first + part.shape[1]].to(part.device)
        here = nn.functional.pad(here, (0, part.shape[1] - here.shape[1]))
        return here if rows == 1 else here.repeat_interleave(self.copies, dim=0)


def _copies(given: Tensor, texts: int) -> int:
    """Return how often each of some texts stands in a batch, one copy beside the other; 1 where that is not so."""
    copies, more = divmod(len(given), texts)
    if more or copies < 2:
        return 1
    return copies if bool((given.unflatten(0, (texts, copies)) == given[::copies, None]).all()) else 1
