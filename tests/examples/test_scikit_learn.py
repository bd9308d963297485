"""The example of scikit-learn runs as a user would run it, and finds what its text says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a program of its own
EXAMPLE = Path(__file__).parents[2] / "examples" / "scikit_learn.py"


def test_the_confidence_is_the_accuracy(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--output", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    cells = re.findall(r"^\| (the network|Calibrated[^|]*|LaplaceClassifier) \| (.*) \|$", printed, re.MULTILINE)
    rows = {name: [float(cell) for cell in row.split("|")] for name, row in cells}
    ours, alone = rows["LaplaceClassifier"], rows["the network"]
    assert ours[1] < min(row[1] for name, row in rows.items() if name != "LaplaceClassifier")
    assert abs(ours[2] - ours[0]) < abs(alone[2] - alone[0])
    assert (tmp_path / "scikit_learn.png").stat().st_size > 10_000
    assert "Best of the search" in printed
