"""Time one case of ``last_layer.json`` with whichever ``laplace`` the interpreter finds; print one JSON line.

The same file runs under this library and under laplace-torch, whose import name is the same: each in an environment of
its own. Every figure is a median over repeats that alternate with bare inference of the same model on the same data.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measuring import case_of_arguments, interleave, peak_mb, seconds
from networks import convolutional
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")


def density_of(model: Any, loader: DataLoader[Any], n_classes: int) -> Callable[[], object]:
    """What sums up the features of all batches, as ``fit`` does for their density: the features are there already."""
    from laplace.density import Accumulator

    with torch.inference_mode():
        batches = [(model[:-1](x), y) for x, y in loader]

    def density() -> object:
        sums = Accumulator(n_classes)
        for phi, y in batches:
            sums.add(phi, y)
        return sums.finish()

    return density


def measure(config: dict[str, Any], case: dict[str, Any], peer: bool, device: str) -> dict[str, Any]:
    """All figures of one case; finished parts are printed at once, so that a time limit loses only the rest."""
    from laplace import Laplace

    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    dtype = getattr(torch, config["dtype"])
    model = convolutional(config["image"], config["channels"], case["n_features"], case["n_outputs"]).to(device, dtype)
    x = torch.randn(config["rows"], *config["image"], dtype=dtype).to(device)
    y = torch.randint(case["n_outputs"], (config["rows"],)).to(device)
    loader = DataLoader(TensorDataset(x, y), batch_size=config["batch_size"])
    inputs = x[: config["predict_rows"]]

    def bare_pass() -> None:
        with torch.inference_mode():
            for batch, _ in loader:
                model(batch)

    def bare_forward() -> None:
        with torch.inference_mode():
            model(inputs)

    def fit() -> Any:
        la = Laplace(model, "classification", "last_layer", case["structure"])
        la.fit(loader)
        return la

    # Memory first, in a fresh process: what an earlier call freed would hide what a later one takes.
    bare_pass()
    bare_mb = peak_mb(bare_pass)
    fit_mb = peak_mb(fit) - bare_mb
    print(json.dumps({"fit_mb": fit_mb}), flush=True)
    # The peer takes minutes for some rows: fewer repeats there, and a limit enforced by the caller.
    fits = interleave({"bare": bare_pass, "fit": fit}, 1 if peer else config["repeats"])
    print(json.dumps({"fit": fits}), flush=True)
    if not peer:
        sums: dict[str, Callable[[], object]] = {
            "bare": bare_pass,
            "density": density_of(model, loader, case["n_outputs"]),
        }
        print(json.dumps({"density": interleave(sums, config["repeats"])}), flush=True)
    la = fit()
    factorized = {"full": "posterior_covariance", "kron": "posterior_precision", "diag": "posterior_variance"}
    factorize_ms = 1e3 * seconds(lambda: getattr(la, factorized[case["structure"]]))
    forward_mb = peak_mb(bare_forward)
    la = fit()  # not factorized yet: the first call does it
    first: list[float] = []
    first_mb = peak_mb(lambda: first.append(1e3 * seconds(lambda: la(inputs)))) - forward_mb
    print(json.dumps({"factorize": factorize_ms, "first": first[0], "first_mb": first_mb}), flush=True)
    predict_mb = peak_mb(lambda: la(inputs)) - forward_mb
    print(json.dumps({"predict_mb": predict_mb}), flush=True)
    actions: dict[str, Callable[[], object]] = {"bare": bare_forward, "predict": lambda: la(inputs)}
    return {"predict": interleave(actions, 1 if peer else config["predict_repeats"])}


def main() -> None:
    """Read the case from the command line."""
    config, asked = case_of_arguments()
    print(json.dumps(measure(config, config["cases"][asked.case], asked.peer, asked.device)), flush=True)


if __name__ == "__main__":
    main()
