# %% [markdown]
# # Where to measure next: Thompson sampling with functions
#
# Some searches ask for whole functions, not for error bars. Here a network has seen a dozen values of an expensive
# function, and must find its maximum with as few more as possible. Thompson sampling draws one function that is
# consistent with the data and measures where *that function* is largest. It needs draws that hang together from input
# to input; error bars of single inputs do not give them.
#
# With so few data the Gaussian process of `hessian_structure="gp"` is the right form of the posterior: its matrices
# have the size of the data, a few dozen rows, however many weights the network has.
#
# Run it with `python examples/function_space.py`: it prints what it finds and writes a picture to `examples/output`.

# %%
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from laplace import FunctionalLaplace

torch.set_num_threads(1)  # the network is tiny: a second thread costs more than it brings
torch.set_default_dtype(torch.float64)

parser = argparse.ArgumentParser(description="Find the maximum of a function by drawing functions.")
parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
parser.add_argument("--steps", type=int, default=12, help="how many values to measure after the first six")

# %% [markdown]
# ## The function, and a network that learns it
#
# Two hills; the higher one lies where nothing was measured at first. Measurements are noisy.


# %%
NOISE, PRECISION = 0.05, 0.2
GRID = torch.linspace(-3, 3, 301).unsqueeze(1)


def hills(x: Tensor) -> Tensor:
    """A low hill on the left, a higher one on the right."""
    return 0.8 * torch.exp(-((x + 1.5) ** 2)) + 1.2 * torch.exp(-((x - 1.7) ** 2)) - 0.1 * x**2


def train(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """A small network, fitted with weight decay: its weights are then the mode of a posterior."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(600):
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum() / (2 * NOISE**2) + 0.5 * PRECISION * sum(
            p.square().sum() for p in model.parameters()
        )
        loss.backward()
        optimizer.step()
    return model.eval()


# %% [markdown]
# ## One step: fit, draw, measure
#
# `n_subset` is the number of data: all of them. The prior is the one that the network was trained with, its weight
# decay. `functional_samples(..., joint=True)` draws whole functions.


# %%
def posterior(model: nn.Module, x: Tensor, y: Tensor) -> FunctionalLaplace:
    """The process around the network."""
    la = FunctionalLaplace(model, "regression", n_subset=len(x), sigma_noise=NOISE, prior_precision=PRECISION)
    la.fit([(x, y)])
    return la


def search(n_steps: int) -> tuple[Tensor, Tensor, FunctionalLaplace]:
    """Measurements, and the process after the last of them."""
    noise = torch.Generator().manual_seed(0)
    x = torch.linspace(-2.8, 0.2, 6).unsqueeze(1)
    y = hills(x) + NOISE * torch.randn(x.shape, generator=noise)
    for step in range(n_steps):
        la = posterior(train(x, y, step), x, y)
        function = la.functional_samples(GRID, n_samples=1, joint=True, generator=noise)[0]
        chosen = GRID[function.argmax()].unsqueeze(0)
        x = torch.cat([x, chosen])
        y = torch.cat([y, hills(chosen) + NOISE * torch.randn(1, 1, generator=noise)])
        print(
            f"step {step + 1:2d}: measured at {chosen.item():+.2f}, found {y[-1].item():.2f}, best {y.max().item():.2f}"
        )
    return x, y, posterior(train(x, y, n_steps), x, y)


# %% [markdown]
# ## What the functions looked like
#
# Before the search the draws disagree where nothing was measured, which is why it looks there. After it they agree
# where the maximum is, and still disagree where it cannot be.


# %%
def picture(x: Tensor, y: Tensor, last: FunctionalLaplace) -> Figure:
    """Draws before and after the search."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    first = posterior(train(x[:6], y[:6], 0), x[:6], y[:6])
    panels = zip(figure.subplots(1, 2, sharey=True), (first, last), (6, len(x)), ("first", "last"), strict=True)
    for axes, la, n, title in panels:
        functions = la.functional_samples(GRID, n_samples=12, joint=True, generator=torch.Generator().manual_seed(1))
        mean, variance = la(GRID, diagonal_output=True)
        band = 2 * variance.sqrt().squeeze(1)
        low, high = mean.squeeze(1) - band, mean.squeeze(1) + band
        axes.fill_between(
            GRID[:, 0], low.detach(), high.detach(), color="C0", alpha=0.15, label="two standard deviations"
        )
        for number, function in enumerate(functions[:, :, 0]):
            axes.plot(
                GRID[:, 0],
                function,
                color="C0",
                linewidth=0.8,
                alpha=0.6,
                label="drawn functions" if not number else None,
            )
        axes.plot(GRID[:, 0], hills(GRID)[:, 0], color="black", linestyle="--", label="the function")
        axes.plot(x[:n, 0], y[:n, 0], "o", color="C3", markersize=4, label="measured")
        axes.set(title=f"{title} step: {n} values", xlabel="x", ylim=(-2.5, 3))
    figure.axes[0].legend(fontsize="small", loc="upper left")
    return figure


# %%
if __name__ == "__main__":
    arguments = parser.parse_args()
    x, y, last = search(arguments.steps)
    best = GRID[hills(GRID).argmax()]
    print(f"best value measured {y.max().item():.2f}; the maximum is {hills(best).item():.2f} at {best.item():+.2f}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    picture(x, y, last).savefig(arguments.output / "function_space.png", dpi=120)
    print(f"picture: {arguments.output / 'function_space.png'}")
