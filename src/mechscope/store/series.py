"""A series of checkpoints: where its steps lie and in which order; nothing is loaded.

A series is a folder of numbered models or adapters (`checkpoint-100`, as the Trainer of Hugging Face and `mechscope tune --keep-every` write them,
`step1000`, `200`), several folders joined by commas, or a model on the hub whose branches are called `step0`, `step512`, …, as Pythia's and OLMo's are.
Steps stand in the order of their numbers, not of their names: `checkpoint-1000` comes behind `checkpoint-200`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mechscope.errors import ModelError
from mechscope.store.paths import absent, check_model_path, is_path

_NUMBERED = re.compile(r"(.*?)[-_ ]?(\d+)")
_BRANCH = re.compile(r"step[-_]?(\d+)")
# what a model or an adapter is made of; nothing that unpickles
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
# what decides how a model acts
_DECIDE = ("*.safetensors", "config.json", "adapter_config.json")
# of a configuration or an adapter's: what no step of a training changes
_ALIKE = (
    *("model_type", "base_model_name_or_path", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head"),
    *("num_key_value_heads", "intermediate_size", "n_inner", "vocab_size"),
)
# names that a trainer gives its checkpoints: beside others, these are meant
_USUAL = ("checkpoint", "step")


@dataclass(frozen=True)
class Step:
    """One checkpoint of a series.

    Attributes:
        number: Its step.
        source: Its folder; of a series on the hub the model's id.
        revision: The commit of a series on the hub; empty for a folder.
    """

    number: int
    source: str
    revision: str = ""

    def folder(self) -> Path:
        """Return the folder of its files; those of a step on the hub are fetched into the hub's cache.

        Raises:
            ModelError: The hub does not give them.
        """
        if not self.revision:
            return Path(self.source).expanduser()
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.source, revision=self.revision, allow_patterns=list(_FILES)))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"step {self.number:,} of {self.source!r} cannot be fetched from the hub: {' '.join(str(error).split())}"
            ) from error

    @property
    def fingerprint(self) -> str:
        """The hash of the files that decide how it acts: its weights and its configuration; of a step on the hub its commit."""
        if self.revision:
            return self.revision
        from mechscope.store.hashing import hash_file, hash_json

        folder = self.folder()
        return hash_json({file.name: hash_file(file) for pattern in _DECIDE for file in sorted(folder.glob(pattern))})


@dataclass(frozen=True)
class Series:
    """The checkpoints of one training, in the order of their steps.

    Attributes:
        source: What the user named.
        steps: At least two.
    """

    source: str
    steps: tuple[Step, ...]

    @classmethod
    def find(cls, source: str | Path, *, only: Iterable[int] | None = None) -> Series:
        """Find the steps of a series.

        Args:
            source: A folder of numbered checkpoints, folders joined by commas, or a model on the hub with branches `step…`.
            only: Numbers of the steps that are wanted; all by default.

        Raises:
            ModelError: There is none, or only one; a folder holds no model; or a wanted step is not there.
        """
        text = str(source)
        if "," in text:
            steps = _listed([part.strip() for part in text.split(",") if part.strip()])
        elif problem := absent(text):
            raise ModelError(f"series {text!r}: {problem}")
        elif Path(text).expanduser().exists() or is_path(text):
            steps = _within(Path(text).expanduser())
        else:
            steps = _on_hub(text)
        if only is not None:
            wanted = sorted(set(only))
            known = {step.number: step for step in steps}
            if missing := [number for number in wanted if number not in known]:
                raise ModelError(f"series {text!r} has no step {missing[0]}: it has {_numbers(known)}")
            steps = [known[number] for number in wanted]
        if len(steps) < 2:
            raise ModelError(f"series {text!r} has one step ({steps[0].number}): a course over time needs two or more")
        return cls(text, tuple(steps))

    def check_alike(self) -> None:
        """Refuse steps that are not of one training, by their configurations and vocabularies; those on the hub are not fetched for it.

        Raises:
            ModelError: One is an adapter and another a whole model, or sizes, bases or vocabularies differ; the message names the step and what differs.
        """
        here = [step for step in self.steps if not step.revision]
        known: dict[str, tuple[int, str]] = {}
        for step in here:
            for name, found in _shape(step.folder()).items():
                first, before = known.setdefault(name, (step.number, found))
                if found != before:
                    raise ModelError(
                        f"series {self.source!r} is not of one training: step {step.number} has {name} {found}, step {first} has {before}; "
                        "name the steps that belong together, joined by commas"
                    )


def _shape(folder: Path) -> dict[str, str]:
    """Return what all steps of a training have in common: kind, sizes, base and vocabulary."""
    adapter = folder / "adapter_config.json"
    file = adapter if adapter.is_file() else folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        words = folder / "tokenizer.json"
        vocabulary = json.loads(words.read_text(encoding="utf-8")) if words.is_file() else None
    except (OSError, ValueError) as error:
        raise ModelError(f"step {str(folder)!r} cannot be read: {' '.join(str(error).split())}") from error
    found = {name: str(config[name]) for name in _ALIKE if name in config}
    if vocabulary is not None:
        model = vocabulary.get("model", {})
        digest = hashlib.sha256(json.dumps([model.get("vocab"), vocabulary.get("added_tokens")], sort_keys=True).encode()).hexdigest()
        found["vocabulary"] = f"{len(model.get('vocab') or ())} words ({digest[:8]})"
    return {"kind": "adapter" if file == adapter else "whole model", **found}


def _listed(folders: list[str]) -> list[Step]:
    """Return folders that were named one by one: by their numbers where each has one of its own, else in the order given, from 0."""
    for folder in folders:
        check_model_path(folder)
    found = [_NUMBERED.fullmatch(Path(folder).name) for folder in folders]
    numbers = [int(match[2]) for match in found if match is not None]
    if len(set(numbers)) < len(folders):
        numbers = list(range(len(folders)))
    return sorted((Step(number, folder) for number, folder in zip(numbers, folders, strict=True)), key=lambda step: step.number)


def _within(folder: Path) -> list[Step]:
    """Return the numbered models and adapters in a folder."""
    if not folder.is_dir():
        raise ModelError(f"series {str(folder)!r} is a file: give the folder that holds checkpoint-1, checkpoint-2, …")
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise ModelError(f"series {str(folder)!r} cannot be read: {error.strerror or error}: make the folder readable") from error
    named: dict[str, list[Step]] = {}
    for path in inside:
        if (match := _NUMBERED.fullmatch(path.name)) and any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            named.setdefault(match[1].lower(), []).append(Step(int(match[2]), str(path)))
    if not named:
        held = ", ".join(path.name for path in inside[:6]) or "no folder"
        raise ModelError(
            f"series {str(folder)!r} holds no numbered checkpoints such as checkpoint-100, each with a model or an adapter (it holds {held})"
        )
    usual = next((name for name in _USUAL if name in named), None)
    if usual is None and len(named) > 1:
        raise ModelError(
            f"series {str(folder)!r} holds checkpoints of {len(named)} names ({', '.join(sorted(named))}): name those of one training, joined by commas"
        )
    steps = named[usual] if usual is not None else next(iter(named.values()))
    numbers = [step.number for step in steps]
    if twice := next((number for number in numbers if numbers.count(number) > 1), None):
        raise ModelError(f"series {str(folder)!r} holds step {twice} twice: name the folders one by one, joined by commas")
    return sorted(steps, key=lambda step: step.number)


def _on_hub(model: str) -> list[Step]:
    """Return the branches `step…` of a model on the hub."""
    from huggingface_hub import list_repo_refs
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        branches = list_repo_refs(model).branches
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"series {model!r} is no folder here, and the hub does not list its branches: {' '.join(str(error).split())[:200]}"
        ) from error
    found = [(match, branch.target_commit) for branch in branches if (match := _BRANCH.fullmatch(branch.name))]
    if not found:
        raise ModelError(
            f"model {model!r} on the hub has no branches step0, step1, …: name a folder of checkpoints, or a model that was published with them"
        )
    return sorted((Step(int(match[1]), model, commit) for match, commit in found), key=lambda step: step.number)


def _numbers(known: Iterable[int]) -> str:
    """Write the numbers of steps, the middle of many left out."""
    texts = [str(number) for number in sorted(known)]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:4], "…", *texts[-3:]])
