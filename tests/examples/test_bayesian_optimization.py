"""Bayesian optimization: the example, the page and the comparison run as a user would run them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.examples.test_docs import run

pytestmark = pytest.mark.slow  # programs of their own
ROOT = Path(__file__).parents[2]
STRICT = ["-W", "error", "-W", "ignore:`torch.jit.script` is deprecated:DeprecationWarning"]
"""linear_operator is scripted when it is imported."""


def test_the_example_finds_more_than_random_points(tmp_path: Path) -> None:
    command = [sys.executable, *STRICT, str(ROOT / "examples" / "bayesian_optimization.py"), "--output", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400).stdout
    best = [float(value) for value in re.findall(r"^round \d: found +\S+, best +(\S+)$", printed, re.MULTILINE)]
    assert len(best) == 8
    assert best == sorted(best)
    found = re.search(r"best of 24 values (\S+); of as many Sobol points (\S+)", printed)
    assert found is not None
    assert float(found[1]) > float(found[2])
    assert (tmp_path / "bayesian_optimization.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:The noise that the evidence chose")  # of targets without noise
@pytest.mark.filterwarnings("ignore::linear_operator.utils.warnings.NumericalWarning")
@pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.BotorchWarning")
def test_the_code_of_the_page_proposes_points_at_the_maximum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("bayesian_optimization.md", tmp_path, monkeypatch)
    for points in (names["chosen"], names["best"]):
        assert ((points >= 0) & (points <= 1)).all()
    distance = (names["chosen"] - 0.4).norm(dim=1)
    assert float(distance.min()) < 0.15


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
