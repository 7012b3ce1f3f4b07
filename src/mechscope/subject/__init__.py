"""The model under study: loading it, knowing what is where in it, and naming its parts."""

from mechscope.subject.anatomy import Anatomy, Block, Slice
from mechscope.subject.components import Components
from mechscope.subject.load import Subject
from mechscope.subject.pair import Pair, pair

__all__ = ["Anatomy", "Block", "Components", "Pair", "Slice", "Subject", "pair"]
