"""The comparison of structures runs as a user would run it, and has a row for every one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from laplace.enums import HessianStructure

EXAMPLE = Path(__file__).parents[2] / "examples" / "structures.py"


@pytest.mark.slow
def test_every_structure_has_a_row_of_finite_numbers(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--output", str(tmp_path / "a new folder")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout
    table = (tmp_path / "a new folder" / "structures.md").read_text(encoding="utf-8")
    assert printed.startswith(table)
    rows = {cells[0].strip(): cells[1:] for cells in (line.strip("| ").split("|") for line in table.splitlines()[2:])}
    for structure in HessianStructure:
        assert any(structure.value in name for name in rows)
    assert any("subnetwork" in name for name in rows)
    for name, cells in rows.items():
        nll, ece, auroc = (float(cell) for cell in cells[-3:])
        assert 0 < nll < 1, name
        assert 0 < ece < 0.2, name
        assert 0.5 < auroc < 1, name
        if not name.startswith("the network"):
            assert all(float(cell.replace(",", "")) > 0 for cell in cells[:3]), name
