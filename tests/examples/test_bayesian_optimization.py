"""The comparison of Bayesian optimization runs as a user would run it, and the page shows what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # programs of their own
ROOT = Path(__file__).parents[2]


def test_searches_are_read_again_and_written(tmp_path: Path) -> None:
    config = json.loads((ROOT / "benchmarks" / "bayesian_optimization.json").read_text(encoding="utf-8"))
    config["seeds"], config["samples"] = [100], 8
    config["acquisition"] = {"num_restarts": 1, "raw_samples": 8, "options": {"maxiter": 3}}
    budget = {"initial": 4, "rounds": 1, "q": 2}
    config["functions"] = [{"name": "Branin", "dim": 2, "budget": budget}]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "bayesian_optimization.py")]
    for name in ("config", "folder", "output", "picture"):
        ending = {"config": "config.json", "picture": "a new folder/picture.png"}.get(name, name)
        command += [f"--{name}", str(tmp_path / ending)]
    early = subprocess.run([*command, "--minutes", "-1"], capture_output=True, text=True, check=False, timeout=300)
    assert early.returncode == 1
    assert "4 searches are left" in early.stderr
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    again = subprocess.run([*command, "--minutes", "-1"], capture_output=True, text=True, check=True, timeout=300)
    assert again.stdout == (tmp_path / "output" / "bayesian_optimization.md").read_text(encoding="utf-8")
    (told,) = json.loads((tmp_path / "output" / "bayesian_optimization.json").read_text(encoding="utf-8"))["results"]
    assert set(told["runs"]) == set(config["methods"])
    for runs in told["runs"].values():
        (best,) = (one["best"] for one in runs)
        assert len(best) == 2
        assert best[0] <= best[1] <= told["optimum"] == pytest.approx(-0.397887)
    assert (tmp_path / "a new folder" / "picture.png").stat().st_size > 5_000


def test_the_committed_table_is_that_of_the_committed_results() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "bayesian_optimization.json").read_text(encoding="utf-8"))
    table = (ROOT / "benchmarks" / "results" / "bayesian_optimization.md").read_text(encoding="utf-8")
    assert found["config"] == json.loads(
        (ROOT / "benchmarks" / "bayesian_optimization.json").read_text(encoding="utf-8")
    )
    for one in found["results"]:
        for method, runs in one["runs"].items():
            last = torch.tensor([run_["best"][-1] for run_ in runs], dtype=torch.float64)
            error = last.std() / len(last) ** 0.5
            cells = f"| {method} | {last.quantile(0.5):.3f} | {last.mean():.3f} ± {error:.3f} |"
            assert cells in table, cells
