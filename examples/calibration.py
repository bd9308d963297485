# %% [markdown]
# # Calibrated probabilities for a trained classifier
#
# A network that was trained until it made no more errors on its training data believes itself too much: it says 97 %
# and is right nine times in ten. Here are such networks, trained on real images, and three ways to use one:
#
# * **MAP**: as it is, the softmax of its logits;
# * **MAP, temperature T**: logits divided by one number that is chosen on validation data;
# * **Laplace**: a Gaussian over the weights of its last layer, in place of the weights that training found.
#
# All of them leave the network alone. The question is what they say on images like the training data, on images that
# were turned, and on pictures that show no digit at all.
#
# Run it with `make demo`, or `python examples/calibration.py`: it prints its tables and writes them with a picture
# to `examples/output`.

# %%
from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import ndimage
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, LLLaplace
from laplace.evaluation import (
    Report,
    SoftmaxPredictor,
    fit_temperature,
    predict,
    reliability_diagram,
    risk_coverage_curve,
    side_by_side,
)

torch.set_num_threads(1)  # the images are tiny: a second thread costs more than it brings

parser = argparse.ArgumentParser(description="Compare a network, temperature scaling and last-layer Laplace.")
parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the results")
parser.add_argument("--networks", type=int, default=5, help="how many networks to train and average over (at least 2)")

# %% [markdown]
# ## Data
#
# scikit-learn ships 1797 handwritten digits of 8×8 pixels. The split is fixed and stratified: 200 to train on, 400 to
# choose the temperature and the prior precision, 1197 to test. Nothing below is chosen on test data.

# %%
N_TRAIN, N_VAL = 200, 400
ANGLES = (15, 30, 45)


def loader(images: np.ndarray, labels: np.ndarray) -> DataLoader:
    """Batches of images `[batch, 1, 8, 8]`, whose 17 shades of gray from 0 to 16 become numbers from 0 to 1."""
    x = torch.tensor(images / 16, dtype=torch.float32).unsqueeze(1)
    return DataLoader(TensorDataset(x, torch.tensor(labels)), batch_size=100)


def rotated(images: np.ndarray, angle: float) -> np.ndarray:
    """Images turned counterclockwise about their center, with linear interpolation."""
    return ndimage.rotate(images, angle, axes=(2, 1), reshape=False, order=1)


