"""Tests of packages that were written for laplace-torch, unchanged, on this library."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch


def pytest_report_header() -> str:
    """Which versions run."""
    packages = ("torch", "torchvision", "laplace-bayesopt", "lightning-uq-box", "torch-uncertainty")
    return ", ".join(f"{name} {version(name)}" for name in packages)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A row for each client: what passed, what failed."""
    counts: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            client = Path(report.fspath).stem.removeprefix("test_").replace("_", "-")
            counts.setdefault(client, Counter())[outcome] += 1
    terminalreporter.section("clients")
    for client, count in sorted(counts.items()):
        failed = count["failed"] + count["error"]
        terminalreporter.write_line(f"{client:20}{count['passed']:5} passed{failed:5} failed")


@pytest.fixture(autouse=True, scope="session")
def _laplace_is_this_library() -> None:
    """laplace-torch has the same import name: where it is installed, nothing here would mean anything."""
    with pytest.raises(PackageNotFoundError):
        version("laplace-torch")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or beside others."""
    torch.manual_seed(0)
