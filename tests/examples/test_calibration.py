"""The calibration example runs as a user would run it, and writes what it says."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # a program of its own
EXAMPLE = Path(__file__).parents[2] / "examples" / "calibration.py"
STRUCTURES = ("full", "kron", "diag")
REPAIRED = [*(f"Laplace {structure}, tuned" for structure in STRUCTURES), "Laplace kron, T = 1"]
METHODS = ["MAP", "MAP, temperature T", *REPAIRED, *(f"Laplace {structure}, evidence" for structure in STRUCTURES)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the example prints, and the folder it writes to; two networks are enough for a mean."""
    folder = tmp_path_factory.mktemp("calibration") / "a new folder"
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--output", str(folder), "--networks", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout, folder


@pytest.fixture(scope="module")
def mean(run: tuple[str, Path]) -> dict[str, dict[str, float]]:
    record: dict[str, Any] = json.loads((run[1] / "calibration.json").read_text(encoding="utf-8"))
    return record["mean"]


def test_every_method_has_a_row_in_every_table(run: tuple[str, Path]) -> None:
    printed, folder = run
    written = (folder / "calibration.md").read_text(encoding="utf-8")
    assert written.strip() in printed
    for method in METHODS:
        assert len(re.findall(rf"^\| {re.escape(method)} *\|", written, flags=re.MULTILINE)) == 4


def test_every_number_is_finite(run: tuple[str, Path], mean: dict[str, dict[str, float]]) -> None:
    assert list(mean) == METHODS
    assert all(math.isfinite(value) for row in mean.values() for value in row.values())
    record = json.loads((run[1] / "calibration.json").read_text(encoding="utf-8"))
    assert record["images"] == {"train": 200, "validation": 400, "test": 1197, "photographs": 520}
    assert [list(rows) for rows in record["networks"]] == [METHODS, METHODS]


def test_the_picture_is_written(run: tuple[str, Path]) -> None:
    assert (run[1] / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_the_network_is_overconfident_and_validated_methods_repair_it(mean: dict[str, dict[str, float]]) -> None:
    plain = mean["MAP"]
    assert plain["ECE"] > 0.04
    for method in METHODS[1 : 2 + len(REPAIRED)]:
        assert mean[method]["ECE"] < 0.5 * plain["ECE"]
        assert mean[method]["NLL"] < 0.8 * plain["NLL"]
        assert abs(mean[method]["accuracy"] - plain["accuracy"]) < 0.01


def test_the_text_of_the_example_holds(mean: dict[str, dict[str, float]]) -> None:
    scaled = mean["MAP, temperature T"]
    assert scaled["accuracy"] == mean["MAP"]["accuracy"]
    assert abs(scaled["OOD AUROC"] - mean["MAP"]["OOD AUROC"]) < 0.02
    assert mean["Laplace full, evidence"]["OOD AUROC"] > scaled["OOD AUROC"]
    assert mean["Laplace full, evidence"]["ECE"] > 0.3
    assert mean["Laplace full, evidence"]["ECE 45°"] < 0.5 * scaled["ECE 45°"]
    tuned = [mean[name]["NLL"] for name in REPAIRED]
    assert max(tuned) - min(tuned) < 0.05
    tuned_kron = mean["Laplace kron, tuned"]
    assert tuned_kron["OOD AUROC"] > max(scaled["OOD AUROC"], mean["Laplace full, evidence"]["OOD AUROC"])
    assert tuned_kron["NLL 30°"] < scaled["NLL 30°"]
    assert abs(tuned_kron["NLL"] - mean["Laplace full, tuned"]["NLL"]) < 1e-3
