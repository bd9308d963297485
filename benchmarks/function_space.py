"""What a Gaussian process of the last layer costs, in units of bare inference of the same model in the same run.

    python benchmarks/function_space.py [--peer PATH/TO/PYTHON] [--device DEVICE] [--keep-peer] [--output DIR]
        [--config FILE]

Writes ``results/function_space.json`` and ``results/function_space.md``. ``--peer`` names an interpreter in whose
environment laplace-torch is installed; its rows are measured with the same models, data and settings. It has the
diagonal of the softmax Hessian alone: compare its classification with the row that says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measuring import markdown, number, rows_of, shorten, table_arguments, write

HERE = Path(__file__).resolve().parent

COLUMNS = [
    "library",
    "likelihood",
    "Hessian",
    "M",
    "C",
    "D",
    "fit / bare pass",
    "first call",
    "variances / bare forward",
    "covariances / bare forward",
    "grid / bare pass over validation data",
    "second grid",
    "fit adds",
    "first call adds",
    "within bounds",
    "",
]


def ratio(part: dict[str, float] | None, name: str) -> str:
    """Time over bare time, and the milliseconds added."""
    if part is None or name not in part:
        return "–"
    return f"{part[name] / part['bare']:.2f} ({part[name] - part['bare']:+.1f} ms)"


def within(row: dict[str, Any]) -> str:
    """Whether a row keeps the bounds of its case in the configuration."""
    parts = {name: row["result"].get(name) for name in ("fit", "predict")}
    measured = {name: part[name] / part["bare"] for name, part in parts.items() if part is not None}
    exceeded = [f"{name} {value:.2f} > {row[name]}" for name, value in measured.items() if value > row.get(name, 1e9)]
    return ", ".join(exceeded) or ("yes" if len(measured) == len(parts) else "not measured")


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = []
    for row in rows:
        r, peer = row["result"], row["library"] != "laplace"
        lines.append(
            [
                row["library"],
                row["likelihood"],
                "diagonal" if row.get("diagonal") or (peer and row["likelihood"] == "classification") else "whole",
                row["n_subset"],
                row["n_outputs"],
                row["n_features"],
                ratio(r.get("fit"), "fit"),
                number(r.get("first"), "ms"),
                ratio(r.get("predict"), "predict"),
                ratio(r.get("covariance"), "covariance"),
                ratio(r.get("grid"), "grid"),
                "–" if peer else ratio(r.get("grid"), "again"),
                number(r.get("fit_mb"), "MB"),
                number(r.get("first_mb"), "MB"),
                "" if peer else within(row),
                shorten(r["note"]),
            ]
        )
    return markdown(COLUMNS, lines)


def main() -> None:
    """Measure every case and write the table."""
    parser = table_arguments(__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "function_space.json")
    arguments = parser.parse_args()
    output = arguments.output or HERE / "results"
    config = json.loads(arguments.config.read_text())
    rows: list[dict[str, Any]] = []
    for row in rows_of(
        arguments, "function_space", arguments.config, "measure_function_space.py", lambda case: case.get("diagonal")
    ):
        rows.append(row)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    write(output, "function_space", config, rows, table(rows), arguments.device)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
