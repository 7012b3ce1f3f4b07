"""What a model's activations tell of its texts: linear probes in closed form, and erasing what they tell."""

from mechscope.probing.erasure import Eraser, erase_means, inlp, leace
from mechscope.probing.linear import PENALTIES, LinearProbe, chosen_penalty, difference_in_means, lda, mass_mean, r_squared, ridge

__all__ = [
    "PENALTIES",
    "Eraser",
    "LinearProbe",
    "chosen_penalty",
    "difference_in_means",
    "erase_means",
    "inlp",
    "lda",
    "leace",
    "mass_mean",
    "r_squared",
    "ridge",
]
