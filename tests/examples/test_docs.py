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
MISTAKE = re.compile(r"^\| `(?P<call>[^`]+)` \| `(?P<error>\w+(?:Error|Warning))`: (?P<message>.+) \|$", re.MULTILINE)


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


PAGES = (
    "index.md", "choosing.md", "tuning.md", "models.md", "predictions.md", "all_weights.md", "memory_and_speed.md",
    "saving.md", "function_space.md", "structures.md", "migrating.md",
)  # fmt: skip


FRAGMENTS = {"scikit_learn.md": "scikit_learn.py"}
"""Pages whose blocks take a model of the reader's, and the whole program that each names and tests run."""


def test_every_page_with_code_is_run() -> None:
    """By a test that names it, or as a notebook."""
    examples = DOCS.parent / "examples"
    elsewhere = {path.stem + ".md" for path in (examples / "notebooks").glob("*.py")} | set(FRAGMENTS)
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    pages = {page.name for page in DOCS.rglob("*.md") if BLOCK.search(page.read_text(encoding="utf-8"))}
    assert pages > set(PAGES) - {"index.md"}
    assert not [page for page in pages - elsewhere if f'"{page}"' not in tests]
    assert all(f"examples/{program}" in (DOCS / page).read_text("utf-8") for page, program in FRAGMENTS.items())


def test_links_into_pages_find_their_heading() -> None:
    """``mkdocs build --strict`` does not look at the part after ``#``."""
    links = re.compile(r"\]\((?:docs/)?([\w/.]*?)#([\w-]+)\)")
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md"]
    found = [(page, *link) for page in pages for link in links.findall(page.read_text(encoding="utf-8"))]
    assert len(found) > 50
    for page, target, anchor in found:
        assert anchor in anchors(DOCS / target if target else page), f"{page.name}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as mkdocs makes them; numbers of a repeated heading are not looked at."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M
    )
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.every(len(PAGES), each_value=False)
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_its_mistakes_raise(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("--check-shapes"):  # which the compiler cannot trace
        monkeypatch.setattr(torch, "compile", lambda function, **_options: function)
    names = run(page, tmp_path, monkeypatch)
    assert names["la"].n_data > 0
    for row in MISTAKE.finditer((DOCS / page).read_text(encoding="utf-8")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((Exception, UserWarning)) as raised:
                eval(row["call"], names)
        assert type(raised.value).__name__ == row["error"], row["call"]
        for part in row["message"].split(" … "):
            assert part in str(raised.value), row["call"]


@pytest.mark.parametrize(("page", "mistakes"), [("choosing.md", 13), ("models.md", 2), ("all_weights.md", 3)])
def test_the_mistakes_of_a_page_are_found(page: str, mistakes: int) -> None:
    assert len(list(MISTAKE.finditer((DOCS / page).read_text(encoding="utf-8")))) == mistakes


def test_the_code_about_decisions_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mapie")
    names = run("decisions.md", tmp_path, monkeypatch)
    assert float(names["covered"]) == pytest.approx(0.904, abs=0.05)
    assert float(names["inside"].float().mean()) == pytest.approx(0.927, abs=0.06)


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
