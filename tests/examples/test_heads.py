"""The examples of several heads and of a language model run as a user would run them, and find what their texts say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # programs of their own
FOLDER = Path(__file__).parents[2] / "examples"


def printed(name: str, folder: Path) -> dict[str, list[float]]:
    """The rows of the table that an example prints; its picture is written."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--output", str(folder / "a new folder")]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    assert (folder / "a new folder" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: [float(cell) for cell in cells[1:]] for cells in rows[1:]}


def test_two_heads(tmp_path: Path) -> None:
    rows = printed("heads", tmp_path)
    plain, ours = rows["the network"], rows["both heads with a posterior"]
    assert ours[0] < plain[0] + 0.01  # digits
    assert ours[1] > plain[1] - 0.01
    assert ours[2] < plain[2]  # angles
    assert 0.85 < ours[3] < 0.95


def test_letters(tmp_path: Path) -> None:
    rows = printed("tokens", tmp_path)
    nonsense, english = rows["the same in ROT13"], rows["the Zen of Python"]
    assert nonsense[0] > 1.3 * english[0]
    assert abs(nonsense[1] - english[1]) < 0.4  # entropies do not tell
    assert nonsense[3] > english[3]  # the density tells a little
    assert all(0 < row[2] < row[1] for row in rows.values())
