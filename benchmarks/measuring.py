"""Time and memory of a call, a process for each row of a table, and the cells of that table."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def case_of_arguments() -> tuple[dict[str, Any], argparse.Namespace]:
    """The configuration, and which of its cases a process is asked to measure, on which device, of which library."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--case", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--back-end", help="a class of laplace.curvature; without it the library's default")
    parser.add_argument("--peer", action="store_true")
    arguments = parser.parse_args()
    return json.loads(arguments.config.read_text()), arguments


def finished() -> None:
    """Wait for the work that a GPU has been given, if there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call, of which a GPU has finished its part."""
    finished()
    start = time.perf_counter()
    action()
    finished()
    return time.perf_counter() - start


def resident_mb(name: str) -> float:
    """Resident memory of this process in MB (Linux): ``VmRSS``, what it has now, or ``VmHWM``, its highest mark."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(name))


def peak_mb(action: Callable[[], object]) -> float:
    """Highest resident memory of this process during one call, in MB, or that of tensors on a GPU in use.

    The high-water mark is reset first.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() / 1e6
    Path("/proc/self/clear_refs").write_text("5")
    action()
    return resident_mb("VmHWM")


def added_mb(action: Callable[[], object]) -> float:
    """Peak of one call above what is resident before it; what earlier calls freed is given back first (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)
    before = torch.cuda.memory_allocated() / 1e6 if torch.cuda.is_initialized() else resident_mb("VmRSS")
    return peak_mb(action) - before


def interleave(
    actions: dict[str, Callable[[], object]], repeats: int, warm_up: bool = True, budget_s: float = float("inf")
) -> dict[str, float]:
    """Median wall time in ms of each action, in turns until a budget is spent; a round of warming up is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    start = time.perf_counter()
    for repeat in range(repeats + warm_up):
        for name, action in actions.items():
            elapsed = seconds(action)
            if repeat or not warm_up:
                times[name].append(1e3 * elapsed)
        if all(times.values()) and time.perf_counter() - start > budget_s:
            break
    for name, action in actions.items():  # what is short is not left with the few figures of a spent budget
        while len(times[name]) < repeats and sum(times[name]) < 1e3:
            times[name].append(1e3 * seconds(action))
    return {name: statistics.median(values) for name, values in times.items()}


def run(python: str, script: Path, arguments: list[str], limit_s: float, peer: bool) -> dict[str, Any]:
    """What a script prints in a process of its own, as JSON lines; what a time limit cuts off is missing."""
    # The peer is another package of the same name: run where this one is not on the path.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or not peer}
    try:
        done = subprocess.run(
            [python, str(script), *arguments, *["--peer"] * peer],
            capture_output=True,
            text=True,
            timeout=limit_s,
            cwd="/",
            env=environment,
            check=False,
        )
        output, errors = done.stdout, done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        note = "" if done.returncode == 0 else errors[-1]
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        note = f"stopped after {limit_s:.0f} s"
    result: dict[str, Any] = {"note": note}
    for line in output.splitlines():
        result |= json.loads(line)
    return result


def number(value: float | None, unit: str) -> str:
    """A figure, or a dash where it is missing."""
    return "–" if value is None else f"{value:.0f} {unit}"


def shorten(note: str) -> str:
    """The end of an error message that is too long for a cell: where the numbers are."""
    return note if len(note) <= 100 else "… " + note[-98:].partition(" ")[2]


def markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def table_arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every script that writes a table takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with laplace-torch")
    parser.add_argument("--keep-peer", action="store_true", help="take the peer's rows from the last results")
    parser.add_argument("--device", default="cpu", help="where models and data are: cpu or cuda")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/)")
    return parser


PEER = "laplace-torch 0.3"
BOUNDS = {
    "case", "density", "fit", "fit_mb", "library", "mb", "passes", "predict", "predict_mb", "predict_ms", "result",
}  # fmt: skip
"""What a row says beside what was measured."""


def key(row: dict[str, Any]) -> str:
    """What was measured."""
    return json.dumps({name: value for name, value in row.items() if name not in BOUNDS}, sort_keys=True)


def libraries(arguments: argparse.Namespace) -> dict[str, str | None]:
    """Interpreters of the libraries that a table has rows of; of the peer ``None`` where rows are kept."""
    with_peer = arguments.peer or arguments.keep_peer
    return {"laplace": sys.executable} | ({PEER: arguments.peer} if with_peer else {})


def earlier(arguments: argparse.Namespace, name: str, results: Path) -> dict[str, dict[str, Any]]:
    """The peer's results in the last table, by what was measured; none unless they are asked for."""
    path = (arguments.output or results) / f"{named(name, arguments.device)}.json"
    if not arguments.keep_peer or not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {key(row): row["result"] for row in rows if row.get("back_end") or row.get("library") == PEER}


def named(name: str, device: str) -> str:
    """The name of a table, with that of a device other than the CPU."""
    return name if device == "cpu" else f"{name}-{device}"


def write(
    output: Path, name: str, config: dict[str, Any], rows: list[dict[str, Any]], text: str, device: str = "cpu"
) -> None:
    """Keep the rows with their configuration and machine as JSON, and the table as Markdown."""
    machine = {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine()}
    if device != "cpu":
        machine["card"] = torch.cuda.get_device_name(device)
    name = named(name, device)
    output.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"machine": machine, "config": config, "rows": rows}, indent=1)
    (output / f"{name}.json").write_text(content + "\n")
    (output / f"{name}.md").write_text(text + "\n")


def rows_of(
    arguments: argparse.Namespace,
    name: str,
    config: Path,
    script: str,
    skip: Callable[[dict[str, Any]], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a table, one by one as they are measured: each case of a configuration, of each library.

    ``skip`` says of which cases the peer has no row.
    """
    here = Path(__file__).resolve().parent
    read, kept = json.loads(config.read_text()), earlier(arguments, name, here / "results")
    for index, case in enumerate(read["cases"]):
        for library, python in libraries(arguments).items():
            if library == PEER and skip is not None and skip(case):
                continue
            result = kept.get(key(case)) if library == PEER else None
            if result is None and python is None:
                continue
            where = ["--config", str(config.resolve()), "--case", str(index), "--device", arguments.device]
            result = result or run(python, here / script, where, read["limit_s"], library == PEER)
            yield {"library": library, **case, "result": result}
