"""Splits of ``quality.py``: training, validation and test rows, noisy labels, and inputs that are foreign."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_features import features
from quality_sources import foreign_texts, shuffled_words, source
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset
from tuning_data import Split, photographs

FAR = 200
"""Rows of each kind that are far from all data."""
NEAR = 300
"""Rows of held-out classes, at most."""


class Counted(DataLoader):
    """A loader that knows how often it was read."""

    passes = 0

    def __iter__(self) -> Any:
        """Batches."""
        self.passes += 1
        return super().__iter__()


def held_out(n_classes: int) -> int:
    """How many of the last classes no network sees: two, one of at most seven, none of two or three."""
    return 0 if n_classes <= 3 else 1 if n_classes <= 7 else 2


def noisy(y: np.ndarray, n_classes: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Labels of which a share is another class, drawn uniformly."""
    wrong = rng.random(len(y)) < share
    return np.where(wrong, (y + rng.integers(1, n_classes, len(y))) % n_classes, y)


def far_inputs(x: np.ndarray, config: dict[str, Any], n: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform noise in the range of each column; of images in [0, 1], and as many of one gray, and of photographs."""
    low, high = x.min(0), x.max(0)
    if "image" not in config:
        return rng.uniform(low, high, (n, *x.shape[1:]))
    noise = rng.uniform(0, 1, (n, *x.shape[1:]))
    gray = np.broadcast_to(rng.uniform(0, 1, (n, *[1] * (x.ndim - 1))), noise.shape)
    photos = photographs(config["photo"], tuple(config["image"])).reshape(-1, *x.shape[1:])
    return np.concatenate([noise, gray, photos[rng.permutation(len(photos))[:n]]])


def changed_inputs(x: np.ndarray, config: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Rows with the right margins and wrong relations: images turned by 90°; columns of a table, each shuffled."""
    if "image" in config:
        images = x.reshape(len(x), *config["image"])
        return np.rot90(images, axes=(-2, -1)).reshape(x.shape)
    return np.stack([rng.permutation(column) for column in x.T], 1)


def frozen(x: np.ndarray, config: dict[str, Any], folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of all rows, of all rows changed (of texts: words shuffled), and of inputs that are far from them."""
    if "image" in config:
        x = x.reshape(-1, *config["image"][-2:])
        inputs = {**config, "image": list(x.shape[1:])}
        rng = np.random.default_rng(0)
        each = x, changed_inputs(x, inputs, rng), far_inputs(x, inputs, FAR, rng)
        kind = "image"
    else:
        each, kind = (x, shuffled_words(x), foreign_texts(x, FAR)), "text"
    first, second, third = (features(kind, rows, folder) for rows in each)
    return first, second, third


def split(entry: dict[str, Any], name: str, network: dict[str, Any], batch: int, folder: Path) -> Split:
    """Training, validation, test rows, all with the same share of noise, and foreign inputs; near ones are held out.

    Columns of a table are standardized with the training rows; features of a frozen network are as they are.
    """
    rng, kind = np.random.default_rng(network["seed"]), network["architecture"].partition(" ")[0]
    x, y = source(name, entry)
    if "image" in entry:
        x = x / x.max()
        x = x.reshape(len(x), -1) if kind == "MLP" else x.reshape(len(x), *entry["image"])
    n_classes = len(np.unique(y)) - held_out(len(np.unique(y)))
    inside = np.flatnonzero(y < n_classes)
    seed = network["seed"]
    rest, test = train_test_split(inside, test_size=entry["test"], stratify=y[inside], random_state=seed)
    train, validation = train_test_split(
        rest, train_size=entry["train"], test_size=entry["validation"], stratify=y[rest], random_state=seed
    )
    if kind == "frozen":
        x, changed, far = frozen(x, entry, folder)
        changed = changed[test]
    else:
        if "image" not in entry:
            std = x[train].std(0)
            x = (x - x[train].mean(0)) / np.where(std > 0, std, 1.0)
        changed, far = changed_inputs(x[test], entry, rng), far_inputs(x[train], entry, FAR, rng)
    foreign = {"mid": changed, "far": far}
    if n_classes < len(np.unique(y)):
        foreign["near"] = x[rng.permutation(np.flatnonzero(y >= n_classes))[:NEAR]]
    labels = noisy(y, n_classes, network["noise"], rng)

    def loader(rows: np.ndarray) -> Counted:
        inputs = torch.tensor(x[rows], dtype=torch.float32)
        return Counted(TensorDataset(inputs, torch.tensor(labels[rows], dtype=torch.long)), batch_size=batch)

    inputs = {key: torch.tensor(np.ascontiguousarray(rows), dtype=torch.float32) for key, rows in foreign.items()}
    return Split(loader(train), loader(validation), loader(test), inputs, n_classes, "classification")


def networks(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Set and description of every network; those of one seed come before those of the next."""
    keys = ("architecture", "noise", "training", "weight decay")
    every = [(name, told) for name, entry in config["sets"].items() for told in entry["networks"]]
    for repeat in range(config["seeds"]):
        for index, (name, told) in enumerate(every):
            yield name, {**dict(zip(keys, told, strict=True)), "seed": 100 * index + repeat}
