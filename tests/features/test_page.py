"""The examples of the page on features run as they stand, one after another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "features.md"


def test_every_example_of_the_page_on_features_runs(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8").replace("/tmp/", f"{tmp_path}/")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"features.md, example {number + 1}", "exec"), names)
    # what the page says of its own examples
    assert torch.equal(names["same"], names["plain"])
    assert not torch.equal(names["without"], names["plain"])
    assert names["explained"] > names["chance"] + 0.2
    assert names["trained"]["nested"].curve["loss"].iloc[-1] < names["trained"]["nested"].curve["loss"].iloc[0]
    stream = torch.randn(20, names["width"])
    (one,), (two,) = names["dictionary"]([stream]), names["again"]([stream])
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert len(names["board"].latents) == 40
    assert len(names["told"].explanations) == 7
    assert names["steered"].shape[1] == names["ids"].shape[1] + 5
