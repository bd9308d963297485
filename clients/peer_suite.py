"""Runs laplace-torch's own tests against this library: how many pass, and what each of those that fail shows.

    make peer-suite
    python clients/peer_suite.py --log failures.txt

The source distribution of laplace-torch carries its tests. It is downloaded, its own package is thrown away, and each
file of tests runs in a process of its own, so that the default type that a file sets stays in that file. Nothing of it
stays here. Every failure has to be one that `peer_failures.py` lists; the exit status is 1 where one is not, or
where a count is not that of the table.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from peer_failures import EXPECTED, KINDS, PASSED, SKIPPED

RELEASE = "laplace-torch==0.2.2"
DOCS = Path(__file__).parents[1] / "docs" / "differences.md"
THEN = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""At its release `torch.load` read any object; one list of cases for all machines; one thread for each file."""
CONFTEST = """
import pytest, torch

torch.set_default_dtype(torch.float64)  # what most files set

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
"""
"""Some tests draw without a seed, and compare as one type allows: so the counts are the same in every run."""
PASS, SKIP, FAIL = "passed", "skipped", "failed"
JOBS = min(4, os.cpu_count() or 1)


class Result(NamedTuple):
    """One test: ``test_file.py::test_name[case]``, how it ended, and the first lines of the error."""

    test: str
    outcome: str
    message: str = ""


def download(folder: Path) -> Path:
    """The unpacked source distribution, without its package."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        str(folder),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    subprocess.run([*pip, RELEASE], check=True, env=environment)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    root = next(path.parent for path in folder.glob("*/tests"))
    shutil.rmtree(root / "laplace")
    (root / "tests" / "conftest.py").write_text(CONFTEST)
    return root


def run(path: Path) -> list[Result]:
    """Runs one file of tests."""
    report = path.with_suffix(".xml")
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=short"]
    subprocess.run(
        [*pytest, f"--junitxml={report}", str(path.relative_to(path.parents[1]))],
        cwd=path.parents[1],
        env={**os.environ, **THEN},
        capture_output=True,
        check=False,
    )
    if not report.exists():
        return [Result(path.name, FAIL, "pytest ended without a report")]
    return [result(case, path.name) for case in ET.parse(report).iter("testcase")]


def result(case: ET.Element, file: str) -> Result:
    """One entry of a report; a file that cannot be imported is one failing test."""
    test = f"{file}::{case.get('name')}" if case.get("classname") else file
    for problem in (*case.iterfind("failure"), *case.iterfind("error")):
        text = problem.text or ""
        errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
        return Result(test, FAIL, " ".join(errors) or (problem.get("message") or "no message"))
    return Result(test, SKIP if case.find("skipped") is not None else PASS)


def matching(failure: Result) -> Iterator[int]:
    """The entries of the table that a failure belongs to."""
    for index, expected in enumerate(EXPECTED):
        if re.fullmatch(expected.tests, failure.test) and re.search(expected.error, failure.message):
            yield index


def rows() -> list[str]:
    """The table of the documentation."""
    counts = {"pass": PASSED, "skip themselves": SKIPPED}
    for kind, meaning in KINDS.items():
        counts[meaning] = sum(expected.count for expected in EXPECTED if expected.kind == kind)
        counts |= {"· " + expected.reason: expected.count for expected in EXPECTED if expected.kind == kind}
    return [f"| {what} | {number} |" for what, number in counts.items()]


def report(results: list[Result], log: Path | None) -> int:
    """Prints the counts; 1 if they are not those of the table, or the documentation has others."""
    outcomes = Counter(result.outcome for result in results)
    failures = [(result, next(matching(result), None)) for result in results if result.outcome == FAIL]
    counts = Counter(entry for _, entry in failures)
    problems = [f"not in the table: {test}: {message[:300]}" for (test, _, message), entry in failures if entry is None]
    for index, expected in enumerate(EXPECTED):
        if counts[index] != expected.count:
            problems.append(f"{counts[index]} instead of {expected.count}: {expected.tests} ({expected.reason})")
    for outcome, number in ((PASS, PASSED), (SKIP, SKIPPED)):
        if outcomes[outcome] != number:
            problems.append(f"{outcomes[outcome]} {outcome} instead of {number}")
    written = DOCS.read_text(encoding="utf-8")
    problems += [f"not in {DOCS.name}: {row}" for row in rows() if row not in written]

    print(f"{RELEASE}: {len(results)} tests, " + ", ".join(f"{outcomes[name]} {name}" for name in (PASS, SKIP, FAIL)))
    for kind, meaning in KINDS.items():
        entries = [(counts[index], expected) for index, expected in enumerate(EXPECTED) if expected.kind == kind]
        print(f"{sum(number for number, _ in entries):5}  {meaning}")
        for number, expected in entries:
            print(f"{number:11}  {expected.reason}")
    for problem in problems:
        print("PROBLEM", problem)
    if log is not None:
        lines = [f"{entry}\t{test}\t{message}\n" for (test, _, message), entry in failures]
        log.write_text("".join(lines), encoding="utf-8")
    return int(bool(problems))


def main() -> int:
    """Downloads, runs and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="a file for every failure: entry of the table, test, message")
    parser.add_argument("--jobs", type=int, default=JOBS, help="files of tests that run at once")
    parser.add_argument("--only", default="test_*.py", help="pattern of the files that run")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = download(Path(folder))
        files = sorted((root / "tests").glob(options.only), key=lambda path: -path.stat().st_size)
        with ThreadPoolExecutor(options.jobs) as pool:
            results = [result for found in pool.map(run, files) for result in found]
    status = report(results, options.log)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    return status


if __name__ == "__main__":
    sys.exit(main())
