"""Circuits on a page: invented edges and runs, and what a picture of them draws."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pandas as pd

from mechscope.report.page import render
from tests.report import synthetic

SVG = "{http://www.w3.org/2000/svg}"


def some_edges(*names: str, scores: list[float] | None = None) -> pd.DataFrame:
    sender, receiver = zip(*(name.split("->") for name in names), strict=True)
    return pd.DataFrame({"edge": names, "sender": sender, "receiver": receiver, "score": scores or [-0.5] * len(names)})


def drawn_edges(svg: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter(f"{SVG}path") if "edge" in element.get("class", "").split()]


def drawn_nodes(svg: str) -> list[str]:
    found = [element for element in ElementTree.fromstring(svg).iter(f"{SVG}g") if element.get("class") == "node"]
    return [element.get("data-node", "") for element in found if element.get("display") != "none"]


def by_title(svg: str) -> dict[str, ElementTree.Element]:
    titled = {element: element.find(f"{SVG}title") for element in drawn_edges(svg)}
    return {str(title.text).splitlines()[0]: element for element, title in titled.items() if title is not None}


def run_of(tmp_path: Path, kind: str, tables: dict[str, pd.DataFrame]) -> Path:
    settings: dict[str, object] = {"model": "models/gpt2"} if kind == "circuit" else {"base": "models/gpt2", "tuned": "runs/tuned"}
    folder = synthetic.write_run(tmp_path / "run", tables, study=settings, record=synthetic.manifest() | {"kind": kind})
    render(folder)
    return folder
