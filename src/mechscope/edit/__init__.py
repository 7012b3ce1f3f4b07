"""Changing what a model knows: edits of the MLPs' last maps as small files, made, applied, undone, and measured."""

from mechscope.edit.delta import Delta, LowRank, applied, save_edited
from mechscope.edit.keys import RIDGE, KeyMoments, kept_key_moments, key_moments
from mechscope.edit.maps import DownMap, down_map

__all__ = ["RIDGE", "Delta", "DownMap", "KeyMoments", "LowRank", "applied", "down_map", "kept_key_moments", "key_moments", "save_edited"]
