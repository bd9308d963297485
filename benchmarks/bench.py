"""Every table of costs, and one page of them: beside bare passes of the same model and beside laplace-torch.

    python benchmarks/bench.py [--peer PATH/TO/PYTHON] [--keep-peer] [--output DIR] [--page]

Runs the scripts named in ``SCRIPTS`` on the CPU and, where there is one, on a CUDA device; each writes a table of its
own into ``results/``. Then it prints ``results/bench.md``. ``--page`` makes the page of tables that are there already.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import markdown, named
from scale import exponent, measured
from whole_network import passes, skipped, title

HERE = Path(__file__).resolve().parent
SCRIPTS = ("last_layer", "whole_network", "function_space", "tuning_cost", "scale")
COLUMNS = ["model", "call", "time / bare", "peer's", "adds, MB", "peer's", "ms"]
Row = dict[str, Any]


def of(row: Row | None, part: str, name: str) -> float | None:
    """Time in units of bare time; ``None`` where it was not measured."""
    times = None if row is None else row["result"].get(part)
    return None if times is None or name not in times else times[name] / times["bare"]


def shown(value: float | None, form: str = ".2f") -> str:
    """A figure, or a dash."""
    return "–" if value is None else format(value, form)


def pairs(rows: list[Row]) -> Iterator[tuple[Row, Row | None]]:
    """Each case of this library with the peer's, if that was measured."""
    keys = [json.dumps({k: v for k, v in row.items() if k not in ("library", "result")}) for row in rows]
    others = {key: row for key, row in zip(keys, rows, strict=True) if row["library"] != "laplace"}
    for key, row in zip(keys, rows, strict=True):
        if row["library"] == "laplace":
            yield row, others.get(key)


def calls_of(rows: list[Row], calls: dict[str, tuple[str, str, str | None]], model: Callable[[Row], str]) -> list[Any]:
    """A line for each call of each case: its name, the part and entry that hold its time, the entry of its memory."""
    lines = []
    for mine, theirs in pairs(rows):
        for call, (part, name, memory) in calls.items():
            ratio = of(mine, part, name)
            if ratio is None:
                continue
            added = [None if memory is None or row is None else row["result"].get(memory) for row in (mine, theirs)]
            time = mine["result"][part][name]
            lines.append(
                [
                    model(mine),
                    call,
                    f"{ratio:.2f}",
                    shown(of(theirs, part, name)),
                    *(shown(value, ".0f") for value in added),
                    f"{time:.0f}",
                ]
            )
    return lines


def last_layer(rows: list[Row]) -> list[Any]:
    """Lines of ``last_layer.json``."""
    calls = {"fit": ("fit", "fit", "fit_mb"), "predict": ("predict", "predict", "predict_mb")}
    return calls_of(rows, calls, lambda row: f"{row['structure']}, C {row['n_outputs']}, D {row['n_features']}")


def function_space(rows: list[Row]) -> list[Any]:
    """Lines of ``function_space.json``."""
    calls = {
        "fit": ("fit", "fit", "fit_mb"),
        "variances": ("predict", "predict", None),
        "covariances": ("covariance", "covariance", None),
    }
    return calls_of(
        rows,
        calls,
        lambda row: f"gp, {row['likelihood']}{', diagonal Hessian' * row.get('diagonal', False)}, M {row['n_subset']}",
    )


def tuning_cost(rows: list[Row]) -> list[Any]:
    """Lines of ``tuning_cost.json``."""
    calls: dict[str, tuple[str, str, str | None]] = {
        "grid search": ("gridsearch", "gridsearch", None),
        "evidence, optimized": ("evidence", "evidence", None),
        "tune": ("tune", "tune", None),
    }
    return calls_of(rows, calls, lambda row: f"{row['structure']}, C {row['n_outputs']}, D {row['n_features']}")


