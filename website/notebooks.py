"""The notebooks of docs/notebooks: executed in place, and turned into pages of the site.

A notebook is kept with its outputs, so that it can be read where nothing runs; `python -m website.notebooks` executes all of them again. Pictures are
SVG; what differs from run to run or names this machine (times, execution numbers' dates, kernels) is left out.
"""

from __future__ import annotations

import html
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"

# colours of the terminal, which IPython puts into errors
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def paths() -> list[Path]:
    """Return all notebooks, sorted by name."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path) -> Any:
    """Run a notebook from the top in an empty kernel and return it with its outputs; nothing is written.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """Return a notebook without what is about this run of it only, and with outputs of one kind each: picture, HTML or text."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        # what libraries say on the side is about this machine
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            output.pop("metadata", None)
            if "data" in output:
                output.metadata = {}
                # what is drawn needs no words beside it, and a table in HTML no table in text
                best = next((kind for kind in ("image/svg+xml", "text/html", "text/plain") if kind in output.data), None)
                output.data = {kind: value for kind, value in output.data.items() if kind in (best, "text/plain") and not _is_object(value)}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def _is_object(value: str) -> bool:
    return value.startswith("alt.") or re.fullmatch(r"<[^<>]* at 0x[0-9a-f]+>", value) is not None


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the pictures that it shows, by file name."""
    notebook, parts, pictures = nbformat.read(path, as_version=4), [], {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for place, output in enumerate(cell.outputs):
            data = output.get("data", {})
            if "image/svg+xml" in data:
                name = f"{path.stem}-{number}-{place}.svg"
                pictures[name] = data["image/svg+xml"].encode()
                parts.append(f"![Output of the cell above]({name})")
            elif "text/html" in data:
                # in one line: Markdown ends a block of HTML at an empty one
                parts.append(f'<div class="output">{" ".join(data["text/html"].split())}</div>')
            else:
                text = output.get("text") or data.get("text/plain") or "\n".join(output.get("traceback", ()))
                parts.append(f'<pre class="output">{html.escape(_ANSI.sub("", text)).rstrip()}</pre>')
    return "\n\n".join(parts) + "\n", pictures


if __name__ == "__main__":
    for each in [Path(name) for name in sys.argv[1:]] or paths():
        nbformat.write(execute(each), each)
        print(each.name, f"{each.stat().st_size / 1000:,.0f} kB")
