"""What a measurement depends on besides the code: the machine's shape and the versions. Never the machine's name, a user's or a path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.settings import BenchmarkError

_PACKAGES = ("torch", "transformers", "peft", "numpy", "mechscope")


def machine() -> dict[str, Any]:
    """Return the machine's shape, as JSON-able values."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "load": round(psutil.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Return Python's and the libraries' versions; of a library that is absent none."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_device(name: str) -> None:
    """See that a device is there.

    Raises:
        BenchmarkError: It is not.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BenchmarkError(f"--device {name} cannot be used ({reason}): give cpu, cuda or another device of this machine") from error


def shown(arguments: Sequence[str], root: Path) -> list[str]:
    """Write command-line arguments so that they may be published: paths from the project's root, or only the last name."""
    return [_shown(argument, root) for argument in arguments]


def _shown(argument: str, root: Path) -> str:
    option, equals, value = argument.partition("=")
    if equals and option.startswith("--"):
        return f"{option}={_shown(value, root)}"
    path = Path(argument)
    if not path.is_absolute():
        return argument
    if path.is_relative_to(root):
        return str(path.relative_to(root))
    if path.is_relative_to(root.parent):
        return str(Path("..") / path.relative_to(root.parent))
    return path.name


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
