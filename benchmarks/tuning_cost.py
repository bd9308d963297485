"""What tuning a last layer costs, in units of bare inference over the validation data in the same run.

    python benchmarks/tuning_cost.py [--peer PATH/TO/PYTHON] [--keep-peer] [--device DEVICE] [--output DIR]

Writes ``results/tuning_cost.json`` and ``results/tuning_cost.md``. ``--peer`` names an interpreter in whose environment
laplace-torch is installed; its grid has fewer points (the configuration is ``tuning_cost.json``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measuring import markdown, number, rows_of, shorten, table_arguments, write

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "tuning_cost.json"


def ratio(row: dict[str, Any], name: str) -> str:
    """Time over that of a bare pass, and in milliseconds."""
    part = row["result"].get(name)
    return "–" if part is None else f"{part[name] / part['bare']:.2f} ({part[name]:.0f} ms)"


def within(row: dict[str, Any], bounds: dict[str, float]) -> str:
    """Whether a row keeps the bounds of the configuration."""
    measured = {name: row["result"][name][name] / row["result"][name]["bare"] for name in bounds}
    exceeded = [f"{name} {measured[name]:.2f} > {bound}" for name, bound in bounds.items() if measured[name] > bound]
    return ", ".join(exceeded) or "yes"


def table(rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    n_steps = config["evidence_steps"]
    columns = ["library", "structure", "C", "D", "grid search", "points", f"{n_steps} steps", "evidence", "`tune`"]
    lines = []
    for row in rows:
        ours, result = row["library"] == "laplace", row["result"]
        bare = result.get("gridsearch")
        lines.append(
            [
                row["library"],
                row["structure"],
                row["n_outputs"],
                row["n_features"],
                ratio(row, "gridsearch"),
                config["grid_size" if ours else "peer_grid_size"],
                ratio(row, "steps"),
                ratio(row, "evidence"),
                ratio(row, "tune"),
                number(result.get("eigendecomposition"), "ms"),
                number(bare and bare["bare"], "ms"),
                within(row, config["bounds"]) if ours and not result["note"] else "",
                shorten(result["note"]),
            ]
        )
    return markdown([*columns, "eigenvectors, once", "bare pass", "within bounds", ""], lines)


def main() -> None:
    """Measure every case and write the table."""
    arguments = table_arguments(__doc__).parse_args()
    config = json.loads(CONFIG.read_text())
    rows: list[dict[str, Any]] = []
    for row in rows_of(arguments, "tuning_cost", CONFIG, "measure_tuning.py"):
        rows.append(row)
        print(table(rows[-1:], config).splitlines()[-1], flush=True)
    text = table(rows, config)
    write(arguments.output or HERE / "results", "tuning_cost", config, rows, text, arguments.device)
    print("\n" + text)


if __name__ == "__main__":
    main()
