"""SAELens's folders: `cfg.json` beside `sae_weights.safetensors` (SAELens 6; older ones keep the hook's name at the top of their configuration).

    pre = (x − b_dec if apply_b_dec_to_input else x) W_enc + b_enc        W_enc (d_in, d_sae)
    x̂   = f W_dec + b_dec [+ x W_skipᵀ]

A dictionary whose input is scaled while it runs (`normalize_activations` of `layer_norm`, `constant_norm_rescale`) is none of ours and refused by name, as is
a scale that was never folded, and any tensor that is not understood. Before SAELens 6 a `standard` architecture may have the activation `topk`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mechscope.errors import ModelError, SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.formats.hooks import hook_of
from mechscope.features.formats.parts import Given, between, chosen, safetensors, taken, write_safetensors
from mechscope.features.rules import Rule
from mechscope.store.files import read_json, write_json

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_RULES = {
    "standard": "relu",
    "gated": "gated",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
# what each has beside W_enc, W_dec and b_dec
_TENSORS = {"relu": ("b_enc",), "topk": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "r_mag", "b_mag")}


def read_saelens(folder: str | Path, *, place: Given = None, output: Given = None) -> Dictionary:
    """Read a dictionary of SAELens.

    Args:
        folder: The folder.
        place: What it reads, where the hook's name in the folder is none of ours or stands for a place in some models only (`ln2.hook_normalized`).
        output: What it writes (transcoders), likewise.

    Raises:
        SettingsError: A hook's name stands for no place, or for one in some models only.
        ModelError: The architecture or its scaling is not supported, or tensors are missing or not understood.
        RunError: A file is missing or damaged.
    """
    folder = Path(folder)
    config: dict[str, Any] = read_json(folder / _CONFIG)
    known = {**config, **config.get("metadata", {})}
    architecture = str(known.get("architecture", "standard"))
    if architecture not in _RULES:
        raise ModelError(f"{folder}: architecture {architecture!r} of SAELens is not supported: {', '.join(_RULES)} are")
    scaling = str(known.get("normalize_activations", "none"))
    if scaling != "none":
        raise ModelError(
            f"{folder}: its input is scaled by {scaling!r} while it runs, which no affine map does: fold the scale with SAELens and save it again"
        )
    activation, kind = str(known.get("activation_fn", known.get("activation_fn_str", "relu"))), _RULES[architecture]
    if activation == "topk" and kind == "relu":
        kind = "topk"
    if activation not in ("relu", kind):
        raise ModelError(f"{folder}: activation {activation!r} of architecture {architecture!r} is not supported")
    tensors = safetensors(folder / _WEIGHTS)
    # older folders hold it beside everything, as ones that change nothing
    if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
        del tensors["scaling_factor"]
    inside = chosen(place, known.get("hook_name"))
    outside = chosen(output, known.get("hook_name_out")) if "transcoder" in architecture else inside
    decoder, encoder = taken(tensors, "W_dec", folder), taken(tensors, "W_enc", folder).T
    own: dict[str, torch.Tensor] = {}
    bias = taken(tensors, "b_gate" if architecture == "gated" else "b_enc", folder)
    match kind:
        case "gated":
            rule = Rule("gated")
            own = {"magnitude_log": taken(tensors, "r_mag", folder), "magnitude_bias": taken(tensors, "b_mag", folder)}
        case "topk":
            k = known.get("k", (known.get("activation_fn_kwargs") or {}).get("k"))
            if k is None:
                raise ModelError(f"{folder}: its activation is topk, and {_CONFIG} does not say its k")
            rule = Rule("topk", int(k))
            if known.get("rescale_acts_by_decoder_norm"):
                # compared and given after multiplication with the norms: the same as decoders of norm one
                norms = decoder.norm(dim=1)
                encoder, bias, decoder = encoder * norms[:, None], bias * norms, decoder / norms[:, None]
        case "jumprelu":
            # it rectifies too, so a threshold below zero acts as zero
            rule, own = Rule("jumprelu"), {"threshold": taken(tensors, "threshold", folder).clamp(min=0)}
        case _:
            rule = Rule("relu")
    decoder_bias = taken(tensors, "b_dec", folder)
    skip = taken(tensors, "W_skip", folder) if "skip" in architecture else None
    if others := sorted({*tensors} - {"W_enc", "W_dec", "b_dec", *_TENSORS[kind], *(("W_skip",) if skip is not None else ())}):
        raise ModelError(
            f"{folder}: tensors {', '.join(others)} of a {kind} dictionary are not understood, and leaving them out would change what it says"
        )
    return between(
        inside,
        outside,
        rule,
        encoder=encoder,
        decoder=decoder,
        encoder_bias=bias,
        decoder_bias=decoder_bias,
        # SAELens's own default; a transcoder's bias is of another place
        subtracted=decoder_bias if known.get("apply_b_dec_to_input", True) and inside == outside else None,
        skip=skip,
        about={"format": "SAELens", "source": folder.name, "config": config},
        **own,
    )


def write_saelens(dictionary: Dictionary, folder: str | Path, *, model_name: str = "") -> None:
    """Write a dictionary as SAELens reads it: scales and centres folded in, `batchtopk` as JumpReLU with its threshold.

    What an MLP reads is named `mlp.hook_in`, which is that in every model; TransformerLens's name of the norm before it is not.

    Args:
        dictionary: An autoencoder of one place, or a transcoder.
        folder: Where.
        model_name: Written beside the hook's name.

    Raises:
        SettingsError: SAELens has no such dictionary, or folding would change which latents are chosen.
        RunError: The folder cannot be written.
    """
    layout = dictionary.layout
    if len(layout.inputs) > 1 or len(layout.outputs) > 1:
        raise SettingsError(f"SAELens has no dictionary that reads or writes several places ({', '.join(map(str, layout.places))})")
    folded = (dictionary.normed() if layout.rule.by_norm else dictionary).folded()
    own = folded.tensors
    across = layout.inputs != layout.outputs
    name = {"relu": "standard", "batchtopk": "jumprelu"}.get(layout.rule.name, layout.rule.name)
    if across:
        if name not in ("standard", "jumprelu"):
            raise SettingsError(f"SAELens has no transcoder with rule {layout.rule.name}: relu, jumprelu and batchtopk can be written")
        name = {"standard": "", "jumprelu": "jumprelu_"}[name] + ("skip_" if layout.skip else "") + "transcoder"
    tensors = {"W_enc": own["encoder.0"].T, "W_dec": own["decoder.0"], "b_dec": own["decoder_bias"]}
    match layout.rule.name:
        case "gated":
            tensors |= {"b_gate": own["encoder_bias"], "r_mag": own["magnitude_log"], "b_mag": own["magnitude_bias"]}
        case "jumprelu" | "batchtopk":
            tensors |= {"b_enc": own["encoder_bias"], "threshold": own["threshold"].expand(layout.latents)}
        case _:
            tensors["b_enc"] = own["encoder_bias"]
    if layout.skip:
        tensors["W_skip"] = own["skip"]
    metadata: dict[str, Any] = {
        "model_name": model_name,
        "hook_name": hook_of(layout.inputs[0]),
        "mechscope_fingerprint": dictionary.fingerprint,
    }
    config: dict[str, Any] = {
        "architecture": name,
        "d_in": layout.input_widths[0],
        "d_sae": layout.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if layout.inputs[0].site == "z" else "none",
    }
    if layout.rule.name == "topk":
        config["k"] = layout.rule.k
    if across:
        config["d_out"] = layout.output_widths[0]
        metadata["hook_name_out"] = hook_of(layout.outputs[0])
    folder = Path(folder)
    write_safetensors(tensors, folder / _WEIGHTS)
    write_json({**config, "metadata": metadata}, folder / _CONFIG)
