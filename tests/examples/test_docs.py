"""The code of the documentation runs as it is printed, and its list of mistakes raises what it says."""

from __future__ import annotations

import json
import re
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MISTAKE = re.compile(r"^\| `(?P<call>[^`]+)` \| `(?P<error>\w+)`: (?P<message>.+) \|$", re.MULTILINE)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny: a second thread costs more than it brings
    yield
    torch.set_num_threads(before)


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the blocks of a page in order, as a reader would: float32, files in the present folder."""
    monkeypatch.chdir(folder)
    torch.set_default_dtype(torch.float32)
    text = (DOCS / page).read_text(encoding="utf-8")
    module = ModuleType(page)  # dataclasses look up where they are written
    monkeypatch.setitem(sys.modules, page, module)
    names = vars(module)
    for block in BLOCK.finditer(text):
        first_line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * first_line + block[1], str(DOCS / page), "exec"), names)
    return names


@pytest.mark.every(10, each_value=False)
@pytest.mark.parametrize(
    "page", ["index.md", "tuning.md", "saving.md", "function_space.md", "structures.md", "migrating.md"]
)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(page, tmp_path, monkeypatch)["la"].n_data > 0


def test_the_code_about_decisions_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mapie")
    names = run("decisions.md", tmp_path, monkeypatch)
    assert float(names["covered"]) == pytest.approx(0.904, abs=0.05)
    assert float(names["inside"].float().mean()) == pytest.approx(0.927, abs=0.06)


@pytest.mark.slow
def test_the_code_of_the_guide_runs_and_its_mistakes_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler cannot trace the checks of shapes; without them tests/test_compiled.py compiles the same calls.
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)
    names = run("choosing.md", tmp_path, monkeypatch)
    rows = list(MISTAKE.finditer((DOCS / "choosing.md").read_text(encoding="utf-8")))
    assert len(rows) >= 10
    for row in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((Exception, UserWarning)) as raised:
                eval(row["call"], names)
        assert type(raised.value).__name__ == row["error"], row["call"]
        for part in row["message"].split(" … "):
            assert part in str(raised.value), row["call"]


def test_the_numbers_that_the_guide_quotes_are_those_of_the_table() -> None:
    table = (DOCS.parent / "benchmarks" / "results" / "choices.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in table.splitlines()) if len(cells) > 3}
    ece = {name: float(cells[3].split("±")[0]) for name, cells in rows.items() if "±" in cells[3]}
    default = [value for name, value in ece.items() if name.endswith("default")]
    assert (min(default), max(default)) == pytest.approx((0.44, 0.64), abs=0.005)
    assert all(0.02 <= round(ece[f"{s}, probit"], 2) <= 0.03 for s in ("full", "kron", "diag"))
    assert ece["MAP"] == pytest.approx(0.08, abs=0.005)


def test_the_numbers_that_the_page_on_tuning_quotes_are_those_measured() -> None:
    measured = json.loads((DOCS.parent / "benchmarks" / "results" / "tuning.json").read_text(encoding="utf-8"))["runs"]

    def mean(data: str, row: str, key: str = "nll") -> float:
        return statistics.fmean(run["rows"][row][key] for run in measured if run["data"] == data)

    page = (DOCS / "tuning.md").read_text(encoding="utf-8")
    for data, row, key in (
        ("breast cancer", "MAP", "nll"),
        ("breast cancer", "MAP, temperature", "nll"),
        ("breast cancer", "last layer, kron: gridsearch", "nll"),
        ("breast cancer", "last layer, kron: tune", "nll"),
        ("breast cancer", "last layer, full: loo", "nll"),
        ("diabetes", "MAP", "nll"),
        ("diabetes", "MAP, best noise", "nll"),
        ("diabetes", "last layer, full: loo", "nll"),
        ("digits", "last layer, full: loo", "nll"),
        ("digits", "MAP, temperature", "ood photographs"),
        ("MNIST", "last layer, full: loo", "nll"),
        ("MNIST", "last layer, kron: gridsearch", "ood photographs"),
        ("MNIST", "last layer, kron: tune", "ood photographs"),
        ("wine", "last layer, full: loo", "nll"),
    ):
        assert f"{mean(data, row, key):.3f}" in page, (data, row, key)
    verdicts = [run["default_minus_scaled"]["nll"]["verdict"] for run in measured]
    words = ("one is better", "thirteen are level", "one is worse")
    assert [verdicts.count(v) for v in ("better", "level", "worse", "unclear")] == [1, 13, 1, 0], words
    unused = sum(run["rows"]["last layer, kron: tune"]["chosen"]["prior_precision"] >= 1e6 for run in measured)
    assert unused == 8, "in eight of them the precision is 10⁶ or more"
