"""Measure one back end on one network of ``backends.json``, or the Kronecker factors of BackPACK; print JSON lines.

A process for each back end, so that what one leaves in memory is not counted for another. Every figure is of a later
call: the first one, in which packages are imported and buffers are made, is not counted.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from measuring import added_mb, interleave
from networks import build
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace.curvature
from laplace import Laplace
from laplace.curvature import AutogradGGN
from laplace.errors import UnsupportedError

warnings.filterwarnings("ignore")


def report(**figures: Any) -> None:
    """Print finished parts at once, so that a time limit loses only the rest."""
    print(json.dumps(figures), flush=True)


class Case:
    """A network, its data and a back end."""

    def __init__(self, config: dict[str, Any], network: dict[str, Any], back_end: str, sampled: bool) -> None:
        self.config = config
        torch.manual_seed(config["seed"])
        self.model = build(network["kind"], network["options"], config["n_outputs"])
        x = torch.randn(config["rows"], *network["input"])
        y = torch.randint(config["n_outputs"], (config["rows"],))
        self.loader = DataLoader(TensorDataset(x, y), batch_size=config["batch_size"])
        self.inputs = x[: config["predict_rows"]]
        self.options: dict[str, Any] = {"backend": getattr(laplace.curvature, back_end)}
        if sampled:
            self.options["backend_kwargs"] = {"stochastic": True}

    def bare_pass(self) -> None:
        """The unit of a fit: outputs of all data."""
        with torch.inference_mode():
            for x, _ in self.loader:
                self.model(x)

    def bare_forward(self) -> None:
        """The unit of a prediction: outputs of its inputs."""
        with torch.inference_mode():
            self.model(self.inputs)

    def fit(self, structure: str) -> Any:
        """An approximation of all weights."""
        la = Laplace(self.model, "classification", "all", structure, **self.options)
        la.fit(self.loader)
        return la

    def measure(self, structure: str) -> dict[str, Any]:
        """Time and memory of a fit, or why there is none."""
        self.bare_pass()
        try:
            self.fit(structure)
        except UnsupportedError as error:
            return {"refused": str(error)}
        added = added_mb(lambda: self.fit(structure))
        times = self.interleave({"bare": self.bare_pass, "time": lambda: self.fit(structure)})
        return {"mb": added, **times}

    def measure_prediction(self) -> dict[str, Any]:
        """Time of a prediction with a diagonal structure, or why there is none."""
        try:
            la = self.fit("diag")
        except UnsupportedError as error:
            return {"refused": str(error)}

        def predict() -> Any:
            return la(self.inputs, pred_type="glm", link_approx="probit")

        self.bare_forward()
        predict()
        return self.interleave({"bare": self.bare_forward, "time": predict})

    def interleave(self, actions: dict[str, Any]) -> dict[str, float]:
        """Median times; a first call was made before."""
        return interleave(actions, self.config["repeats"], warm_up=False, budget_s=self.config["budget_s"])


def two_convolutions(image: list[int], channels: list[int], n_outputs: int) -> nn.Sequential:
    """Two convolutions and a linear head."""
    first, second = channels
    layers = [nn.Conv2d(image[0], first, 3, padding=1), nn.ReLU(), nn.Conv2d(first, second, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(second * image[1] * image[2], n_outputs)).double()


def measure_factors(config: dict[str, Any]) -> None:
    """Trace of G ⊗ A of each weight: by BackPACK itself, by our expand factors, and of the exact matrix."""
    import backpack

    sizes = config["factors"]
    torch.manual_seed(config["seed"])
    model = two_convolutions(sizes["image"], sizes["channels"], config["n_outputs"])
    x = torch.randn(sizes["rows"], *sizes["image"], dtype=torch.float64)
    y = torch.randint(config["n_outputs"], (sizes["rows"],))
    weights = [index for index, p in enumerate(model.parameters()) if p.dim() > 1]
    back_end = AutogradGGN(model, "classification")
    exact = back_end.diag(x, y)[1].split([p.numel() for p in model.parameters()])
    ours = back_end.kron(x, y, sizes["rows"])[1].kfacs
    extended = backpack.extend(two_convolutions(sizes["image"], sizes["channels"], config["n_outputs"]))
    extended.load_state_dict(model.state_dict())
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))(extended(x), y)
    with backpack.backpack(backpack.extensions.KFLR()):
        loss.backward()
    theirs: list[Any] = [parameter.kflr for parameter in extended.parameters()]
    names = [name for name, _ in model.named_parameters()]
    report(
        factors=[
            {
                "weight": names[i],
                "positions": sizes["image"][1] * sizes["image"][2] if "0" <= names[i][0] <= "2" else 1,
                "exact": float(exact[i].sum()),
                "ours": trace_of_product(ours[i]) / float(exact[i].sum()),
                "backpack": trace_of_product(theirs[i]) / float(exact[i].sum()),
            }
            for i in weights
        ]
    )


def trace_of_product(factors: list[Tensor]) -> float:
    """Trace of G ⊗ A."""
    G, A = factors
    return float(G.trace() * A.trace())


def main() -> None:
    """Read the case from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--network")
    parser.add_argument("--back-end", help="a class of laplace.curvature; without it the factors of BackPACK")
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text())
    if arguments.quick:
        config |= config["quick"]
    torch.set_num_threads(config["threads"])
    if arguments.back_end is None:
        measure_factors(config)
        return
    case = Case(config, config["networks"][arguments.network], arguments.back_end, arguments.sampled)
    report(n_weights=sum(p.numel() for p in case.model.parameters()))
    for structure in ("diag", "kron", "full"):
        report(**{structure: case.measure(structure)})
    report(predict=case.measure_prediction())


if __name__ == "__main__":
    main()
