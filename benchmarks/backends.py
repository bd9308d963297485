"""What each back end costs for all weights, in units of bare inference passes of the same network in the same process.

    python benchmarks/backends.py [--quick] [--output DIR] [-k TEXT]

Writes ``results/backends.json`` and ``results/backends.md``; the JSON also holds by how much the Kronecker factors of
BackPACK itself miss the trace of the exact matrix on a network with two convolutions. ``--quick`` runs everything once
with next to no data, and writes nothing unless a folder is named. Needs the packages of all back ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from measuring import markdown, run, write

from laplace.curvature import BACKENDS, GGNInterface

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "backends.json"
WORKER = HERE / "measure_backends.py"
FITS = ("full", "diag", "kron")
COLUMNS = ["network", "back end", "fit `full`", "fit `diag`", "fit `kron`", "predict `diag`"]


def cell(row: dict[str, Any], task: str) -> str:
    """Times a bare pass, milliseconds and megabytes; or that it is refused, or what went wrong."""
    result = row["result"]
    figures = result.get(task)
    if figures is None:
        return str(result["note"] or "–")
    if "refused" in figures:
        return "refused"
    ratio = figures["time"] / figures["bare"]
    beside = [f"{figures['time']:.{int(figures['time'] < 10)}f} ms"]
    beside += [f"{figures['mb']:.0f} MB"] if "mb" in figures else []
    return f"{ratio:,.{int(ratio < 10)}f} ({', '.join(beside)})"


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    name = f"`{row['back_end']}`" + (", sampled" if row["sampled"] else "")
    return [row["network"], name, *(cell(row, task) for task in (*FITS, "predict"))]


def bare(rows: list[dict[str, Any]], network: str, tasks: tuple[str, ...]) -> str:
    """The range of the bare times of a network."""
    results = [row["result"].get(task, {}) for row in rows for task in tasks if row["network"] == network]
    times = [result["bare"] for result in results if "bare" in result]
    return f"{min(times):.2f} to {max(times):.2f} ms" if times else "–"


def table(rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The results as a Markdown table, with what its cells mean."""
    sizes = {row["network"]: row["result"]["n_weights"] for row in rows if "n_weights" in row["result"]}
    networks = [
        f"- {name}, {size:,} weights: {bare(rows, name, FITS)} for the data, {bare(rows, name, ('predict',))} for the "
        "inputs of a prediction"
        for name, size in sizes.items()
    ]
    bare_passes = "\n".join(networks)
    return f"""{markdown(COLUMNS, [cells(row) for row in rows])}

A cell is the time as a multiple of a bare inference pass; in parentheses the time and, for a fit, the peak of memory
above the process at rest. {config["rows"]} data in batches of {config["batch_size"]}, {config["predict_rows"]} inputs
of a prediction, {config["n_outputs"]} outputs, float32, {config["threads"]} thread; medians, after a first call. Bare
passes vary between processes, so between rows milliseconds compare better than multiples:

{bare_passes}"""


def main() -> None:
    """Measure every back end on every network and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="once, with next to no data")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/, if all are measured)")
    parser.add_argument("-k", default="", help="only the rows whose network and back end contain this text")
    arguments = parser.parse_args()
    config = json.loads(CONFIG.read_text())
    flags = ["--config", str(CONFIG), *["--quick"] * arguments.quick]
    if arguments.quick:
        config |= config["quick"]
    rows: list[dict[str, Any]] = []
    for network, options in config["networks"].items():
        for back_end in (cls for cls in BACKENDS if cls.matrix in options["matrices"]):
            for sampled in (False, True)[: 1 + issubclass(back_end, GGNInterface)]:
                name = back_end.__name__
                if arguments.k not in f"{network} {name}":
                    continue
                where = [*flags, "--network", network, "--back-end", name, *["--sampled"] * sampled]
                result = run(sys.executable, WORKER, where, config["limit_s"], peer=False)
                rows.append({"network": network, "back_end": name, "sampled": sampled, "result": result})
                print(markdown(COLUMNS, [cells(rows[-1])]).splitlines()[-1], flush=True)
    factors = run(sys.executable, WORKER, flags, config["limit_s"], peer=False)
    print("\n" + table(rows, config) + f"\n\n{json.dumps(factors, indent=1)}")
    output = arguments.output or (None if arguments.k or arguments.quick else HERE / "results")
    if output:
        write(output, "backends", config | {"measured_factors": factors.get("factors")}, rows, table(rows, config))


if __name__ == "__main__":
    main()
