"""What a result depends on besides its settings: mechscope's own code, the libraries, Python and the kind of machine.

Only the machine's shape is recorded, never its name or a user's paths: a run folder may be published.
"""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mechscope.store.hashing import hash_folder


def environment() -> dict[str, Any]:
    """Return versions, the fingerprint of mechscope's code and the machine's shape, as JSON-able values."""
    required = [re.match(r"[\w.-]+", line) for line in metadata.requires("mechscope") or () if "extra ==" not in line]
    names = sorted(match[0] for match in required if match)
    return {
        "mechscope": metadata.version("mechscope"),
        "code": hash_folder(Path(__file__).parents[1], "**/*.py"),
        "python": platform.python_version(),
        "dependencies": {name: metadata.version(name) for name in names},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
    }
