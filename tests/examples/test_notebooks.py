"""Pages of tasks are what their notebooks print, and each has what such a page is to have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "examples" / "notebooks").glob("*.py"))
RUNNER = ROOT / "docs" / "extensions" / "notebooks.py"


def page_of(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_there_is_a_notebook_for_each_task() -> None:
    tasks = {"calibrate", "error_bars", "foreign", "hugging_face", "evidence", "continual"}
    tasks |= {"bayesian_optimization", "serving", "processes"}
    assert set(NOTEBOOKS) >= tasks


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_page_has_the_cells_of_its_notebook(name: str) -> None:
    script = (ROOT / "examples" / "notebooks" / f"{name}.py").read_text(encoding="utf-8")
    lines = {line.strip() for line in page_of(name).splitlines()}
    for line in script.splitlines():
        said = (
            line.removeprefix("# ").strip() if line.startswith("# ") and not line.startswith("# %%") else line.strip()
        )
        assert line.startswith(("# %%", "#\n")) or said in {"", "#"} or {said, line.strip()} & lines, line


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_page_has_ten_lines_a_picture_and_what_is_simpler(name: str) -> None:
    page = page_of(name)
    for heading in ("Ten lines", "The picture", "When something simpler is enough", "What next"):
        assert f"## {heading}\n" in page
    pictures = re.findall(rf"!\[(.+)\]\((assets/{name}-\d\.png)\)", page)
    assert pictures
    for described, file in pictures:
        assert len(described) > 20
        assert (ROOT / "docs" / file).stat().st_size < 60_000


@pytest.mark.slow  # each is a program that trains a network
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_page_is_what_the_notebook_prints(name: str) -> None:
    command = [sys.executable, "-W", "error::UserWarning", str(RUNNER), "--check", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=600, env=environment)
