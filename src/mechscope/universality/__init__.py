"""Universality: whether other models hold the same neurons, representations and heads, beside what chance and an untrained model give."""

from mechscope.universality.alignment import Aligned, Rows, align, read_rows
from mechscope.universality.heads import same_heads
from mechscope.universality.neurons import same_neurons
from mechscope.universality.representations import same_representations, similarity_grid

__all__ = ["Aligned", "Rows", "align", "read_rows", "same_heads", "same_neurons", "same_representations", "similarity_grid"]