def photo_patches(size: int = 32) -> np.ndarray:
    """Squares cut from two photographs (a temple, a flower), made to look like digits in all but what they show.

    Each is averaged down to 8×8 pixels and stretched to the digits' range from 0 to 16.
    """
    patches = []
    for photo in load_sample_images().images:
        gray = photo @ np.array([0.299, 0.587, 0.114])
        rows, columns = gray.shape[0] // size, gray.shape[1] // size
        blocks = gray[: rows * size, : columns * size].reshape(rows, 8, size // 8, columns, 8, size // 8)
        patches.append(blocks.mean((2, 5)).transpose(0, 2, 1, 3).reshape(-1, 8, 8))
    together = np.concatenate(patches)
    low, high = together.min((1, 2), keepdims=True), together.max((1, 2), keepdims=True)
    return 16 * (together - low) / (high - low)


digits = load_digits()
rest, test = train_test_split(np.arange(1797), train_size=N_TRAIN + N_VAL, stratify=digits.target, random_state=0)
train, val = train_test_split(rest, train_size=N_TRAIN, stratify=digits.target[rest], random_state=0)

train_loader = loader(digits.images[train], digits.target[train])
val_loader = loader(digits.images[val], digits.target[val])
test_loader = loader(digits.images[test], digits.target[test])
rotated_loaders = {f"{a}°": loader(rotated(digits.images[test], a), digits.target[test]) for a in ANGLES}
photos = photo_patches()
photo_loader = loader(photos, np.zeros(len(photos), dtype=int))  # the labels are not used

# %% [markdown]
# ## A network that is too sure of itself
#
# Two convolutions, no weight decay, and training that goes on long after the last training error is gone.


# %%
def train_network(seed: int) -> nn.Module:
    """Train for 200 passes over the training images."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = train_loader.dataset.tensors
    for _ in range(200):
        for rows in torch.randperm(len(y)).split(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


# %% [markdown]
# ## Laplace in three lines
#
# `fit` takes one pass over the training data. What predictions are then made of can be chosen in two ways: by the
# predictions on validation data (`tune`, which gets the same information as temperature scaling; it fits the last layer
# again under several priors, and averages these heads, their temperatures and how much predictions widen where features
# are unlike those of the training data), or by the evidence of the training data (`optimize_prior_precision`, which
# chooses the prior precision alone and needs no validation data).


# %%
def laplace(model: nn.Module, structure: str, method: str) -> tuple[LLLaplace, dict[str, float]]:
    """A fitted and tuned last-layer approximation, and the milliseconds that each step took."""
    start = time.perf_counter()
    la = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure=structure)
    la.fit(train_loader)
    fitted = time.perf_counter()
    if method == "tuned":
        la.tune(val_loader)
    elif method == "T = 1":
        la.tune(val_loader, output_temperature=False)
    else:
        la.optimize_prior_precision()
    tuned = time.perf_counter()
    return la, {"fit ms": 1e3 * (fitted - start), "tune ms": 1e3 * (tuned - fitted)}


METHODS = {f"Laplace {structure}, tuned": (structure, "tuned") for structure in ("full", "kron", "diag")}
METHODS["Laplace kron, T = 1"] = ("kron", "T = 1")
METHODS |= {f"Laplace {structure}, evidence": (structure, "evidence") for structure in ("full", "kron", "diag")}

# %% [markdown]
# ## Side by side
#
# One network is an anecdote, so everything is repeated for several that differ in their random numbers alone; the
# tables show the mean over networks and its standard error. The score that tells digits from photographs is the same
# for all methods: the probability that the most probable class is wrong, 1 − max p.
#
# A fitted estimator is a function from images to probabilities, `la(x)`, and goes into the comparison as it is.


# %%
def compare(model: nn.Module) -> tuple[Report, dict[str, Callable[[Tensor], Tensor]]]:
    """All methods on one network: their table, and the methods themselves."""
    start = time.perf_counter()
    scaled = fit_temperature(model, val_loader)
    costs = {"MAP, temperature T": {"tune ms": 1e3 * (time.perf_counter() - start)}}
    estimators: dict[str, Any] = {}
    for name, (structure, method) in METHODS.items():
        estimators[name], costs[name] = laplace(model, structure, method)
    report = side_by_side(
        model,
        estimators,
        test_loader,
        val_loader=val_loader,
        shifted=rotated_loaders,
        ood_loader=photo_loader,
    )
    for column in ("fit ms", "tune ms"):
        report = report.with_column(column, {name: cost[column] for name, cost in costs.items() if column in cost})
    temperatures = {name: float(la.output_temperature) for name, la in estimators.items()}
    report = report.with_column("T", {"MAP, temperature T": scaled.temperature, **temperatures})
    report = report.with_column("log10 δ", {name: math.log10(la.prior_precision) for name, la in estimators.items()})
    return report, {"MAP": SoftmaxPredictor(model), "MAP, temperature T": scaled, **estimators}


arguments, _ = parser.parse_known_args()
networks = [train_network(seed) for seed in range(arguments.networks)]
laplace(networks[0], "kron", "tuned")  # the first call of everything is slow; it is not timed
results = [compare(network) for network in networks]
average = Report.average([report for report, _ in results])

# %% [markdown]
# ## Tables

# %%
sections = {
    f"Upright digits ({len(test)} test images), and {len(photos)} photographs to be told from them": average.table(
        ["accuracy", "NLL", "ECE", "Brier", "OOD AUROC"]
    ),
    "Rotated digits: negative log-likelihood (nats)": average.table([f"NLL {name}" for name in rotated_loaders]),
    "Rotated digits: expected calibration error": average.table([f"ECE {name}" for name in rotated_loaders]),
    "Milliseconds on one thread, and what was chosen: output temperature T, prior precision δ": average.table(
        ["fit ms", "tune ms", "predict ms", "T", "log10 δ"], digits=1
    ),
}
text = f"Mean ± standard error over {len(networks)} networks.\n\n" + "\n\n".join(
    f"{title}\n\n{table}" for title, table in sections.items()
)
print(text)

arguments.output.mkdir(parents=True, exist_ok=True)
(arguments.output / "calibration.md").write_text(text + "\n", encoding="utf-8")
record = {
    "images": {"train": len(train), "validation": len(val), "test": len(test), "photographs": len(photos)},
    "mean": average.rows,
    "standard_error": average.errors,
    "networks": [report.rows for report, _ in results],
}
(arguments.output / "calibration.json").write_text(
    json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
)

# %% [markdown]
# ## Picture
#
# The predictions of all networks together, in ten bins of confidence (so the calibration errors of the legends differ a
# little from those of the table, which are means over networks). Left and middle: a method whose points lie on the
# diagonal can be taken at its word; below the diagonal it is overconfident, above it too modest. Right: the share of
# errors that remains when the least certain predictions are left to someone else.

# %%
SHOWN = ["MAP", "MAP, temperature T", "Laplace kron, tuned", "Laplace kron, evidence"]


def pooled(data: DataLoader) -> dict[str, tuple[Tensor, Tensor]]:
    """Probabilities and targets of all networks, by method."""
    parts = {name: [predict(predictors[name], data) for _, predictors in results] for name in SHOWN}
    return {
        name: (torch.cat([part.probs for part in part_list]), torch.cat([part.y for part in part_list]))
        for name, part_list in parts.items()
    }


upright, turned = pooled(test_loader), pooled(rotated_loaders["30°"])
figure = Figure(figsize=(15, 6.8), layout="constrained")
left, middle, right = figure.subplots(1, 3)
reliability_diagram(upright, n_bins=10, title="Upright digits", ax=left)
reliability_diagram(turned, n_bins=10, title="Digits rotated by 30°", ax=middle)
risk_coverage_curve(turned, title="Digits rotated by 30°", ax=right)
figure.savefig(arguments.output / "calibration.png", dpi=100, bbox_inches="tight")
print(f"\nWritten to {arguments.output}: calibration.md, calibration.json, calibration.png")

# %% [markdown]
# ## What it shows
#
# * **Upright digits.** Temperature scaling and `tune` repair the network equally well: the calibration error falls from
#   about 6 % to about 2 %, the negative log-likelihood by more than a third, and accuracy stays. Where that is all you
#   need, a temperature is simpler.
# * **Without a temperature** (`tune(val_loader, output_temperature=False)`) heads under stronger priors do what a
#   temperature does: on upright digits the difference is small.
# * **Rotated digits.** Both help, neither is enough: at 30° every method that was tuned on upright images is still too
#   sure of itself. `tune` is ahead of the temperature, because the features of turned digits are unlike those it knows.
# * **Photographs.** A temperature hardly changes which of two images is the more certain one, so it hardly helps to
#   recognize foreign inputs. `tune` widens predictions where features are far from those of the training images. The
#   variance of the posterior alone (the evidence with the full structure) helps less. `la.ood_score` looks at the
#   features directly.
# * **The evidence.** It needs no validation data, and here it is far too cautious on upright digits: right nine times
#   in ten, and sure of almost nothing. The training data hardly curve the loss of a network that is sure of all of
#   them, so few directions of the weights count as known. At 45°, where the network is wrong three times in four, the
#   same caution makes it the best calibrated by far.
# * **Structures.** After a refit of the head predictions of a classifier do not use the posterior's variance, so that
#   full, kron and diag predict alike; their samples and evidence differ.
# * **Cost.** Fitting is one pass over the training data. `tune` is one pass over the validation data and nine small
#   convex problems, and predicting costs a little more than the network itself.
