# %% [markdown]
# # In a scikit-learn pipeline
#
# `LaplaceClassifier` is a network with calibrated probabilities that goes wherever a classifier of scikit-learn goes:
# into a `Pipeline`, a grid search, a calibration plot. Here it classifies the handwritten digits that scikit-learn
# ships, beside the same network alone and the same network in `CalibratedClassifierCV`, which trains it five times.
#
# Run it with `python examples/scikit_learn.py`: it prints a table and writes it with a picture to `examples/output`.

# %%
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.calibration import CalibratedClassifierCV, CalibrationDisplay
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

from laplace.integrations.sklearn import LaplaceClassifier

torch.set_num_threads(1)

parser = argparse.ArgumentParser(description="A network with calibrated probabilities in a scikit-learn pipeline.")
parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the results")
OUTPUT = parser.parse_args().output

# %% [markdown]
# ## Data and network
#
# 800 digits to learn from and 997 to test on. skorch trains the network; its parameters stay open to searches.

# %%
X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X.astype(np.float32), y, train_size=800, random_state=0, stratify=y)


def network() -> NeuralNetClassifier:
    """Two hidden layers, trained for 60 epochs."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    options: dict[str, Any] = {"criterion": nn.CrossEntropyLoss, "train_split": None, "verbose": 0}
    return NeuralNetClassifier(layers, optimizer=torch.optim.Adam, lr=1e-2, max_epochs=60, batch_size=64, **options)


# %% [markdown]
# ## Three classifiers
#
# `LaplaceClassifier` holds a fifth of its rows out to choose the confidence on.

# %%
classifiers: dict[str, Pipeline] = {
    "the network": make_pipeline(StandardScaler(), network()),
    "CalibratedClassifierCV, 5 networks": make_pipeline(StandardScaler(), CalibratedClassifierCV(network(), cv=5)),
    "LaplaceClassifier": make_pipeline(StandardScaler(), LaplaceClassifier(network(), random_state=0)),
}
lines = ["| classifier | accuracy | NLL | mean confidence |", "|---|---|---|---|"]
for name, classifier in classifiers.items():
    probabilities = classifier.fit(X_train, y_train).predict_proba(X_test)
    accuracy, nll = accuracy_score(y_test, probabilities.argmax(1)), log_loss(y_test, probabilities)
    lines.append(f"| {name} | {accuracy:.3f} | {nll:.3f} | {probabilities.max(1).mean():.3f} |")
table = "\n".join(lines)
print(table)

# %% [markdown]
# ## A search
#
# Options of the posterior and of training are parameters like any others: `module__…` are those of skorch.

# %%
grid = {"laplaceclassifier__hessian_structure": ["diag", "kron"], "laplaceclassifier__module__lr": [1e-3, 1e-2]}
search = GridSearchCV(classifiers["LaplaceClassifier"], grid, cv=3, scoring="neg_log_loss").fit(X_train, y_train)
print(f"\nBest of the search: {search.best_params_}")

# %% [markdown]
# ## A picture
#
# scikit-learn's calibration plot of the most probable label: on the diagonal, what is said is what happens. Each point
# stands for a sixth of the digits.

# %%
figure = Figure(figsize=(6, 5), layout="constrained")
axes = figure.subplots()
for name, classifier in classifiers.items():
    probabilities = classifier.predict_proba(X_test)
    right, confidence = probabilities.argmax(1) == y_test, probabilities.max(1)
    CalibrationDisplay.from_predictions(right, confidence, n_bins=6, strategy="quantile", name=name, ax=axes)
axes.set(xlabel="confidence", ylabel="share of right labels", xlim=(0.4, 1.02), ylim=(0.4, 1.02))
OUTPUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUTPUT / "scikit_learn.png", dpi=120)
(OUTPUT / "scikit_learn.md").write_text(table + "\n", encoding="utf-8")

# %% [markdown]
# The posterior is there as well: `classifier[-1].laplace_` samples, saves and says what is foreign.

# %%
print(f"\n{classifiers['LaplaceClassifier'].named_steps['laplaceclassifier'].laplace_}")
