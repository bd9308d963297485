"""The rows of docs/differences.md on ``marglik_training``; run in either environment like ``peer_differences.py``.

python benchmarks/peer_differences_training.py
"""

from __future__ import annotations

import warnings

import torch
from peer_differences import installed, measure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace.curvature import CurvlinopsGGN
from laplace.marglik_training import marglik_training

try:
    from laplace.curvature import AutogradGGN as Backend
except ImportError:
    Backend = CurvlinopsGGN


def problem(n_outputs: int = 2) -> tuple[nn.Module, TensorDataset]:
    """A linear model and 20 rows."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, n_outputs)
    return nn.Sequential(nn.Linear(3, n_outputs)), TensorDataset(x, y)


def weight_of_the_prior() -> float:
    """At the end of training −∇nll = w δ θ: the factor w, which is 1 at the maximum of the log joint density."""
    model, data = problem()
    sigma, delta, n_epochs = 0.5, 7.0, 3000
    marglik_training(
        model,
        DataLoader(data, batch_size=20),
        "regression",
        "full",
        backend=Backend,
        optimizer_kwargs={"lr": 1e-2},
        scheduler_cls=torch.optim.lr_scheduler.ExponentialLR,  # Adam does not settle at a constant rate
        scheduler_kwargs={"gamma": 0.997},
        n_epochs=n_epochs,
        marglik_frequency=n_epochs,
        n_hypersteps=1,
        lr_hyp=1e-12,
        prior_structure="scalar",
        prior_prec_init=delta,
        sigma_noise_init=sigma,
        fix_sigma_noise=True,
    )
    x, y = data.tensors
    model.zero_grad()
    nll = (model(x) - y).square().sum() / (2 * sigma**2)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(nll, list(model.parameters()))])
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    return float(-(gradient @ theta) / (delta * theta @ theta))


def outcome(likelihood: str = "regression", n_outputs: int = 2, as_list: bool = False, **options: object) -> str:
    """What a short training comes to."""
    model, data = problem(n_outputs)
    if likelihood == "reward_modeling":
        x = torch.randn(20, 2, 3)
        data = TensorDataset(x, torch.randint(2, (20,)))
    loader = DataLoader(data, batch_size=10)
    settings = {"n_epochs": 2, "n_hypersteps": 1} | options
    source = list(loader) if as_list else loader
    la, _, margliks, _ = marglik_training(model, source, likelihood, "full", backend=Backend, **settings)
    return f"returns {type(la).__name__} after {len(margliks)} steps of the hyperparameters"


CASES = {
    "weight of the prior, regression, 2 outputs, σ = 0.5": weight_of_the_prior,
    "AdamW": lambda: outcome(optimizer_cls=torch.optim.AdamW),
    "burn-in of 5 epochs, 2 epochs of training": lambda: outcome(n_epochs_burnin=5),
    "a list of batches": lambda: outcome(as_list=True),
    "reward modeling": lambda: outcome("reward_modeling", 1),
}


def main() -> None:
    """Print a Markdown table."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(f"| measured, torch {torch.__version__} | {installed()} |\n|---|---|")
    for name, function in CASES.items():
        print(f"| {name} | {measure(function)} |", flush=True)


if __name__ == "__main__":
    main()
