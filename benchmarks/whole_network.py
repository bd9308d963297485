"""What all weights cost, in units of bare passes of the same network in the same process.

    python benchmarks/whole_network.py [--peer PATH/TO/PYTHON] [--device DEVICE] [--output DIR] [-k TEXT]

Fits are counted in passes forward and backward over the same data, predictions (``glm``, probit) in forward passes of
the same inputs. Writes ``results/whole_network.json`` and ``results/whole_network.md``. ``--peer`` names an interpreter
in whose environment laplace-torch is installed; its rows are measured with the same networks and data, one for each of
its back ends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from measuring import PEER, earlier, key, markdown, number, run, shorten, table_arguments, write

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "whole_network.json"

COLUMNS = [
    "network",
    "measured",
    "library",
    "time / bare",
    "more data / bare",
    "time",
    "bare",
    "first call",
    "adds",
    "first call adds",
    "bare adds",
    "trace",
    "within bounds",
    "at or below the peer's",
    "",
]


def title(row: dict[str, Any]) -> str:
    """What a case measures, in words."""
    return f"{row['task']} {row['structure']}" + (", sampled" if row.get("sampled") else "")


def passes(result: dict[str, Any]) -> float | None:
    """Time over bare time, where both were measured."""
    return result["time"] / result["bare"] if "time" in result else None


def peak(result: dict[str, Any]) -> float | None:
    """The highest memory added by any call, in MB."""
    found = [result[name] for name in ("mb", "first_mb") if name in result]
    return max(found) if found else None


def skipped(result: dict[str, Any]) -> str:
    """What a back end left out without a word."""
    covered = result.get("covered")
    if covered is None or covered == result["n_weights"]:
        return ""
    return f"covers {covered} of {result['n_weights']} weights"


def other_trace(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two fits disagree by more than one percent about the trace of what both compute exactly."""
    traces = [result.get("trace") for result in (mine, theirs)]
    return None not in traces and abs(traces[1] / traces[0] - 1) > 0.01


def within(row: dict[str, Any]) -> str:
    """Whether a row keeps the bounds of its case in the configuration."""
    measured = {"passes": passes(row["result"]), "mb": peak(row["result"])}
    bounds = {name: row[name] for name in measured if name in row}
    if any(measured[name] is None for name in bounds):
        return "not measured"
    return (
        ", ".join(f"{name} {measured[name]:.1f} > {bounds[name]}" for name in bounds if measured[name] > bounds[name])
        or "yes"
    )


def compared(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Whether this library's row is at or below each row of the same case that the peer can run."""
    others = [other for other in rows if other["case"] == row["case"] and other["back_end"]]
    others = [other for other in others if not skipped(other["result"])]
    mine, above, beside = row["result"], [], 0
    for name, of, form in (("time", passes, ".2f"), ("MB", peak, ".0f")):
        for other in others:
            theirs = of(other["result"])
            if theirs is None:
                continue
            beside += 1
            if of(mine) is None or of(mine) > theirs:
                shown = "–" if of(mine) is None else format(of(mine), form)
                doubt = ", another trace" if not row.get("sampled") and other_trace(mine, other["result"]) else ""
                above.append(f"{name} {shown} > {theirs:{form}} ({other['back_end']}{doubt})")
    return ", ".join(above) or ("yes" if beside else "it runs none")


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[Any]:
    """One row of the table."""
    r, peer = row["result"], row["back_end"]
    ratio = passes(r)
    return [
        row["network"],
        title(row),
        f"{PEER}, {peer}" if peer else "laplace",
        "–" if ratio is None else f"{ratio:.2f}",
        f"{(r['twice'] - r['time']) / r['bare']:.2f}" if "twice" in r else "",
        number(r.get("time"), "ms"),
        number(r.get("bare"), "ms"),
        number(r.get("first"), "ms"),
        number(r.get("mb"), "MB"),
        number(r.get("first_mb"), "MB") if row["task"] == "predict" else "",
        number(r.get("bare_mb"), "MB"),
        f"{r['trace']:.5g}" if "trace" in r else "",
        "" if peer else within(row),
        "" if peer or not any(other["back_end"] for other in rows) else compared(row, rows),
        shorten(r["note"] or skipped(r)),
    ]


def table(rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The results as a Markdown table, with what its columns mean."""
    sizes = {row["network"]: row["result"]["n_weights"] for row in rows if "n_weights" in row["result"]}
    networks = ", ".join(f"{name} {size:,} weights" for name, size in sizes.items())
    return f"""{markdown(COLUMNS, [cells(row, rows) for row in rows])}

Networks: {networks}; {config["n_outputs"]} outputs. “bare” is a pass forward and backward over the data of the fit, or
a forward pass of the {config["predict_rows"]} inputs of the prediction. “more data” is what a fit to the data and to as
many again takes longer: without what is done once, such as finding out how layers arrange the data of a batch. The
“first call” of a prediction factorizes. “adds” is the peak of resident memory above the process at rest, with the
network and its data loaded; “bare adds” is that of bare passes. A row stops at the time limit of its network or at
{config["memory_limit_gb"]} GB of address space, and then says so. A back end that skips weights is not compared with.
“trace” is that of the fitted curvature, which exact rows of one case share: where it is another, so is what was
computed."""


def main() -> None:
    """Measure every case and write the table."""
    parser = table_arguments(__doc__)
    parser.add_argument("-k", default="", help="only the cases whose network and title contain this text")
    arguments = parser.parse_args()
    config = json.loads(CONFIG.read_text())
    kept = earlier(arguments, "whole_network", HERE / "results")
    back_ends = [None, *(config["peer_back_ends"] if arguments.peer or kept else [])]
    output = arguments.output or (None if arguments.k else HERE / "results")
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(config["cases"]):
        if arguments.k not in f"{case['network']} {title(case)}":
            continue
        for back_end in back_ends:
            where = ["--config", str(CONFIG), "--case", str(index), "--device", arguments.device]
            where += ["--back-end", back_end] if back_end else []
            python = arguments.peer if back_end else sys.executable
            network = config["networks"][case["network"]]
            limit = network.get("peer_limit_s", network["limit_s"]) if back_end else network["limit_s"]
            result = kept.get(key({**case, "back_end": back_end})) if back_end else None
            if result is None and python is None:
                continue
            result = result or run(python, HERE / "measure_whole_network.py", where, limit, peer=back_end is not None)
            rows.append({"case": index, **case, "back_end": back_end, "result": result})
            print(markdown(COLUMNS, [cells(rows[-1], rows[-1:])]).splitlines()[-1], flush=True)
        if output:  # after each case: a run that is cut off keeps what it has
            write(output, "whole_network", config, rows, table(rows, config), arguments.device)
    print("\n" + table(rows, config))


if __name__ == "__main__":
    main()
