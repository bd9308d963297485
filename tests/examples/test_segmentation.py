"""The example of segmentation runs as a user would run it, and finds what its text says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a program of its own
EXAMPLE = Path(__file__).parents[2] / "examples" / "segmentation.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the example prints, and the folder it writes to."""
    folder = tmp_path_factory.mktemp("segmentation") / "a new folder"
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--output", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout, folder


def table(printed: str) -> dict[str, list[float]]:
    """Rows of numbers by their names."""
    rows = re.findall(r"^\| (network|Laplace) \| (.*) \|$", printed, re.MULTILINE)
    return {name: [float(cell) for cell in cells.split("|")] for name, cells in rows}


def test_probabilities_find_the_wrong_pixels(run: tuple[str, Path]) -> None:
    rows = table(run[0])
    assert (run[1] / "segmentation.md").read_text(encoding="utf-8").strip() == run[0].strip()
    for wrong, _, _, found in rows.values():
        assert 0.02 < wrong < 0.1  # always "background" is wrong at 0.138
        assert found > 0.85
    assert rows["Laplace"][2] < rows["network"][2]


def test_a_digit_that_was_never_seen_is_not_noticed_as_the_text_says(run: tuple[str, Path]) -> None:
    found = re.search(r"by 1 - max p: AUROC (0\.\d+); by ood_score: (0\.\d+)", run[0])
    assert found is not None
    assert all(0.35 < float(value) < 0.65 for value in found.groups())


def test_the_picture_is_written(run: tuple[str, Path]) -> None:
    assert (run[1] / "segmentation.png").read_bytes().startswith(b"\x89PNG")
