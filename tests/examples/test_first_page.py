"""What the README's first page claims holds for other random numbers than those that it shows."""

from __future__ import annotations

import doctest
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest

from laplace.evaluation import calibration_error, mean_nll

README = Path(__file__).parents[2] / "README.md"
SEEDS = (11, 12, 13, 14, 15)


def first_example() -> list[str]:
    """The statements of the first code block."""
    block = README.read_text(encoding="utf-8").split("```")[1]
    return [example.source for example in doctest.DocTestParser().get_examples(block)]


@pytest.fixture(scope="module")
def runs() -> list[dict[str, float]]:
    """Scores on held-out digits before and after tuning, one row for each seed."""
    rows: list[dict[str, float]] = []
    for seed in SEEDS:
        names: dict[str, Any] = {}
        seeded = 0
        for source in first_example():
            if "manual_seed" in source:
                source, seeded = f"torch.manual_seed({seed})\n", seeded + 1
            with warnings.catch_warnings():
                # Where weight uncertainty does not help, tune says so.
                warnings.filterwarnings("ignore", message="The validation score is best without weight uncertainty")
                exec(source, names)
            if source.startswith("print") and "NLL" in source:
                y, before, after = names["y_test"], names["before"], names["after"]
        assert seeded == 1
        rows.append(
            {
                "NLL before": mean_nll(before, y),
                "NLL after": mean_nll(after, y),
                "ECE before": calibration_error(before, y),
                "ECE after": calibration_error(after, y),
                "static before": float(names["before"].amax(-1).mean()),
                "static after": float(names["after"].amax(-1).mean()),
            }
        )
    return rows


@pytest.mark.parametrize(("score", "factor"), [("NLL", 0.7), ("ECE", 0.7), ("static", 0.9)])
def test_the_first_page_improves_held_out_scores(runs: list[dict[str, float]], score: str, factor: float) -> None:
    before, after = ([row[f"{score} {when}"] for row in runs] for when in ("before", "after"))
    print(f"{score}: {statistics.mean(before):.3f} -> {statistics.mean(after):.3f}, seeds {SEEDS}")
    assert statistics.mean(after) < factor * statistics.mean(before)
    assert all(b > a for b, a in zip(before, after, strict=True))
