"""Time one sweep of ``scale.json``: fit, first prediction and later predictions at growing sizes; print JSON lines.

The same file runs under this library and under laplace-torch, in an environment of its own each. One thread and CPU
time, or the time of a GPU.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import case_of_arguments, finished
from networks import fully_connected
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")


def busy_ms(action: Callable[[], Any], device: str) -> tuple[float, Any]:
    """CPU time of one call, or on a GPU the time until it has finished; and what the call returned."""
    finished()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    result = action()
    finished()
    return 1e3 * (clock() - start), result


def measure(config: dict[str, Any], case: dict[str, Any], size: int, device: str) -> dict[str, float]:
    """Milliseconds of each call at one size, medians over repeats."""
    from laplace import Laplace

    sizes = case["base"] | {case["vary"]: size}
    torch.manual_seed(config["seed"])
    model: nn.Module
    if case["weights"] == "last_layer":
        model = nn.Sequential(nn.Identity(), nn.Linear(sizes["D"], sizes["C"]))
    else:
        model = fully_connected([sizes["D"], sizes["W"], sizes["W"]], sizes["C"])
    model = model.eval().to(device)
    x = torch.randn(sizes["N"], sizes["D"]).to(device)
    y = torch.randint(sizes["C"], (sizes["N"],)).to(device)
    loader = DataLoader(TensorDataset(x, y), batch_size=config["batch_size"])
    inputs = x[: config["predict_rows"]]
    options = {"n_subset": sizes["M"], "diagonal_hessian": True} if case["structure"] == "gp" else {}

    def bare() -> None:
        for batch, _ in loader:
            model(batch)

    def fit() -> Any:
        la = Laplace(model, "classification", case["weights"], case["structure"], **options)
        la.fit(loader)
        return la

    times: dict[str, list[float]] = {"bare": [], "fit": [], "first": [], "predict": []}
    for repeat in range(config["repeats"] + 1):
        with torch.inference_mode():
            round_ = {"bare": busy_ms(bare, device)[0]}
        round_["fit"], la = busy_ms(fit, device)
        predict = partial(la, inputs)
        first = busy_ms(predict, device)[0]
        round_["predict"] = busy_ms(predict, device)[0]
        round_["first"] = max(first - round_["predict"], 1e-3)
        for name, value in round_.items():
            if repeat:  # the first round warms up
                times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()} | {
        "n_weights": float(sum(p.numel() for p in model.parameters()))
    }


def main() -> None:
    """Read the case from the command line; finished sizes are printed at once."""
    config, asked = case_of_arguments()
    torch.set_num_threads(1)
    case = config["cases"][asked.case]
    if asked.peer and not case.get("peer", True):
        return
    for size in case["sizes"]:
        print(json.dumps({str(size): measure(config, case, size, asked.device)}), flush=True)


if __name__ == "__main__":
    main()
