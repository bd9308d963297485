"""The example of likelihoods runs as a user would run it, and finds what its text says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a program of its own
EXAMPLE = Path(__file__).parents[2] / "examples" / "likelihoods.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the example prints, and the folder it writes to."""
    folder = tmp_path_factory.mktemp("likelihoods") / "a new folder"
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--output", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout, folder


def numbers(text: str, pattern: str) -> list[float]:
    """Those that a line has, which begins like this."""
    line = re.search(rf"^{pattern}(.*)$", text, re.MULTILINE)
    assert line is not None, pattern
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", line[1])]


def test_missing_labels_leave_probabilities_that_are_calibrated(run: tuple[str, Path]) -> None:
    plain, tuned = numbers(run[0], "labels   network"), numbers(run[0], "labels   Laplace, tuned")
    assert tuned[0] < 0.6 * plain[0]
    assert tuned[1] < 0.3 * plain[1]


def test_counts_that_vary_more_are_better_described_by_a_negative_binomial(run: tuple[str, Path]) -> None:
    poisson, dispersed = (numbers(run[0], f"visits   {name}")[0] for name in ("poisson", "negative_binomial"))
    assert dispersed < poisson - 0.01


def test_a_group_with_few_owners_is_uncertain(run: tuple[str, Path]) -> None:
    few, many = (numbers(run[0], f"claims   {what}") for what in ("fewest", "most"))
    assert few[0] < 10 < 3000 < many[0]
    assert few[2] > 5 * many[2]


def test_the_noise_is_large_where_the_crash_is(run: tuple[str, Path]) -> None:
    one, predicted = (numbers(run[0], f"crash    {name} ")[0] for name in ("regression", "heteroscedastic_regression"))
    assert predicted < one - 0.2
    first, middle = (numbers(run[0], f"crash    at {time} ms:") for time in (" 5", "20"))
    assert first[2] < 5 < 15 < middle[2]
    assert middle[1] < middle[2]


def test_the_picture_is_written(run: tuple[str, Path]) -> None:
    assert (run[1] / "likelihoods.png").read_bytes().startswith(b"\x89PNG")
