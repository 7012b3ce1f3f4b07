"""Dictionaries of other libraries: read into, and written from, the one type that mechscope has."""

from mechscope.features.formats.circuit_tracer import read_circuit_tracer, write_circuit_tracer
from mechscope.features.formats.circuit_tracer_graph import write_circuit_tracer_graph
from mechscope.features.formats.crosscoders import read_crosscoder
from mechscope.features.formats.dictionary_learning import read_dictionary_learning
from mechscope.features.formats.gemma_scope import read_gemma_scope
from mechscope.features.formats.saelens import read_saelens, write_saelens
from mechscope.features.formats.sparsify import read_sparsify

__all__ = [
    "read_circuit_tracer",
    "read_crosscoder",
    "read_dictionary_learning",
    "read_gemma_scope",
    "read_saelens",
    "read_sparsify",
    "write_circuit_tracer",
    "write_circuit_tracer_graph",
    "write_saelens",
]
