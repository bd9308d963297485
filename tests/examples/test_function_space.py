"""The example of function space runs as a user would run it, and finds what its text says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a program of its own
EXAMPLE = Path(__file__).parents[2] / "examples" / "function_space.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the example prints, and the folder it writes to; four steps see the other hill."""
    folder = tmp_path_factory.mktemp("function_space") / "a new folder"
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--output", str(folder), "--steps", "4"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout, folder


def test_every_step_is_printed(run: tuple[str, Path]) -> None:
    steps = re.findall(
        r"^step +(\d+): measured at ([+-]\d\.\d\d), found (-?\d\.\d\d), best (\d\.\d\d)$", run[0], re.MULTILINE
    )
    assert [int(number) for number, *_ in steps] == [1, 2, 3, 4]
    best = [float(value) for *_, value in steps]
    assert best == sorted(best)


def test_it_looks_where_nothing_was_measured_and_finds_the_higher_hill(run: tuple[str, Path]) -> None:
    places = [float(place) for place in re.findall(r"measured at ([+-]\d\.\d\d)", run[0])]
    assert max(places) > 0.5
    found = re.search(r"best value measured (\d\.\d\d); the maximum is (\d\.\d\d) at \+1\.56", run[0])
    assert found is not None
    assert float(found[1]) > 0.7


def test_the_picture_is_written(run: tuple[str, Path]) -> None:
    assert (run[1] / "function_space.png").read_bytes().startswith(b"\x89PNG")
