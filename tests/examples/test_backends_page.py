"""The page on back ends: its code runs, and its tables and numbers are those of declarations and measurements."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from laplace import Laplace
from laplace.curvature import BACKENDS, AutogradGGN
from tests.examples.test_docs import DOCS, run
from tests.tools import assert_close

RESULTS = DOCS.parent / "benchmarks" / "results"


def script() -> ModuleType:
    """The script that writes the table of capabilities."""
    spec = importlib.util.spec_from_file_location("capabilities", DOCS / "extensions" / "capabilities.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_capabilities_is_what_the_back_ends_declare() -> None:
    assert (RESULTS / "capabilities.md").read_text(encoding="utf-8") == script().text()


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_the_back_end_of_the_page_agrees_with_ours(
    structure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = run("backends.md", tmp_path, monkeypatch)
    model, loader, x = (names[name] for name in ("model", "train_loader", "x"))
    fitted = [
        Laplace(model, "classification", "all", structure, backend=backend)
        for backend in (names["ChunkedGGN"], AutogradGGN)
    ]
    for la in fitted:
        la.fit(loader)
    theirs, ours = fitted
    assert_close(theirs.posterior_precision, ours.posterior_precision)
    assert_close(theirs.log_marginal_likelihood(), ours.log_marginal_likelihood())
    assert_close(theirs(x), ours(x))
    assert torch.allclose(theirs(x).sum(-1), torch.ones(len(x)))


def test_the_factors_that_the_page_quotes_are_those_measured() -> None:
    measured = json.loads((RESULTS / "backends.json").read_text(encoding="utf-8"))["config"]["measured_factors"]
    convolutions = [weight for weight in measured if weight["positions"] > 1]
    page = (DOCS / "backends.md").read_text(encoding="utf-8")
    quoted = re.search(r"(\d+) and (\d+) times too large.*?\(ours: (0\.\d+) and (0\.\d+)\)", page, re.DOTALL)
    assert quoted is not None
    assert [int(n) for n in quoted.groups()[:2]] == [round(weight["backpack"]) for weight in convolutions]
    assert [float(n) for n in quoted.groups()[2:]] == [round(weight["ours"], 2) for weight in convolutions]


def test_every_back_end_was_measured() -> None:
    rows = json.loads((RESULTS / "backends.json").read_text(encoding="utf-8"))["rows"]
    assert {row["back_end"] for row in rows} == {cls.__name__ for cls in BACKENDS}
    assert not any(row["result"]["note"] for row in rows)
