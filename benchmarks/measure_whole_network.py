"""Measure one case of ``whole_network.json`` with whichever ``laplace`` the interpreter finds; print JSON lines.

The same file runs under this library and under laplace-torch, whose import name is the same: each in an environment of
its own. Memory is measured first, in a process that has done nothing but bare passes (and, for a prediction, the fit);
times are medians over repeats that alternate with bare passes of another copy of the model on the same data.
"""

from __future__ import annotations

import json
import resource
import warnings
from math import prod
from typing import Any

import torch
from measuring import added_mb, case_of_arguments, interleave, seconds
from networks import build
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import laplace

warnings.filterwarnings("ignore")


def report(**figures: Any) -> None:
    """Print finished parts at once, so that a time limit loses only the rest."""
    print(json.dumps(figures), flush=True)


def covered_weights(la: Any) -> int | None:
    """How many weights laplace-torch's Kronecker blocks have: a back end may skip modules without a word."""
    blocks = getattr(getattr(la, "H", None), "eigenvalues", None)
    return None if blocks is None else sum(prod(len(factor) for factor in block) for block in blocks)


def trace(la: Any) -> float:
    """Trace of the curvature: that of the posterior precision under a prior next to nothing."""
    la.prior_precision = 1e-12  # beside 1, the small entries of a large network would be rounded away
    precision = la.posterior_precision
    return (precision if torch.is_tensor(precision) else precision.diag()).detach().double().sum().item()


class Case:
    """A network, its data, what is measured and what it is compared with."""

    def __init__(self, config: dict[str, Any], case: dict[str, Any], back_end: str | None, device: str) -> None:
        self.case, self.back_end, self.device = case, back_end, device
        self.network = config["networks"][case["network"]]
        self.model = self.copy_of_model(config)
        # Back ends leave hooks and attributes at the model: bare passes run on one that no back end has seen.
        self.bare_model = self.copy_of_model(config)
        torch.manual_seed(config["seed"])
        shape = (self.network["rows"], *self.network["input"])
        x = torch.randint(self.network["tokens"], shape) if "tokens" in self.network else torch.randn(shape)
        y = torch.randint(config["n_outputs"], (self.network["rows"],))
        x, y = x.to(device), y.to(device)
        self.loader = DataLoader(TensorDataset(x, y), batch_size=self.network["batch_size"])
        self.inputs = x[: config["predict_rows"]]

    def copy_of_model(self, config: dict[str, Any]) -> nn.Module:
        """The same model every time."""
        torch.manual_seed(config["seed"])
        return build(self.network["kind"], self.network["options"], config["n_outputs"]).to(self.device)

    def bare_pass(self) -> None:
        """The unit of a fit: forward and backward of the training loss over the data."""
        parameters = list(self.bare_model.parameters())
        for x, y in self.loader:
            torch.autograd.grad(nn.functional.cross_entropy(self.bare_model(x), y, reduction="sum"), parameters)

    def bare_forward(self) -> None:
        """The unit of a prediction: the outputs of its inputs."""
        with torch.inference_mode():
            self.bare_model(self.inputs)

    def fit(self, loader: Any = None) -> Any:
        """An approximation of all weights, fitted to the data."""
        options: dict[str, Any] = {}
        if self.back_end:
            options["backend"] = getattr(laplace.curvature, self.back_end)
        if self.case.get("sampled"):
            options["backend_kwargs"] = {"stochastic": True}
        la = laplace.Laplace(self.model, "classification", "all", self.case["structure"], **options)
        la.fit(loader or self.loader)
        return la

    def measure_fit(self) -> None:
        """Memory and time of a fit, to the data and to the same once more, and a bare pass over them."""
        self.bare_pass()
        report(bare_mb=added_mb(self.bare_pass))
        fits: list[Any] = []
        first: list[float] = []
        added = added_mb(lambda: first.append(seconds(lambda: fits.append(self.fit()))))
        report(mb=added, first=1e3 * first[0])
        la = fits.pop()
        report(covered=covered_weights(la), trace=trace(la))
        del la
        twice = DataLoader(ConcatDataset(2 * [self.loader.dataset]), self.loader.batch_size)
        actions = {"bare": self.bare_pass, "time": self.fit, "twice": lambda: self.fit(twice)}
        report(**interleave(actions, self.network["repeats"], False, self.network["budget_s"]))

    def measure_prediction(self) -> None:
        """Memory and time of a prediction, first and later, and a bare forward pass of the same inputs."""
        self.bare_forward()
        report(bare_mb=added_mb(self.bare_forward))
        # The cost of a prediction does not depend on how many data were seen: one batch is enough.
        la = self.fit(self.first_batch())
        first: list[float] = []

        def predict() -> Any:
            return la(self.inputs, pred_type="glm", link_approx="probit")

        added = added_mb(lambda: first.append(seconds(predict)))
        report(first_mb=added, first=1e3 * first[0])
        report(mb=added_mb(predict))
        actions = {"bare": self.bare_forward, "time": predict}
        report(**interleave(actions, self.network["predict_repeats"], False, self.network["budget_s"]))

    def first_batch(self) -> DataLoader:
        """The first batch of the data, as a loader."""
        x, y = next(iter(self.loader))
        return DataLoader(TensorDataset(x, y), batch_size=len(y))


def main() -> None:
    """Read the case from the command line."""
    config, asked = case_of_arguments()
    torch.set_num_threads(config["threads"])
    if asked.device == "cpu":  # a GPU's driver reserves more addresses than that
        limit = int(config["memory_limit_gb"] * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    case = Case(config, config["cases"][asked.case], asked.back_end, asked.device)
    report(n_weights=sum(p.numel() for p in case.model.parameters()))
    try:
        case.measure_fit() if case.case["task"] == "fit" else case.measure_prediction()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        report(note=": ".join([type(error).__name__, *lines[:1]]))


if __name__ == "__main__":
    main()
