"""Fine-tuning placed where a selection says, and the bake-off that asks whether the place matters."""

from mechscope.adapt.arms import PROTOCOLS, STRATEGIES, BakeOffSettings
from mechscope.adapt.bakeoff import BakeOff, bake_off
from mechscope.adapt.generate import PAPER, encode_prompts, summarize
from mechscope.adapt.lora import attach
from mechscope.adapt.targets import Placement, find_targets, place
from mechscope.adapt.training import Tuned, load_tuned, tune
from mechscope.settings.decoding import Decoding
from mechscope.settings.lora import LoraSettings
from mechscope.settings.training import TrainSettings

__all__ = [
    "PAPER",
    "PROTOCOLS",
    "STRATEGIES",
    "BakeOff",
    "BakeOffSettings",
    "Decoding",
    "LoraSettings",
    "Placement",
    "TrainSettings",
    "Tuned",
    "attach",
    "bake_off",
    "encode_prompts",
    "find_targets",
    "load_tuned",
    "place",
    "summarize",
    "tune",
]
