"""The numbers of docs/differences.md: small problems on which laplace-torch 0.3 and this library disagree.

Both packages are imported as `laplace` and share their public interface, so this one script runs in either environment
and prints the measured column of that environment:

    python benchmarks/peer_differences.py                        # this library
    /path/to/laplace-torch/bin/python benchmarks/peer_differences.py   # the peer, installed on its own

It needs nothing but torch and one of the two packages, runs in float64 on the CPU and takes under a minute.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import laplace.curvature as curvature
from laplace import KronLLLaplace, Laplace

CASES: dict[str, Callable[[], object]] = {}
Measurement = Callable[..., object]


def case(name: str, *arguments: object, **options: object) -> Callable[[Measurement], Measurement]:
    """Enter a function, called with these arguments, into the table of cases under the name printed for it."""

    def enter(function: Measurement) -> Measurement:
        CASES[name] = partial(function, *arguments, **options)
        return function

    return enter


def empirical_fisher() -> type:
    """The default empirical-Fisher back end of the installed package."""
    return getattr(curvature, "AutogradEF", None) or curvature.CurvlinopsEF


def net(n_outputs: int, n_inputs: int = 3, n_features: int = 4) -> nn.Sequential:
    """A small network with fixed random weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_inputs, n_features), nn.Tanh(), nn.Linear(n_features, n_outputs))


