"""The comparison with temperature scaling runs as a user would run it; what it writes belongs together."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality.py"


@pytest.mark.slow
def test_one_network_in_every_way(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), "--count", "1", "--output", str(tmp_path / "a new folder")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout
    found = json.loads((tmp_path / "a new folder" / "quality.json").read_text(encoding="utf-8"))
    assert printed.endswith((tmp_path / "a new folder" / "quality.md").read_text(encoding="utf-8"))
    (run,) = found["runs"]
    methods = run["methods"]
    for name, one in methods.items():
        assert one["d"] == pytest.approx(one["nll"] - methods["TS"]["nll"], abs=1e-6), name
        assert one["d"] == found["summary"][name]["d"]["mean"]
        assert 0 < one["ece"] < 0.2 < 0.8 < one["accuracy"] < 1, name
        assert set(one["ood"]) == {"near", "mid", "far"}, name
    assert methods["TS"]["accuracy"] == methods["MAP"]["accuracy"]
    assert [methods[name]["evaluations"] for name in ("TS", "ensemble", "default")] == [1, 3, 1]
    cost = methods["default"]["cost"]
    assert [cost[f"`tune`: passes of the {name} loader"] for name in ("training", "validation")] == [0, 1]
    by_name = {bar["what"]: bar["kept"] for bar in found["bars"]}
    assert by_name["mean d"] == (methods["default"]["d"] <= found["config"]["bars"]["mean"])
    gap = methods["default"]["ood"]["far"] - methods["TS"]["ood"]["far"]
    assert by_name["AUROC of 1 − max p, far"] == (gap >= found["config"]["bars"]["far"])
    assert not by_name["mean d + 2 standard errors"], "one network has no standard error"
    assert math.isnan(found["summary"]["default"]["d"]["standard error"])
