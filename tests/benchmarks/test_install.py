"""The peers are installed one by one, with the torch that everything is measured on."""

from __future__ import annotations

from pathlib import Path

from benchmarks.install import ROOT, install, torch_pin, wanted


def test_what_cannot_be_installed_is_named_and_the_rest_installed() -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        constraints = Path(command[command.index("-c") + 1])
        assert constraints.read_text(encoding="utf-8").strip() == torch_pin(ROOT / "constraints.txt")
        return int("bad" in command[-1])

    assert install("python", ["one", "bad>=2", "two"], run) == ["bad>=2"]
    assert [command[-1] for command in commands] == ["torch", "one", "bad>=2", "two"]
    assert all(command[0] == "python" for command in commands)


def test_the_extra_names_the_peers_that_are_packages() -> None:
    names = [requirement.partition(">=")[0] for requirement in wanted(ROOT / "pyproject.toml")]
    assert {"nnsight", "transformer-lens", "psutil", "eai-sparsify"} <= set(names)
    assert {each.partition(">=")[0] for each in wanted(ROOT / "pyproject.toml", "bench-older")} == {"psutil", "sae-lens"}