def regression_data(n: int = 20, n_outputs: int = 2) -> tuple[Tensor, Tensor]:
    """Inputs and real targets."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, generator=generator), torch.randn(n, n_outputs, generator=generator)


def class_data(n: int = 20, n_outputs: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs and class labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, generator=generator), torch.randint(n_outputs, (n,), generator=generator)


def loader(x: Tensor, y: Tensor, batch_size: int = 8, **options: object) -> DataLoader:
    """A loader that keeps the order of its rows."""
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **options)


def fitted(likelihood: str, structure: str = "full", n_outputs: int = 3, **options: object) -> tuple[object, Tensor]:
    """A fitted last-layer approximation and the inputs that it was fitted on."""
    x, y = regression_data(n_outputs=n_outputs) if likelihood == "regression" else class_data(n_outputs=n_outputs)
    la = Laplace(net(n_outputs), likelihood, "last_layer", structure, **options)
    la.fit(loader(x, y))
    return la, x


def largest(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


# Options that are accepted ------------------------------------------------------------------------------------------


@case("damping: largest change of the output variance when damping=True")
def damping() -> float:
    x, y = regression_data()
    variances = []
    for option in (False, True):
        la = KronLLLaplace(net(2), "regression", damping=option)
        la.fit(loader(x, y))
        variances.append(la(x)[1])
    return largest(*variances)


@case("generator: largest change between two nn/mc calls with equal generators", pred_type="nn")
@case("generator: largest change between two glm/mc calls with equal generators", pred_type="glm")
def same_seed(pred_type: str) -> float:
    la, x = fitted("classification")
    generators = (torch.Generator().manual_seed(7) for _ in range(2))
    return largest(*(la(x, pred_type, link_approx="mc", generator=generator) for generator in generators))


@case("joint=True, classification: largest change against joint=False (glm/probit)")
def joint_classification() -> float:
    la, x = fitted("classification")
    return largest(la(x, joint=True), la(x))


@case("override=False: precision after two halves against one fit, largest difference")
def override() -> float:
    x, y = class_data()
    la, whole = (Laplace(net(3), "classification", "last_layer", "full") for _ in range(2))
    whole.fit(loader(x, y))
    la.fit(loader(x[:8], y[:8]))
    la.fit(loader(x[8:], y[8:]), override=False)
    return largest(la.posterior_precision, whole.posterior_precision)


@case("per-layer prior on the last layer: log evidence")
def layerwise_prior() -> float:
    la, _ = fitted("classification", "kron", prior_precision=torch.tensor([1.0, 2.0]))
    return la.log_marginal_likelihood().item()


@case("pred_type='nn' with the default link: largest |row sum - 1|")
def nn_default_link() -> float:
    la, x = fitted("classification")
    probabilities = la(x, pred_type="nn")
    return largest(probabilities.sum(-1), torch.ones(len(x)))


@case("default of dict_key_x")
def dict_key() -> str:
    return repr(inspect.signature(KronLLLaplace).parameters["dict_key_x"].default)


# Numbers ------------------------------------------------------------------------------------------------------------


@case("Laplace bridge, float32, logits up to about 200: smallest and largest row sum")
def bridge_sum() -> str:
    model, (x, y) = net(3).float(), class_data()
    with torch.no_grad():
        model[-1].weight.mul_(200.0 / model(x.float()).abs().max())
    la = Laplace(model, "classification", "last_layer", "full")
    la.fit(loader(x.float(), y))
    sums = la(x.float(), link_approx="bridge").sum(-1)
    return f"{sums.min().item():.6g} to {sums.max().item():.6g}"


@case("empirical Fisher, regression, diag, sigma 1: the same ratio", "diag", 1.0)
@case("empirical Fisher, regression, full, sigma 0.5: the same ratio", "full", 0.5)
@case("empirical Fisher, regression, full, sigma 1: trace over that of the gradients' outer products", "full", 1.0)
def fisher_ratio(structure: str, sigma: float) -> float:
    model, (x, y) = net(2), regression_data()
    la = Laplace(model, "regression", "last_layer", structure, sigma_noise=sigma, backend=empirical_fisher())
    la.fit(loader(x, y))
    precision = la.posterior_precision.diagonal() if structure == "full" else la.posterior_precision
    exact = 0.0
    for xi, yi in zip(x, y, strict=True):
        nll = -torch.distributions.Normal(model(xi), sigma).log_prob(yi).sum()
        exact += sum(g.square().sum().item() for g in torch.autograd.grad(nll, list(model[-1].parameters())))
    return (precision - 1.0).sum().item() / exact


@case("drop_last: n_data after 16 of 20 rows were seen")
def rows_seen() -> int:
    la = Laplace(net(2), "regression", "last_layer", "kron")
    la.fit(loader(*regression_data(), drop_last=True))
    return la.n_data


@case("drop_last: trace of the Kronecker weight block over that of the 16 rows seen")
def rows_seen_kron() -> float:
    x, y = regression_data()
    traces = []
    for data in (loader(x, y, drop_last=True), loader(x[:16], y[:16])):
        la = Laplace(net(2), "regression", "last_layer", "kron")
        la.fit(data)
        precision = la.posterior_precision.to_matrix()
        traces.append((precision.diagonal()[:8] - 1.0).sum().item())
    return traces[0] / traces[1]


@case("Kronecker log evidence: derivative in sigma, autograd / central difference")
def evidence_gradient() -> str:
    la, _ = fitted("regression", "kron")

    def evidence(value: float) -> tuple[float, float]:
        sigma = torch.tensor(value, requires_grad=True)
        z = la.log_marginal_likelihood(sigma_noise=sigma)
        return z.item(), torch.autograd.grad(z, sigma)[0].item()

    step = 1e-5
    difference = (evidence(0.7 + step)[0] - evidence(0.7 - step)[0]) / (2 * step)
    return f"{evidence(0.7)[1]:.4f} / {difference:.4f}"


@case("classification with one output: probabilities of 20 inputs, smallest and largest")
def one_output() -> str:
    x, y = class_data(n_outputs=2)
    la = Laplace(net(1), "classification", "last_layer", "full")
    la.fit(loader(x, y.double().unsqueeze(-1)))
    probabilities = la(x)
    return f"{probabilities.min().item():.6g} to {probabilities.max().item():.6g}"


@case("grid search when no grid point has a finite loss: prior precision afterwards")
def gridsearch_infinite() -> float:
    la, x = fitted("classification")
    data = loader(x, class_data()[1])
    options = {"val_loader": data, "loss": lambda *_: torch.tensor(torch.inf), "grid_size": 5}
    la.optimize_prior_precision(method="gridsearch", **options)
    return la.prior_precision.item()


@case("grid search over 5 values with losses 3, NaN, 1, 2, 4: prior precision afterwards")
def gridsearch_nan() -> float:
    la, x = fitted("classification")
    losses = iter([3.0, torch.nan, 1.0, 2.0, 4.0])
    options = {"val_loader": loader(x, class_data()[1]), "loss": lambda *_: torch.tensor(next(losses)), "grid_size": 5}
    la.optimize_prior_precision(method="gridsearch", **options)
    return la.prior_precision.item()


# The user's model and data ------------------------------------------------------------------------------------------


@case("the user's model after fit of all weights: training flag, attributes that were added", "all")
@case("the user's model after fit of the last layer: training flag, attributes that were added", "last_layer")
def model_after_fit(subset: str) -> str:
    model = net(3)
    before = set(vars(model))
    la = Laplace(model, "classification", subset, "diag")
    la.fit(loader(*class_data()))
    return f"training={model.training}, added={sorted(set(vars(model)) - before)}"


@case("last layer: weights are shared with the user's model")
def shares_weights() -> bool:
    model, (x, y) = net(3), class_data()
    la = Laplace(model, "classification", "last_layer", "full")
    la.fit(loader(x, y))
    pointers = {p.data_ptr() for p in la.model.parameters()}
    return pointers == {p.data_ptr() for p in model.parameters()}


@case("copy.deepcopy of a fitted Kronecker approximation: largest change of its predictions")
def deep_copy() -> float:
    la, x = fitted("classification", "kron")
    return largest(copy.deepcopy(la)(x), la(x))


@case("state_dict: rows of training data that it holds")
def saved_data() -> int:
    la, x = fitted("classification")
    values = [v for value in la.state_dict().values() for v in (value if isinstance(value, (list, tuple)) else [value])]
    return sum(len(v) for v in values if isinstance(v, Tensor) and v.ndim == x.ndim and torch.equal(v, x[: len(v)]))


@case("calling an approximation that was not fitted")
def not_fitted() -> str:
    la = Laplace(net(3), "classification", "last_layer", "full", last_layer_name="2")
    return f"returns {type(la(class_data()[0])).__name__}"


def _fit_and_predict(model: nn.Module, likelihood: str, structure: str, x: Tensor, y: Tensor) -> str:
    la = Laplace(model, likelihood, "last_layer", structure)
    la.fit(loader(x, y))
    out = la(x[:2])
    return f"shape {tuple((out[0] if isinstance(out, tuple) else out).shape)}"


@case("classification of sequences [B, 5, 4], diag", "diag")
@case("classification of sequences [B, 5, 4], kron", "kron")
@case("classification of sequences [B, 5, 4], full", "full")
def sequences(structure: str) -> str:
    x = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(1))
    return _fit_and_predict(net(4), "classification", structure, x, torch.zeros(12, 5, dtype=torch.long))


class Squeezed(nn.Module):
    """A regressor that returns one number per input, [batch]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(1)

    def forward(self, x: Tensor) -> Tensor:
        """The network's only output, without its axis."""
        return self.net(x).squeeze(-1)


