"""Say, as a line of JSON, which peers this Python has: by package, its `version`, or why it is `absent`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json

from benchmarks.peers import NAMES

# packages that an index has under another name
_DISTRIBUTIONS = {"sparsify": "eai-sparsify"}


def look(package: str) -> dict[str, str]:
    """Say whether a package is here."""
    if importlib.util.find_spec(package) is None:
        return {"absent": "not installed"}
    if package in ("eap", "circuit_tracer", "sae_lens"):
        return _on_older_lens(package)
    return {"version": importlib.metadata.version(_DISTRIBUTIONS.get(package, package))}


def _on_older_lens(package: str) -> dict[str, str]:
    """EAP-IG's code, circuit-tracer and SAELens need an older TransformerLens; the first two are often folders on the path, without a version."""
    if importlib.util.find_spec("transformer_lens") is None:
        return {"absent": "it needs transformer_lens before 4.0, which is not installed beside it"}
    beneath = importlib.metadata.version("transformer_lens")
    if int(beneath.partition(".")[0]) >= 4:
        return {"absent": f"it needs transformer_lens before 4.0, beside it is {beneath}"}
    try:
        return {"version": importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        return {"version": f"on transformer_lens {beneath}"}


if __name__ == "__main__":
    print(json.dumps({package: look(package) for package in NAMES}))
