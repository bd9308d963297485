"""Pages of tasks are notebooks: percent scripts that are run here, and written with what they print.

``python docs/extensions/notebooks.py [--check] [NAME ...]`` makes ``docs/NAME.md`` and its figures of
``examples/notebooks/NAME.py``, or compares. Cells of text are copied; a cell of code that has a title, as in
``# %% The data``, is folded; after a cell stand what it printed and its figures. Labels of figures, given by
``plt.subplots(num=...)``, describe them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import linecache
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"
DOCS = ROOT / "docs"
CELL = re.compile(r"^# %%(?P<head>.*)\n(?P<body>(?:(?!# %%).*\n)*)", re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")
CLOSE = 0.1
"""Numbers of a page may differ by so much, or by a quarter: other releases of PyTorch sum in another order."""


def fenced(language: str, text: str) -> str:
    """A block of code, or of what it printed; a table that was printed is one of the page."""
    if all(line.startswith("|") for line in text.strip().splitlines()):
        return text.strip()
    return f"```{language}\n{text.strip()}\n```"


def run(cell: re.Match[str], path: Path, names: dict[str, Any]) -> str:
    """Run a cell; what it printed."""
    line = path.read_text(encoding="utf-8").count("\n", 0, cell.start("body"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + cell["body"], str(path), "exec"), names)
    return printed.getvalue()


def figures(name: str, folder: Path | None, first: int) -> list[str]:
    """Save the figures that are open, where there is a folder for them, and show them on the page."""
    shown: list[str] = []
    for number in plt.get_fignums():
        figure = plt.figure(number)
        file = f"{name}-{first + len(shown)}.png"
        shown.append(f"![{figure.get_label()}](assets/{file})")
        if folder is not None:
            figure.savefig(folder / file, dpi=110, bbox_inches="tight", metadata={"Software": None})
            few = Image.open(folder / file).convert("RGB").quantize(64, dither=Image.Dither.NONE)
            few.save(folder / file, optimize=True)  # a third of the bytes
        plt.close(figure)
    return shown


def page(name: str, folder: Path | None = None) -> str:
    """Run a notebook, and write its page."""
    path = NOTEBOOKS / f"{name}.py"
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    linecache.checkcache(str(path))
    parts = [f"<!-- Written by docs/extensions/notebooks.py from examples/notebooks/{name}.py: change that file. -->"]
    n_figures = 1
    for cell in CELL.finditer(path.read_text(encoding="utf-8")):
        title = cell["head"].strip()
        if title == "[markdown]":
            parts.append(re.sub(r"^# ?", "", cell["body"], flags=re.MULTILINE).strip())
            continue
        printed = run(cell, path, names)
        code = fenced("python", cell["body"])
        if title:
            parts.append(f'??? note "{title}"\n\n' + textwrap.indent(code, "    "))
        else:
            parts.append(code)
        if printed.strip():
            parts.append(fenced("text", printed))
        shown = figures(name, folder, n_figures)
        n_figures += len(shown)
        parts += shown
    parts.append(
        f"---\n\nThis page is a notebook, `examples/notebooks/{name}.py`, with what it printed when it was last run:\n"
        f"`make notebooks` runs it again."
    )
    return "\n\n".join(parts) + "\n"


def differs(new: str, old: str) -> bool:
    """Whether two pages say different things: other words, or numbers that are far apart."""
    if NUMBER.sub("#", new) != NUMBER.sub("#", old):
        return True
    pairs = zip(map(float, NUMBER.findall(new)), map(float, NUMBER.findall(old)), strict=True)
    return any(abs(a - b) > max(CLOSE, abs(b) / 4) for a, b in pairs)


def main() -> None:
    """Write the pages, or compare them."""
    known = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the pages instead of writing them")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones, of {', '.join(known)}; default: all")
    chosen = parser.parse_args()
    mpl.use("agg")
    torch.set_num_threads(1)
    for name in chosen.names or known:
        file = DOCS / f"{name}.md"
        made = page(name, None if chosen.check else DOCS / "assets")
        if not chosen.check:
            file.write_text(made, encoding="utf-8")
        elif differs(made, file.read_text(encoding="utf-8")):
            print(made)
            sys.exit(f"{file.name} is not what the notebook prints: run `python docs/extensions/notebooks.py {name}`")


if __name__ == "__main__":
    main()
