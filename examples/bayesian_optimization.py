# %% [markdown]
# # Bayesian optimization with a network
#
# A function that is expensive to evaluate is maximized with few evaluations: a network is trained on all values seen so
# far, its posterior says where it could be higher, and BoTorch proposes the points to evaluate next. Here it is the
# function of Branin, of two inputs, turned upside down, with three equal maxima. 8 values to begin with, then 8 rounds
# of two.
#
# Run it with `python examples/bayesian_optimization.py`: it prints each round and writes a picture to
# `examples/output`.

# %%
from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.exceptions.warnings import BotorchWarning
from botorch.models.transforms import Standardize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.test_functions import Branin
from linear_operator.utils.warnings import NumericalWarning
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from laplace import Laplace
from laplace.integrations.botorch import LaplaceModel

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # line searches see the rounding of float32
warnings.simplefilter("ignore", BotorchWarning)  # of line searches that end early
warnings.simplefilter("ignore", NumericalWarning)  # of 1e-8 on the diagonal of covariances
warnings.filterwarnings("ignore", "The noise that the evidence chose")  # is small, as this function has none

parser = argparse.ArgumentParser(description="Bayesian optimization of Branin's function with a network.")
parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
parser.add_argument("--rounds", type=int, default=8, help="rounds of two evaluations")

SQUARE = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
BRANIN = Branin(negate=True)


def branin(X: Tensor) -> Tensor:
    """Values at points of the unit square."""
    low, high = BRANIN.bounds
    return BRANIN(low + (high - low) * X).unsqueeze(-1)


# %% [markdown]
# ## The network
#
# Few values need a small, smooth network that is well trained: L-BFGS with a penalty on the weights. Each input enters
# as a point on a half circle. The prior variance of a network grows with the norm of its inputs; on circles all inputs
# have the same, so that corners do not look most uncertain only because they are corners.


# %%
class OnCircles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        angle = torch.pi * (x - 0.5)
        return torch.cat([angle.sin(), angle.cos()], -1)


def trained(X: Tensor, y: Tensor) -> nn.Module:
    """From new first weights, on all values so far."""
    model = nn.Sequential(OnCircles(), nn.Linear(4, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 1))
    weights = list(model.parameters())
    optimizer = torch.optim.LBFGS(weights, max_iter=150, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = (model(X) - y).square().sum() + 0.003 * sum(weight.square().sum() for weight in weights)
        total.backward()
        return total

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return model


# %% [markdown]
# ## Its posterior, as a model of BoTorch
#
# All weights are random: the features of a network that has seen few values know them by heart, and a last layer alone
# is then much too sure of itself. Prior precision and noise maximize the evidence.


# %%
def posterior(X: Tensor, Y: Tensor) -> LaplaceModel:
    standardize = Standardize(m=1)
    y = standardize(Y)[0]
    la = Laplace(trained(X, y), "regression", subset_of_weights="all", hessian_structure="full", sigma_noise=0.1)
    la.fit([(X, y)]).optimize_prior_precision(method="marglik", noise="scalar")
    return LaplaceModel(la, outcome_transform=standardize)


# %% [markdown]
# ## The search
#
# Any acquisition function of BoTorch will do; this one proposes two points at a time, which know of one another.


# %%
def search(n_rounds: int) -> tuple[Tensor, Tensor]:
    """All points that were evaluated, and their values."""
    torch.manual_seed(0)
    X = SobolEngine(2, scramble=True, seed=0).draw(8, dtype=torch.float64)
    Y = branin(X)
    options: dict[str, Any] = {"num_restarts": 4, "raw_samples": 64, "options": {"maxiter": 50}}
    for number in range(n_rounds):
        sampler = SobolQMCNormalSampler(torch.Size([64]), seed=number)
        acquisition = qLogExpectedImprovement(posterior(X, Y), best_f=Y.max(), sampler=sampler)
        chosen, _ = optimize_acqf(acquisition, SQUARE, q=2, **options)
        X, Y = torch.cat([X, chosen]), torch.cat([Y, branin(chosen)])
        print(f"round {number + 1}: found {Y[-2:].max().item():8.3f}, best {Y.max().item():7.3f}")
    return X, Y


# %% [markdown]
# ## What it looked like
#
# On the left what the last posterior expects, with the points that were evaluated and one function drawn from it; on
# the right the best value so far beside that of as many Sobol points.


# %%
def picture(X: Tensor, Y: Tensor) -> Figure:
    model = posterior(X, Y)
    side = torch.linspace(0, 1, 60)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mean, drawn = model.posterior(grid.unsqueeze(1)).mean.squeeze(), model.sample()(grid).squeeze()
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.2]})
    levels = [-200, -100, -50, -25, -10, -3, 0]
    left.contourf(side, side, mean.reshape(60, 60).T, 20)
    left.contour(side, side, drawn.reshape(60, 60).T, levels, colors="white", linewidths=0.6, linestyles="dashed")
    left.scatter(X[:8, 0], X[:8, 1], color="white", edgecolor="black", label="first")
    left.scatter(X[8:, 0], X[8:, 1], color="C3", edgecolor="black", label="proposed")
    left.set(title="expected value, and a drawn function (dashed)", xlabel="first input", ylabel="second input")
    left.legend(fontsize="small")
    sobol = branin(SobolEngine(2, scramble=True, seed=0).draw(len(Y), dtype=torch.float64))
    for values, name, color in ((Y, "network", "C0"), (sobol, "Sobol points", "C7")):
        regret = BRANIN.optimal_value - values[:, 0].cummax(0).values
        right.semilogy(range(1, len(Y) + 1), regret.clamp(min=1e-6), color=color, label=name)
    right.axvline(8.5, color="black", linewidth=0.6, linestyle=":")
    right.set(xlabel="evaluations", title="distance of the best value from the maximum")
    right.legend(fontsize="small")
    return figure


# %%
if __name__ == "__main__":
    arguments = parser.parse_args()
    X, Y = search(arguments.rounds)
    random = branin(SobolEngine(2, scramble=True, seed=0).draw(len(Y), dtype=torch.float64)).max().item()
    print(f"best of {len(Y)} values {Y.max().item():.3f}; of as many Sobol points {random:.3f}")
    print(f"the maximum is {BRANIN.optimal_value:.3f}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    picture(X, Y).savefig(arguments.output / "bayesian_optimization.png", dpi=120)
    print(f"picture: {arguments.output / 'bayesian_optimization.png'}")
