"""What jobs on gradients of weights share: which matrices of which layers, and texts with a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

from mechscope.choices import MatrixKind
from mechscope.errors import SettingsError
from mechscope.settings import Number, setting
from mechscope.studies.pairs import layers_of, split_names
from mechscope.studies.texts import Texts, check_attributed, check_top

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs
    from mechscope.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Gradients(Texts):
    """Whose loss on which texts, and the gradient of which weights."""

    panel: ClassVar[str] = "Gradients"

    matrices: str = setting(
        "mlp_down",
        "Matrices, joined by commas: query_key_value, attention_output, mlp_up, mlp_down. Of those that write the residual stream the gradient's "
        "output side is read, of the others its input side.",
    )
    layers: str | None = setting(None, 'Layers, such as "0-5,11"; by default all.')
    top: Number = setting(10, "Tokens at each end of a list.")
    tokens_per_batch: Number | None = setting(1024, "Most tokens of a batch of texts, padding included; decides the memory.")

    def __post_init__(self) -> None:
        """Refuse matrices that there are not.

        Raises:
            SettingsError: There is not one source of texts, or a matrix is not known.
        """
        super().__post_init__()
        matrices_of(self.matrices)


def matrices_of(text: str) -> tuple[MatrixKind, ...]:
    """Read kinds of matrices as a command line gives them, joined by commas.

    Raises:
        SettingsError: One is not known, or none is named.
    """
    named, known = split_names(text), get_args(MatrixKind)
    if not named:
        raise SettingsError(f"setting 'matrices' is empty: name some of {', '.join(known)}")
    for kind in named:
        if kind not in known:
            raise SettingsError(f"setting 'matrices' names {kind!r}: there are {', '.join(known)}")
    return tuple(kind for kind in known if kind in named)


def check_gradients(subject: Subject, texts: Pairs, settings: Gradients) -> None:
    """Refuse texts without a loss, and layers and lists that the model does not have, without a run of the model.

    Raises:
        MechscopeError: Something does not fit; the message names it.
    """
    check_attributed(subject, texts, "target-logit")  # the loss is of the tokens whose logits that metric weighs
    check_top(subject, settings.top)
    layers_of(settings.layers, subject.anatomy)
