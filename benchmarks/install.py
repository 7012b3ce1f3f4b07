"""Installing the peers: `python -m benchmarks.install PYTHON` puts the packages of the extra `bench` into that Python's environment, one by one
(another extra where a second argument names it: `bench-older`, for peers that want an older TransformerLens).

mechscope itself is not installed there: its pins and the peers' need not agree. Torch is the one of the constraints file, so that all are measured on
the same; a peer that wants another cannot be installed, and is named. Needs nothing but Python 3.11.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def wanted(pyproject: Path, extra: str = "bench") -> list[str]:
    """Return the requirements of an extra."""
    extras = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return [str(requirement) for requirement in extras[extra]]


def torch_pin(constraints: Path) -> str:
    """Return the constraint on torch."""
    return next(line for line in constraints.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))


def install(python: str, requirements: Sequence[str], run: Callable[[list[str]], int]) -> list[str]:
    """Install requirements one by one; return those that could not be.

    Args:
        python: The interpreter.
        requirements: What to install.
        run: Runs a command and returns its exit code.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "torch.txt"
        constraints.write_text(f"{torch_pin(ROOT / 'constraints.txt')}\n", encoding="utf-8")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
        return [requirement for requirement in ("torch", *requirements) if run([*pip, requirement])]


def main(python: str, extra: str = "bench") -> int:
    """Install an extra and say what could not be installed."""
    failed = install(python, wanted(ROOT / "pyproject.toml", extra), lambda command: subprocess.run(command, check=False).returncode)
    for requirement in failed:
        print(f"could not be installed, so it will be absent: {requirement}")
    return 2 if "torch" in failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
