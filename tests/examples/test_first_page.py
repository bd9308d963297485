"""What the README's first page claims holds for other random numbers than those that it shows."""

from __future__ import annotations

import doctest
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest

from laplace.evaluation import calibration_error, mean_nll, ood_auroc, uncertainty

README = Path(__file__).parents[2] / "README.md"
SEEDS = (11, 12, 13, 14, 15)


def first_example() -> list[str]:
    """The statements of the first code block that shows results."""
    block = next(block for block in README.read_text(encoding="utf-8").split("```") if ">>>" in block)
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
                warnings.simplefilter("error")
                exec(source, names)
        assert seeded == 1
        row: dict[str, float] = {}
        for when in ("before", "between", "after"):
            probs = names[when]
            row[f"NLL {when}"] = mean_nll(probs, names["y_test"])
            row[f"ECE {when}"] = calibration_error(probs, names["y_test"])
            row[f"static {when}"] = float(names[f"{when}_static"].amax(-1).mean())
            row[f"missed {when}"] = 1 - ood_auroc(uncertainty(probs), uncertainty(names[f"{when}_static"]))
        row["missed after"] = 1 - names["score"]
        rows.append(row)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("score", "factor"), [("NLL", 0.7), ("ECE", 0.7), ("static", 0.75), ("missed", 0.4)])
def test_the_first_page_improves_held_out_scores(runs: list[dict[str, float]], score: str, factor: float) -> None:
    before, between, after = ([row[f"{score} {when}"] for row in runs] for when in ("before", "between", "after"))
    print(
        f"{score}: {', '.join(f'{statistics.mean(values):.3f}' for values in (before, between, after))}, seeds {SEEDS}"
    )
    assert statistics.mean(after) < factor * statistics.mean(before)
    assert all(b > a for b, a in zip(before, after, strict=True))