@case("regression with outputs [B], diag", "diag")
@case("regression with outputs [B], kron", "kron")
@case("regression with outputs [B], full", "full")
def squeezed(structure: str) -> str:
    x, y = regression_data(n_outputs=1)
    return _fit_and_predict(Squeezed(), "regression", structure, x, y[:, 0])


# Cost ---------------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that an operation in its body returned."""

    numel = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


@case("default call, classification, 128 -> 400, kron, one input", "kron", 400, "classification")
@case("diagonal_output=True, regression, 128 -> 600, diag, one input", "diag", 600, "regression", True)
def prediction_cost(structure: str, n_outputs: int, likelihood: str, diagonal: bool = False) -> str:
    """Best of three times and the largest tensor of a prediction (float32, 128 features)."""
    torch.set_default_dtype(torch.float32)
    try:
        model = net(n_outputs, n_features=128)
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
        y = torch.randn(16, n_outputs) if likelihood == "regression" else torch.arange(16) % n_outputs
        la = Laplace(model, likelihood, "last_layer", structure)
        la.fit(loader(x, y))
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            la(x[:1], diagonal_output=diagonal)
            seconds.append(time.perf_counter() - start)
        with LargestTensor() as largest_tensor:
            la(x[:1], diagonal_output=diagonal)
        return f"{min(seconds[1:]):.2g} s, largest tensor {largest_tensor.numel} numbers"
    finally:
        torch.set_default_dtype(torch.float64)


def measure(function: Callable[[], object]) -> str:
    """The outcome of one case as text; what it raises is an outcome too."""
    try:
        outcome = function()
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return f"{outcome:.6g}" if isinstance(outcome, float) else str(outcome)


def installed() -> str:
    """Name and version of the package that answers to `laplace`."""
    for name in ("laplace-torch", "laplace-posthoc"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "laplace from the source tree"


def main() -> None:
    """Run the cases named on the command line, or all of them, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", help="only the cases whose name contains this text")
    parser.add_argument("--json", type=Path, help="also write the outcomes to this file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    outcomes = {}
    print(f"| measured, torch {torch.__version__} | {installed()} |\n|---|---|")
    for name, function in CASES.items():
        if arguments.k in name:
            torch.manual_seed(0)
            outcomes[name] = measure(function)
            print(f"| {name} | {outcomes[name]} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"package": installed(), "outcomes": outcomes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