def whole_network(rows: list[Row]) -> list[Any]:
    """Lines of ``whole_network.json``: of the peer's back ends the fastest that covers all weights."""
    lines = []
    for row in rows:
        if row["back_end"] or passes(row["result"]) is None:
            continue
        others = [
            other["result"]
            for other in rows
            if other["case"] == row["case"] and other["back_end"] and not skipped(other["result"])
        ]
        timed = [result for result in others if passes(result) is not None]
        best = min(timed, key=passes) if timed else {}
        r = row["result"]
        lines.append(
            [
                row["network"],
                title(row),
                shown(passes(r)),
                shown(passes(best)) if best else "–",
                shown(r.get("mb"), ".0f"),
                shown(best.get("mb"), ".0f"),
                shown(r.get("time"), ".0f"),
            ]
        )
    return lines


def scale(rows: list[Row]) -> str:
    """Exponents beside those of theory, a row for each structure and call."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    names = [f"{'P' if row['vary'] == 'W' else row['vary']}" for row in rows]
    for row, name in zip(rows, names, strict=True):
        for call, theory in row["theory"].items():
            slope = exponent(row, call)
            fast = slope is None or min(times[call] for _, times in measured(row)[-2:]) < 1
            where = (f"{row['weights'].replace('_', ' ')}, {row['structure']}", call)
            here = table.setdefault(where, {})
            column = name if row["library"] == "laplace" else f"{name}, peer"
            here[column] = "–" if fast else f"{slope:.1f}" + f" of {theory}" * (row["library"] == "laplace")
    columns = [f"{name}{suffix}" for name in dict.fromkeys(names) for suffix in ("", ", peer")]
    columns = [column for column in columns if any(column in row for row in table.values())]
    lines = [[*where, *(row.get(column, "") for column in columns)] for where, row in table.items()]
    return markdown(["weights, structure", "call", *columns], lines)


TITLES: dict[str, tuple[str, Callable[[list[Row]], list[Any]] | None]] = {
    "last_layer": ("Last layer (bare: inference)", last_layer),
    "whole_network": ("All weights (bare: forward and backward of a fit, forward of a prediction)", whole_network),
    "function_space": ("Function space, last layer (bare: inference)", function_space),
    "tuning_cost": ("Tuning a last layer (bare: inference of the validation data)", tuning_cost),
    "scale": ("Growth: time ∝ size to the power of …, measured of theory's", None),
}


def page(results: Path, devices: list[str]) -> str:
    """All tables that are there, in short."""
    parts = ["# What it costs"]
    for device in devices:
        for name in SCRIPTS:
            path = results / f"{named(name, device)}.json"
            if not path.exists():
                continue
            content = json.loads(path.read_text())
            heading, lines = TITLES[name]
            where = f"{content['machine'].get('card', 'CPU')}, torch {content['machine']['torch']}"
            text = scale(content["rows"]) if lines is None else markdown(COLUMNS, lines(content["rows"]))
            parts.append(f"## {heading}: {where}\n\n{text}")
    parts.append(
        "Medians of interleaved repeats; “peer” is laplace-torch 0.3 with the same model and data, a dash where it "
        "does not run or not within the time limit; “ms” is this library's. `results/` holds the tables with all "
        "columns and their configurations."
    )
    return "\n\n".join(parts)


def main() -> None:
    """Measure everything and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with laplace-torch")
    parser.add_argument("--keep-peer", action="store_true", help="take the peer's rows from the last results")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the tables and the page")
    parser.add_argument("--page", action="store_true", help="measure nothing: make the page of the tables")
    arguments = parser.parse_args()
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    peer = ["--peer", arguments.peer] if arguments.peer else ["--keep-peer"] * arguments.keep_peer
    for device in [] if arguments.page else devices:
        for name in SCRIPTS:
            where = ["--device", device, "--output", str(arguments.output)]
            subprocess.run([sys.executable, str(HERE / f"{name}.py"), *peer, *where], check=True)
    # Tables of a device that this machine lacks are on the page all the same.
    text = page(arguments.output, ["cpu", "cuda"])
    (arguments.output / "bench.md").write_text(text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
