"""What the last layer costs, in units of bare inference of the same model in the same run.

    python benchmarks/last_layer.py [--peer PATH/TO/PYTHON] [--keep-peer] [--device DEVICE] [--output DIR]

Writes ``results/last_layer.json`` and ``results/last_layer.md``. ``--peer`` names an interpreter in whose environment
laplace-torch is installed; its rows are measured with the same models, data and settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measuring import markdown, number, rows_of, shorten, table_arguments, write

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "last_layer.json"

COLUMNS = [
    "library",
    "structure",
    "C",
    "D",
    "fit / bare pass",
    "of that: density",
    "bare pass",
    "factorize",
    "first call",
    "predict / bare forward",
    "bare forward",
    "fit adds",
    "first call adds",
    "predict adds",
    "within bounds",
    "",
]


def ratio(part: dict[str, float] | None, name: str) -> str:
    """Time over bare time, and the milliseconds added."""
    if part is None:
        return "–"
    return f"{part[name] / part['bare']:.2f} ({part[name] - part['bare']:+.1f} ms)"


def share(part: dict[str, float] | None, name: str) -> str:
    """Time in units of bare time."""
    return "–" if part is None else f"{part[name] / part['bare']:.3f}"


def within(row: dict[str, Any]) -> str:
    """Whether a row keeps the bounds of its case in the configuration: ratios, milliseconds and megabytes."""
    r = row["result"]
    measured = {
        "fit": r["fit"]["fit"] / r["fit"]["bare"],
        "density": r["density"]["density"] / r["density"]["bare"],
        "predict": r["predict"]["predict"] / r["predict"]["bare"],
        "predict_ms": r["predict"]["predict"] - r["predict"]["bare"],
        "fit_mb": r["fit_mb"],
        "predict_mb": r["predict_mb"],
    }
    exceeded = [
        f"{name} {measured[name]:.2f} > {row[name]}" for name in measured if measured[name] > row.get(name, 1e9)
    ]
    return ", ".join(exceeded) or "yes"


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = []
    for row in rows:
        r = row["result"]
        fit, predict = r.get("fit"), r.get("predict")
        lines.append(
            [
                row["library"],
                row["structure"],
                row["n_outputs"],
                row["n_features"],
                ratio(fit, "fit"),
                share(r.get("density"), "density"),
                number(fit and fit["bare"], "ms"),
                number(r.get("factorize"), "ms"),
                number(r.get("first"), "ms"),
                ratio(predict, "predict"),
                number(predict and predict["bare"], "ms"),
                number(r.get("fit_mb"), "MB"),
                number(r.get("first_mb"), "MB"),
                number(r.get("predict_mb"), "MB"),
                within(row) if row["library"] == "laplace" else "",
                shorten(r["note"]),
            ]
        )
    return markdown(COLUMNS, lines)


def main() -> None:
    """Measure every case and write the table."""
    arguments = table_arguments(__doc__).parse_args()
    config = json.loads(CONFIG.read_text())
    rows: list[dict[str, Any]] = []
    for row in rows_of(arguments, "last_layer", CONFIG, "measure_last_layer.py"):
        rows.append(row)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    write(arguments.output or HERE / "results", "last_layer", config, rows, table(rows), arguments.device)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
