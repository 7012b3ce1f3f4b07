"""Changing what a model knows: edits of the MLPs' last maps as small files, made, applied, undone, and measured."""

from mechscope.edit import solve
from mechscope.edit.delta import Delta, LowRank, applied, save_edited
from mechscope.edit.keys import RIDGE, KeyMoments, kept_key_moments, key_moments
from mechscope.edit.maps import DownMap, down_map
from mechscope.edit.measures import Make, edit_alone, edit_in_sequence, standing, summary, text_loss
from mechscope.edit.methods import Setting, alphaedit, finetune, memit, rome
from mechscope.edit.requests import Request, Requests, Spelled, check_requests, read_requests
from mechscope.edit.value import Search

__all__ = [
    "RIDGE",
    "Delta",
    "DownMap",
    "KeyMoments",
    "LowRank",
    "Make",
    "Request",
    "Requests",
    "Search",
    "Setting",
    "Spelled",
    "alphaedit",
    "applied",
    "check_requests",
    "down_map",
    "edit_alone",
    "edit_in_sequence",
    "finetune",
    "kept_key_moments",
    "key_moments",
    "memit",
    "read_requests",
    "rome",
    "save_edited",
    "solve",
    "standing",
    "summary",
    "text_loss",
]
