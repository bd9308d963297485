"""Time the tuning of one case of ``tuning_cost.json`` with whichever ``laplace`` the interpreter finds.

The same file runs under this library and under laplace-torch, in an environment of its own each. Prints JSON lines;
every figure is a median over repeats that alternate with bare inference of the same model on the same data.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import case_of_arguments, interleave, seconds
from networks import convolutional
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")


def actions(la: Any, loader: DataLoader, config: dict[str, Any], peer: bool) -> dict[str, Callable[[], object]]:
    """What is timed: a grid search, evidence and its gradient, its optimum, and ``tune``, which the peer has not."""
    log_precision = torch.zeros(1, device=next(la.model.parameters()).device, requires_grad=True)

    def steps() -> None:
        for _ in range(config["evidence_steps"]):
            la.log_marginal_likelihood(log_precision.exp()).backward()

    size = config["peer_grid_size"] if peer else config["grid_size"]
    search = {"pred_type": "glm", "method": "gridsearch", "val_loader": loader, "grid_size": size}
    timed = {
        "gridsearch": lambda: la.optimize_prior_precision(**search),
        "steps": steps,
        "evidence": lambda: la.optimize_prior_precision(method="marglik", n_steps=config["evidence_steps"]),
    }
    return timed if peer else timed | {"tune": lambda: la.tune(loader, refit=False, distance_aware=False)}


def measure(config: dict[str, Any], case: dict[str, Any], peer: bool, device: str) -> None:
    """All figures of one case; each is printed at once, so that a time limit loses only the rest."""
    from laplace import Laplace

    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    dtype = getattr(torch, config["dtype"])
    model = convolutional(config["image"], config["channels"], case["n_features"], case["n_outputs"]).to(device, dtype)
    x = torch.randn(config["rows"], *config["image"], dtype=dtype).to(device)
    y = torch.randint(case["n_outputs"], (config["rows"],)).to(device)
    loader = DataLoader(TensorDataset(x, y), batch_size=config["batch_size"])

    def bare() -> None:
        with torch.inference_mode():
            for batch, _ in loader:
                model(batch)

    def fitted() -> Any:
        la = Laplace(model, "classification", "last_layer", case["structure"])
        la.fit(loader)
        return la

    bare()
    la = fitted()
    one = DataLoader(TensorDataset(x[:1], y[:1]))
    first: list[float] = []
    if not peer:  # what the first search computes and the next ones find: on one row, that and nothing else
        search = {"method": "gridsearch", "val_loader": one, "grid_size": 1}
        fitted().optimize_prior_precision(**search)  # warms up
        for _ in range(config["repeats"]):
            call = partial(fitted().optimize_prior_precision, **search)
            first.append(1e3 * (seconds(call) - seconds(call)))
        print(json.dumps({"eigendecomposition": sorted(first)[len(first) // 2]}), flush=True)
    for name, action in actions(la, loader, config, peer).items():
        timed = interleave({"bare": bare, name: action}, 1 if peer else config["repeats"], warm_up=not peer)
        print(json.dumps({name: timed}), flush=True)


def main() -> None:
    """Read the case from the command line."""
    config, asked = case_of_arguments()
    measure(config, config["cases"][asked.case], asked.peer, asked.device)


if __name__ == "__main__":
    main()
