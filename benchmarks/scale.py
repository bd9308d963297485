"""How costs grow with data, outputs, features, inducing points and weights, beside what the formulas say.

    python benchmarks/scale.py [--peer PATH/TO/PYTHON] [--keep-peer] [--device DEVICE] [--output DIR]

Writes ``results/scale.json`` and ``results/scale.md``. An exponent is the slope of log time over log size between the
two largest sizes of a sweep, of which all but one number stay as they are (the configuration is ``scale.json``). It is
below that of the formula where another term still costs more at these sizes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from measuring import markdown, rows_of, table_arguments, write

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "scale.json"
CALLS = ("fit", "first", "predict")
COLUMNS = ["library", "weights", "structure", "grows", "to", "others", "fit", "first call", "later calls", "fit / bare"]


def measured(row: dict[str, Any]) -> list[tuple[float, dict[str, float]]]:
    """Sizes that were finished, with their times; of a width the number of weights."""
    result = row["result"]
    done = [(size, result[str(size)]) for size in row["sizes"] if str(size) in result]
    return [(times["n_weights"] if row["vary"] == "W" else float(size), times) for size, times in done]


def exponent(row: dict[str, Any], call: str) -> float | None:
    """The slope between the two largest sizes; ``None`` where fewer were finished."""
    done = measured(row)
    if len(done) < 2:
        return None
    (small, before), (large, after) = done[-2:]
    return math.log(after[call] / before[call]) / math.log(large / small)


def cell(row: dict[str, Any], call: str) -> str:
    """Exponent, that of theory, and the time at the largest size."""
    done, slope = measured(row), exponent(row, call)
    if slope is None or call not in row["theory"]:
        return "" if call not in row["theory"] else "–"
    if min(times[call] for _, times in done[-2:]) < 1:
        return f"({done[-1][1][call]:.0f} ms)"
    return f"{slope:.1f} of {row['theory'][call]} ({done[-1][1][call]:.0f} ms)"


def cells(row: dict[str, Any]) -> list[Any]:
    """One row of the table."""
    done = measured(row)
    others = ", ".join(f"{name} {value}" for name, value in row["base"].items() if name != row["vary"])
    last = done[-1][1] if done else None
    return [
        row["library"],
        row["weights"].replace("_", " "),
        row["structure"],
        "P" if row["vary"] == "W" else row["vary"],
        f"{done[-1][0]:,.0f}" if done else "–",
        others,
        *(cell(row, call) for call in CALLS),
        f"{last['fit'] / last['bare']:.1f}" if last else row["result"]["note"],
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, with what its columns mean."""
    return f"""{markdown(COLUMNS, [cells(row) for row in rows])}

“2.1 of 3 (40 ms)”: time grows with the power 2.1 between the two largest sizes, by the formula with at most the
power 3; 40 ms at the largest; times below a millisecond have no exponent. N data, C outputs, D features (of all
weights: inputs), M inducing points, P weights, W the width of a network with two hidden layers. One thread, CPU time.
“bare” is the model alone: of a last layer without a backbone. The density of features makes a fit O(N D²)."""


def main() -> None:
    """Measure every sweep and write the table."""
    arguments = table_arguments(__doc__).parse_args()
    config = json.loads(CONFIG.read_text())
    rows: list[dict[str, Any]] = []
    for row in rows_of(arguments, "scale", CONFIG, "measure_scale.py"):
        rows.append(row)
        print(markdown(COLUMNS, [cells(row)]).splitlines()[-1], flush=True)
    write(arguments.output or HERE / "results", "scale", config, rows, table(rows), arguments.device)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
