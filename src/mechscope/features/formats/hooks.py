"""Names of places in other libraries: TransformerLens's hooks, Hugging Face's modules, and dictionary_learning's names."""

from __future__ import annotations

import re

from mechscope.errors import SettingsError
from mechscope.features.places import FeatureSite, Place

# TransformerLens; `hook_attn_out` and `hook_mlp_out` come after a norm behind attention or MLP (Gemma 2/3, OLMo 2), as mechscope's `a` and `m` do
_HOOKS: dict[str, FeatureSite] = {
    "hook_resid_post": "residual",
    "hook_attn_out": "attention_output",
    "hook_mlp_out": "mlp_output",
    "mlp.hook_in": "mlp_input",
    "attn.hook_z": "z",
}
_WRITTEN: dict[FeatureSite, str] = {
    "residual": "hook_resid_post",
    "attention_output": "hook_attn_out",
    "mlp_output": "hook_mlp_out",
    # no name of a norm: see below
    "mlp_input": "mlp.hook_in",
    "z": "attn.hook_z",
}
# dictionary_learning
_RESIDUAL = r"resid_post_layer_(\d+)|(?:[\w.]+\.)?(?:layers|h)\.(\d+)"
# names that stand for a place in some models only: what they say, and the place that may be meant
_AMBIGUOUS: tuple[tuple[str, str, str], ...] = (
    (
        r"blocks\.(\d+)\.ln2\.hook_normalized",
        "lies before the norm's weight (with RMSNorm, and with LayerNorm since TransformerLens 3) or behind it; the MLP reads what is behind",
        "m{}.in",
    ),
    (
        r"blocks\.(\d+)\.mlp\.hook_out|(?:[\w.]+\.)?(?:layers|h)\.(\d+)\.mlp|mlp_out_layer_(\d+)",
        "is the MLP's own output, which is what the MLP adds unless a norm follows it (Gemma 2/3, OLMo 2)",
        "m{}",
    ),
    (
        r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)\.(?:self_)?attn|attn_out_layer_(\d+)",
        "is attention's own output, which is what attention adds unless a norm follows it (Gemma 2/3, OLMo 2)",
        "a{}",
    ),
)


def place_of(name: str) -> Place:
    """Return the place that another library's name stands for.

    Raises:
        SettingsError: It stands for none that mechscope has, or for one in some models only.
    """
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        layer, hook = int(match[1]), match[2]
        if hook == "hook_resid_pre" and layer:
            return Place("residual", layer - 1)
        if hook in _HOOKS:
            return Place(_HOOKS[hook], layer)
    if match := re.fullmatch(_RESIDUAL, name):
        return Place("residual", int(match[1] or match[2]))
    for pattern, said, form in _AMBIGUOUS:
        if match := re.fullmatch(pattern, name):
            meant = form.format(next(filter(None, match.groups())))
            raise SettingsError(
                f"hook {name!r} {said}: if it is {meant} in your model, say so where you read it ({meant!r}); otherwise it is no place"
            )
    raise SettingsError(
        f"hook {name!r} is no place of mechscope: it knows the residual stream behind a block, what attention and MLP add, what the MLP reads, and z. "
        "If it is one of these under another name, give place="
    )


def hook_of(place: Place) -> str:
    """Return TransformerLens's name of a place."""
    return f"blocks.{place.layer}.{_WRITTEN[place.site]}"
