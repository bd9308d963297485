# %% [markdown]
# # All structures on one problem
#
# How should the curvature be stored, and of which weights? Here one small network for scikit-learn's digits is given
# every kind of posterior, and each is measured: what it stores, how long fit and predictions take, how good and how
# well calibrated its probabilities are, and whether digits that it never saw (8 and 9) look uncertain to it. The
# network has 1,176 weights, so that even the dense matrix fits.
#
# Run it with `python examples/structures.py`; it prints a table and writes it to `examples/output/structures.md`.

# %%
from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from laplace import Laplace
from laplace.evaluation import calibration_error, fit_temperature, mean_nll, ood_auroc, uncertainty
from laplace.utils import LargestMagnitudeSubnetMask

parser = argparse.ArgumentParser(description="Compare all structures on scikit-learn's digits.")
parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the table")
torch.set_num_threads(1)  # the network is tiny: a second thread costs more than it brings

# %% [markdown]
# ## Data and network
#
# Eight digits to learn, two that stay unknown. One training label in seven is wrong, and the network sees its 300
# images so often that it learns them all: it becomes overconfident.

# %%
digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
unknown = images[labels >= 8]
x, y = images[labels < 8], labels[labels < 8]
rest, test = train_test_split(range(len(y)), test_size=700, stratify=y, random_state=0)
train, validation = train_test_split(rest, train_size=300, stratify=y[rest], random_state=0)


wrong = torch.tensor(train)[::7]
y[wrong] = (y[wrong] + 1) % 8


def batches(rows: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Some of the images, 100 at a time."""
    return [(x[part], y[part]) for part in torch.tensor(rows).split(100)]


def trained() -> nn.Module:
    """A network that has seen its images too often."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        for rows in torch.tensor(train)[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


# %% [markdown]
# ## Every posterior
#
# `tune` chooses, on the validation images, the prior precision of each, the output temperature and how much predictions
# widen where features are unlike those of the training images. A last layer is fitted again first.

# %%
model = trained()
mask = LargestMagnitudeSubnetMask(model, n_params_subnet=150)
chosen = mask.select()
STRUCTURES = ("full", "blockdiag", "ekfac", "kron", "diag")
POSTERIORS: dict[str, dict[str, Any]] = {
    f"all, {structure}": {"subset_of_weights": "all", "hessian_structure": structure} for structure in STRUCTURES
}
POSTERIORS["all, lowrank (100)"] = {"subset_of_weights": "all", "hessian_structure": "lowrank", "rank": 100}
POSTERIORS["all, gp (100 images)"] = {"subset_of_weights": "all", "hessian_structure": "gp", "n_subset": 100}
POSTERIORS["subnetwork of 150, full"] = {
    "subset_of_weights": "subnetwork",
    "hessian_structure": "full",
    "subnetwork_indices": chosen,
}
POSTERIORS |= {f"last layer, {structure}": {"hessian_structure": structure} for structure in (*STRUCTURES, "lowrank")}


def stored(state: Any, seen: set[int]) -> int:
    """Bytes of the tensors in a state, each once."""
    if isinstance(state, Tensor):
        new = state.data_ptr() not in seen
        seen.add(state.data_ptr())
        return state.numel() * state.element_size() if new else 0
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(stored(item, seen) for item in items)


def quality(predict: Any) -> list[str]:
    """Of predictions for test images: NLL, ECE, and how well unknown digits are told apart."""
    with torch.no_grad():
        known, foreign = predict(x[test]).double(), predict(unknown).double()
    auroc = ood_auroc(uncertainty(known), uncertainty(foreign))
    return [f"{mean_nll(known, y[test]):.3f}", f"{calibration_error(known, y[test]):.3f}", f"{auroc:.3f}"]


rows = [["the network", "", "", "", *quality(lambda inputs: model(inputs).softmax(-1))]]
rows.append(["the network, best temperature", "", "", "", *quality(fit_temperature(model, batches(validation)))])
for name, options in POSTERIORS.items():
    start = time.perf_counter()
    la = Laplace(model, "classification", **options)
    la.fit(batches(train))
    fitted = time.perf_counter() - start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where no uncertainty is best, tune says so
        la.tune(batches(validation))
    la(x[test])  # the first call factorizes
    start = time.perf_counter()
    la(x[test])
    predicted = time.perf_counter() - start
    size = stored(la.state_dict()["H"], set()) / 1000
    rows.append([name, f"{size:,.0f}", f"{1e3 * fitted:.0f}", f"{1e3 * predicted:.1f}", *quality(la)])

# %% [markdown]
# ## The table

# %%
titles = ["posterior", "kB stored", "fit, ms", "predict 700, ms", "NLL", "ECE", "AUROC, unknown digits"]
lines = ["| " + " | ".join(row) + " |" for row in [titles, [":--", *["--:"] * 6], *rows]]
table = "\n".join(lines)
print(table)
folder = parser.parse_args().output
folder.mkdir(parents=True, exist_ok=True)
(folder / "structures.md").write_text(table + "\n", encoding="utf-8")
print(f"Written to {folder / 'structures.md'}")
