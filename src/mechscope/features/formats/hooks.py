"""Names of places in other libraries: TransformerLens's hooks, Hugging Face's modules, and dictionary_learning's names."""

from __future__ import annotations

import re

from mechscope.errors import SettingsError
from mechscope.features.places import FeatureSite, Place

# TransformerLens; a norm's output is what the MLP reads where weights are not folded, as SAELens loads them
_HOOKS: dict[str, FeatureSite] = {
    "hook_resid_post": "residual",
    "hook_attn_out": "attention_output",
    "hook_mlp_out": "mlp_output",
    "mlp.hook_out": "mlp_output",
    "mlp.hook_in": "mlp_input",
    "ln2.hook_normalized": "mlp_input",
    "attn.hook_z": "z",
}
_WRITTEN: dict[FeatureSite, str] = {
    "residual": "hook_resid_post",
    "attention_output": "hook_attn_out",
    "mlp_output": "hook_mlp_out",
    "mlp_input": "ln2.hook_normalized",
    "z": "attn.hook_z",
}
_NAMED: dict[str, FeatureSite] = {"resid_post": "residual", "attn_out": "attention_output", "mlp_out": "mlp_output"}
_MODULES: dict[str, FeatureSite] = {"": "residual", ".mlp": "mlp_output", ".attn": "attention_output", ".self_attn": "attention_output"}


def place_of(name: str) -> Place:
    """Return the place that another library's name stands for.

    Raises:
        SettingsError: It stands for none that mechscope has.
    """
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        layer, hook = int(match[1]), match[2]
        if hook == "hook_resid_pre" and layer:
            return Place("residual", layer - 1)
        if hook in _HOOKS:
            return Place(_HOOKS[hook], layer)
    if match := re.fullmatch(r"(resid_post|attn_out|mlp_out)_layer_(\d+)", name):
        return Place(_NAMED[match[1]], int(match[2]))
    if (match := re.fullmatch(r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)(\.\w+)?", name)) and (match[2] or "") in _MODULES:
        return Place(_MODULES[match[2] or ""], int(match[1]))
    raise SettingsError(
        f"hook {name!r} is no place of mechscope: it knows the residual stream behind a block, what attention and MLP add, what the MLP reads, and z. "
        "If it is one of these under another name, give place="
    )


def hook_of(place: Place) -> str:
    """Return TransformerLens's name of a place."""
    return f"blocks.{place.layer}.{_WRITTEN[place.site]}"
