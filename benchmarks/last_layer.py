"""What the last layer costs, in units of bare inference of the same model in the same run.

    python benchmarks/last_layer.py [--peer PATH/TO/PYTHON] [--output DIR]

Writes ``results/last_layer.json`` and ``results/last_layer.md``. ``--peer`` names an interpreter in whose environment
laplace-torch is installed; its rows are measured with the same models, data and settings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "last_layer.json"


COLUMNS = [
    "library",
    "structure",
    "C",
    "D",
    "fit / bare pass",
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


def run(python: str, case: int, limit_s: float, peer: bool) -> dict[str, Any]:
    """Measure one case in a process of its own; what a time limit cuts off is missing from the result."""
    command = [python, str(HERE / "measure_last_layer.py"), "--config", str(CONFIG), "--case", str(case)]
    # The peer is another package of the same name: run where this one is not on the path.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or not peer}
    try:
        done = subprocess.run(
            command + ["--peer"] * peer,
            capture_output=True,
            text=True,
            timeout=limit_s,
            cwd="/",
            env=environment,
            check=False,
        )
        output, note = done.stdout, "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        note = f"stopped after {limit_s:.0f} s"
    result: dict[str, Any] = {"note": note}
    for line in output.splitlines():
        result |= json.loads(line)
    return result


def ratio(part: dict[str, float] | None, name: str) -> str:
    """Time over bare time, and the milliseconds added."""
    if part is None:
        return "–"
    return f"{part[name] / part['bare']:.2f} ({part[name] - part['bare']:+.1f} ms)"


def number(value: float | None, unit: str) -> str:
    """A figure, or a dash where it is missing."""
    return "–" if value is None else f"{value:.0f} {unit}"


def within(row: dict[str, Any]) -> str:
    """Whether a row keeps the bounds of its case in the configuration: ratios, milliseconds and megabytes."""
    r = row["result"]
    measured = {
        "fit": r["fit"]["fit"] / r["fit"]["bare"],
        "predict": r["predict"]["predict"] / r["predict"]["bare"],
        "predict_ms": r["predict"]["predict"] - r["predict"]["bare"],
        "fit_mb": r["fit_mb"],
        "predict_mb": r["predict_mb"],
    }
    exceeded = [
        f"{name} {measured[name]:.2f} > {row[name]}" for name in measured if measured[name] > row.get(name, 1e9)
    ]
    return ", ".join(exceeded) or "yes"


def shorten(note: str) -> str:
    """The end of an error message that is too long for a cell: where the numbers are."""
    return note if len(note) <= 100 else "… " + note[-98:]


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        r = row["result"]
        fit, predict = r.get("fit"), r.get("predict")
        cells = [
            row["library"],
            row["structure"],
            row["n_outputs"],
            row["n_features"],
            ratio(fit, "fit"),
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
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="interpreter of an environment with laplace-torch")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    config = json.loads(CONFIG.read_text())
    libraries = {"laplace": sys.executable} | ({"laplace-torch 0.3": arguments.peer} if arguments.peer else {})
    rows = []
    for index, case in enumerate(config["cases"]):
        for library, python in libraries.items():
            peer = library != "laplace"
            rows.append({"library": library, **case, "result": run(python, index, config["limit_s"], peer)})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"machine": machine, "config": config, "rows": rows}, indent=1)
    (arguments.output / "last_layer.json").write_text(content + "\n")
    (arguments.output / "last_layer.md").write_text(table(rows) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
