"""The example of serving runs as a user would run it: answers without PyTorch are those of the estimator."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a program of its own
EXAMPLE = Path(__file__).parents[2] / "examples" / "serve.py"


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the extra onnx")
def test_what_is_served_is_what_was_tuned(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--output", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout
    cells = re.findall(r"^\| (the network|tuned) \| (.*) \|$", printed, re.MULTILINE)
    rows = {name: [cell.strip() for cell in row.split("|")] for name, row in cells}
    assert rows.keys() == {"the network", "tuned"}
    for _, _, _, difference, imports in rows.values():
        assert float(difference) <= 1e-5
        assert imports == "neither torch nor laplace"
    assert float(rows["tuned"][0]) < float(rows["the network"][0])
    assert not re.search(r"^(?:import|from) (?:torch|laplace)", (tmp_path / "server.py").read_text(), re.MULTILINE)
