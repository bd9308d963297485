"""Time one case of ``function_space.json`` with whichever ``laplace`` the interpreter finds; print JSON lines.

The same file runs under this library and under laplace-torch, whose import name is the same: each in an environment of
its own. Fit and predictions are medians over repeats that alternate with bare inference of the same model on the same
data; the first call, which factorizes, and the grids are timed once.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from measuring import case_of_arguments, interleave, peak_mb, seconds
from networks import convolutional
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")


def data(config: dict[str, Any], case: dict[str, Any], rows: int) -> tuple[Tensor, Tensor]:
    """Random images, and classes or numbers."""
    x = torch.randn(rows, *config["image"], dtype=getattr(torch, config["dtype"]))
    if case["likelihood"] == "regression":
        return x, torch.randn(rows, case["n_outputs"], dtype=x.dtype)
    return x, torch.randint(case["n_outputs"], (rows,))


def measure(config: dict[str, Any], case: dict[str, Any], peer: bool, device: str) -> dict[str, Any]:
    """All figures of one case; finished parts are printed at once, so that a time limit loses only the rest."""
    from laplace import Laplace

    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    sizes = config["image"], config["channels"], case["n_features"], case["n_outputs"]
    model = convolutional(*sizes).to(device, getattr(torch, config["dtype"]))
    x, y = (part.to(device) for part in data(config, case, config["rows"]))
    loader = DataLoader(TensorDataset(x, y), batch_size=config["batch_size"])
    validation = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=config["batch_size"])
    inputs = x[: config["predict_rows"]]
    # Of the likelihood's Hessians the peer has the diagonal alone.
    own = {} if peer else {"diagonal_hessian": case.get("diagonal", False)}
    options = {"diagonal_output": True} if case["likelihood"] == "regression" else {}
    whole = {} if case["likelihood"] == "regression" else {"link_approx": "bridge"}

    def bare_pass() -> None:
        with torch.inference_mode():
            for batch, _ in loader:
                model(batch)

    def bare_validation() -> None:
        with torch.inference_mode():
            for batch, _ in validation:
                model(batch)

    def bare_forward() -> None:
        with torch.inference_mode():
            model(inputs)

    def fit() -> Any:
        la = Laplace(model, case["likelihood"], "last_layer", "gp", n_subset=case["n_subset"], **own)
        la.fit(loader)
        return la

    bare_pass()
    bare_mb = peak_mb(bare_pass)
    fit_mb = peak_mb(fit) - bare_mb
    print(json.dumps({"fit_mb": fit_mb}), flush=True)
    fits = interleave({"bare": bare_pass, "fit": fit}, 1 if peer else config["repeats"])
    print(json.dumps({"fit": fits}), flush=True)
    la, forward_mb = fit(), peak_mb(bare_forward)
    first: list[float] = []
    first_mb = peak_mb(lambda: first.append(1e3 * seconds(lambda: la(inputs, **options)))) - forward_mb
    print(json.dumps({"first": first[0], "first_mb": first_mb}), flush=True)
    repeats = 1 if peer else config["predict_repeats"]
    variances = {"bare": bare_forward, "predict": lambda: la(inputs, **options)}
    print(json.dumps({"predict": interleave(variances, repeats)}), flush=True)
    covariances = {"bare": bare_forward, "covariance": lambda: la(inputs, **whole)}
    print(json.dumps({"covariance": interleave(covariances, 1 if peer else 5)}), flush=True)

    def grid() -> None:
        arguments = {"val_loader": validation, "grid_size": config["grid_size"]}
        la.optimize_prior_precision(pred_type="gp", method="gridsearch", **arguments)

    times = {"bare": 1e3 * seconds(bare_validation), "grid": 1e3 * seconds(grid)}
    # The second finds the eigenvectors that the first left.
    return {"grid": times if peer else times | {"again": 1e3 * seconds(grid)}}


def main() -> None:
    """Read the case from the command line."""
    config, asked = case_of_arguments()
    print(json.dumps(measure(config, config["cases"][asked.case], asked.peer, asked.device)), flush=True)


if __name__ == "__main__":
    main()
