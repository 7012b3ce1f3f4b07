"""circuit-tracer's folders: `config.yaml` beside `layer_i.safetensors` (one transcoder per layer) or `W_enc_i`, `W_dec_i` (a cross-layer transcoder).

f_l  = activation(x_l W_encᵀ + b_enc)                W_enc (latent, d)
x̂_l  = f_l W_dec + b_dec [+ x_l W_skipᵀ]             cross-layer: Σ over l' ≤ l of f_l' W_dec,l'[:, l − l']
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mechscope.errors import ModelError, RunError, SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.formats.hooks import place_of
from mechscope.features.formats.parts import between, safetensors, taken, write_safetensors
from mechscope.features.layout import Group, Layout
from mechscope.features.places import Place
from mechscope.features.rules import Rule
from mechscope.store.files import reading, write_text


def read_circuit_tracer(folder: str | Path, *, hooks: tuple[str, str] | None = None) -> dict[Place, Dictionary]:
    """Read a folder of circuit-tracer.

    Args:
        folder: The folder.
        hooks: What they read and write, instead of what the folder says where that stands for a place in some models only (`ln2.hook_normalized`,
            `mlp.hook_out`): `("mlp.hook_in", "hook_mlp_out")` for what the MLP reads and adds.

    Returns:
        Dictionaries by the first place that each writes: one per layer, or one cross-layer transcoder.

    Raises:
        SettingsError: A hook's name stands for no place, or for one in some models only.
        ModelError: The activation is not supported, or tensors are missing.
        RunError: A file is missing or damaged.
    """
    folder = Path(folder)
    with reading(folder):
        config: Any = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(config, Mapping) or "model_kind" not in config:
        raise RunError(f"{folder}/config.yaml does not say its model_kind: it is no folder of circuit-tracer")
    said = tuple(str(config[f"feature_{side}_hook"]) for side in ("input", "output"))
    kinds = {"transcoder_set": _per_layer, "cross_layer_transcoder": _cross_layer}
    if config["model_kind"] not in kinds:
        raise ModelError(f"{folder}: model_kind {config['model_kind']!r} is not supported: {' and '.join(kinds)} are")
    return kinds[config["model_kind"]](folder, dict(config), hooks or said)


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    found = {int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))}
    if sorted(found) != list(range(len(found))) or not found:
        raise RunError(f"{folder} holds the layers {sorted(found)}: expected a file for every layer from 0 on")
    return dict(sorted(found.items()))


def _between(hooks: tuple[str, ...], layer: int) -> tuple[Place, Place]:
    inside, outside = (place_of(f"blocks.{layer}.{hook}") for hook in hooks)
    return inside, outside


def _per_layer(folder: Path, config: dict[str, Any], hooks: tuple[str, ...]) -> dict[Place, Dictionary]:
    found = {}
    for layer, path in _numbered(folder, r"layer_(\d+)\.safetensors").items():
        tensors = safetensors(path)
        if "k" in tensors or config.get("activation") == "topk":
            raise ModelError(f"{path}: topk of circuit-tracer keeps values below zero, which no rule of mechscope does")
        inside, outside = _between(hooks, layer)
        threshold = tensors.get("activation_function.threshold")
        own = {} if threshold is None else {"threshold": threshold.float().reshape(-1).expand(len(tensors["b_enc"])).contiguous()}
        found[outside] = between(
            inside,
            outside,
            Rule("jumprelu" if own else "relu"),
            encoder=taken(tensors, "W_enc", path),
            decoder=taken(tensors, "W_dec", path),
            encoder_bias=taken(tensors, "b_enc", path),
            decoder_bias=taken(tensors, "b_dec", path),
            skip=taken(tensors, "W_skip", path) if "W_skip" in tensors else None,
            about={"format": "circuit-tracer", "source": folder.name, "config": config},
            **own,
        )
    return found


def _cross_layer(folder: Path, config: dict[str, Any], hooks: tuple[str, ...]) -> dict[Place, Dictionary]:
    files = _numbered(folder, r"W_enc_(\d+)\.safetensors")
    made: dict[str, Tensor] = {}
    biases, out, thresholds, groups, sites = [], [], [], [], []
    for layer, path in files.items():
        tensors, decoders = safetensors(path), safetensors(folder / f"W_dec_{layer}.safetensors")
        if any("W_skip" in name for name in tensors):
            raise SettingsError(f"{path}: a skip map beside a cross-layer transcoder is not supported")
        made[f"encoder.{layer}"] = taken(tensors, f"W_enc_{layer}", path)
        made[f"decoder.{layer}"] = taken(decoders, f"W_dec_{layer}", folder).flatten(1)
        biases.append(taken(tensors, f"b_enc_{layer}", path))
        out.append(taken(tensors, f"b_dec_{layer}", path))
        if f"threshold_{layer}" in tensors:
            thresholds.append(tensors[f"threshold_{layer}"].float().reshape(-1).expand(len(biases[-1])))
        groups.append(Group(len(biases[-1]), (layer, layer + 1), (layer, len(files))))
        sites.append(_between(hooks, layer))
    widths = tuple(len(each) for each in out)
    inside, outside = (tuple(each[side] for each in sites) for side in (0, 1))
    read = tuple(made[f"encoder.{layer}"].shape[1] for layer in files)
    layout = Layout(inside, outside, read, widths, tuple(groups), Rule("jumprelu" if thresholds else "relu"))
    made |= {"encoder_bias": torch.cat(biases), "decoder_bias": torch.cat(out)}
    if thresholds:
        made["threshold"] = torch.cat(thresholds)
    return {outside[0]: Dictionary.plain(layout, made, about={"format": "circuit-tracer", "source": folder.name, "config": config})}


def write_circuit_tracer(
    dictionaries: Mapping[Place, Dictionary] | Mapping[str, Dictionary], folder: str | Path, *, model_name: str = "", scan: str = ""
) -> None:
    """Write transcoders of every layer, or one cross-layer transcoder, as circuit-tracer reads them; scales and centres are folded in.

    Args:
        dictionaries: By the first place that each writes, as `read_circuit_tracer` returns them.
        folder: Where.
        model_name: Hugging Face name of the model.
        scan: What circuit-tracer calls the set.

    Raises:
        SettingsError: They are no transcoders of all layers from 0 on, nor one cross-layer transcoder alone; their rule is none of circuit-tracer's, or
            folding would change what is chosen.
        RunError: The folder cannot be written.
    """
    given = sorted(dictionaries.values(), key=lambda each: each.layout.outputs[0])
    layers = [place.layer for each in given for place in each.layout.inputs]
    for each in given:
        if {place.site for place in each.layout.inputs} != {"mlp_input"} or {place.site for place in each.layout.outputs} != {"mlp_output"}:
            raise SettingsError(
                f"circuit-tracer has transcoders from MLP inputs to MLP outputs: this one is of {', '.join(map(str, each.layout.places))}"
            )
        if each.layout.rule.name not in ("relu", "jumprelu", "batchtopk"):
            raise SettingsError(f"rule {each.layout.rule.name} is none of circuit-tracer's: relu, jumprelu and batchtopk can be written")
    if layers != list(range(len(layers))) or not layers:
        raise SettingsError(
            f"circuit-tracer wants a transcoder of every layer from 0 on: given are layers {', '.join(map(str, layers)) or 'none'}"
        )
    across = any(len(each.layout.inputs) > 1 or len(each.layout.outputs) > 1 for each in given)
    if across and len(given) > 1:
        raise SettingsError(
            f"a folder of circuit-tracer holds one cross-layer transcoder or transcoders of single layers: given are {len(given)} of which some are "
            "cross-layer; write them to folders of their own"
        )
    if across and given[0].layout.skip:
        raise SettingsError("a skip map beside a cross-layer transcoder is not supported")
    folder = Path(folder)
    config = {
        "model_kind": "cross_layer_transcoder" if across else "transcoder_set",
        "model_name": model_name,
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": scan,
    }
    for layer, each in enumerate(given):
        plain = (each.normed() if each.layout.rule.by_norm else each).folded()
        files = _cross_layer_files(plain) if across else {f"layer_{layer}.safetensors": _layer_tensors(plain)}
        for name, tensors in files.items():
            write_safetensors(tensors, folder / name)
    write_text(yaml.safe_dump(config, sort_keys=False), folder / "config.yaml")


def _threshold(dictionary: Dictionary) -> Tensor | None:
    threshold = dictionary.tensors.get("threshold")
    return None if threshold is None else threshold.expand(dictionary.latents)


def _layer_tensors(dictionary: Dictionary) -> dict[str, Tensor]:
    own, threshold = dictionary.tensors, _threshold(dictionary)
    found = {"W_enc": own["encoder.0"], "W_dec": own["decoder.0"], "b_enc": own["encoder_bias"], "b_dec": own["decoder_bias"]}
    if threshold is not None:
        found["activation_function.threshold"] = threshold
    return found | ({"W_skip": own["skip"]} if dictionary.layout.skip else {})


def _cross_layer_files(dictionary: Dictionary) -> dict[str, dict[str, Tensor]]:
    layout, own, threshold = dictionary.layout, dictionary.tensors, _threshold(dictionary)
    out, files = own["decoder_bias"].split(layout.output_widths), {}
    for layer, (group, (start, stop)) in enumerate(zip(layout.groups, layout.spans, strict=True)):
        if (group.reads, group.writes) != ((layer, layer + 1), (layer, len(layout.outputs))):
            raise SettingsError("circuit-tracer's cross-layer latents read one layer and write it and all later ones: these do not")
        tensors = {
            f"W_enc_{layer}": own[f"encoder.{layer}"],
            f"b_enc_{layer}": own["encoder_bias"][start:stop],
            f"b_dec_{layer}": out[layer],
        }
        if threshold is not None:
            tensors[f"threshold_{layer}"] = threshold[start:stop]
        files[f"W_enc_{layer}.safetensors"] = tensors
        files[f"W_dec_{layer}.safetensors"] = {f"W_dec_{layer}": own[f"decoder.{layer}"].unflatten(1, (-1, layout.output_widths[0]))}
    return files
