"""The examples of callbacks run as a user would run them, and the posterior is better than the network alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # programs of their own
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["lightning_callback", "hugging_face_trainer"])
def test_the_posterior_is_better_than_the_network(name: str) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    table = printed.rpartition("On test data:")[2]
    rows = {cells[0].strip(): cells for cells in re.findall(r"^\| (.*?)\|(.*?)\|(.*?)\|", table, re.MULTILINE)}
    nll = {row: float(cells[2]) for row, cells in rows.items() if row in ("MAP", "MAP, temperature T", "laplace")}
    assert nll["laplace"] < nll["MAP, temperature T"] < nll["MAP"]
    assert "On the validation data" in printed or "On the evaluation data" in printed
