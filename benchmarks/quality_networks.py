"""Networks of ``quality.py`` and their training."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from networks import build
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tuning_data import Split


class Rows(nn.Module):
    """A transformer whose tokens are the rows of a gray image ``[n, 1, height, width]``."""

    def __init__(self, image: list[int], width: int, heads: int, hidden: int, depth: int, n_outputs: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(image[2], width)
        self.positions = nn.Embedding(image[1], width)
        layers = (nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True) for _ in range(depth))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.tokens(x.squeeze(1)) + self.positions(torch.arange(x.shape[2], device=x.device))
        return self.head(self.layers(h).mean(1))


def untrained(architecture: str, shape: list[int], n_outputs: int) -> nn.Module:
    """A network by its name, for inputs of a shape."""
    kind, _, width = architecture.partition(" ")
    if kind == "frozen":
        return nn.Sequential(nn.Linear(shape[0], n_outputs))
    if kind == "MLP":
        size = int(torch.Size(shape).numel())
        return build("fully connected", {"widths": [size, int(width), int(width)]}, n_outputs)
    if kind == "transformer":
        return Rows(shape, 32, 4, 64, 2, n_outputs)
    if kind == "ResNet":
        return build("residual", {"image": shape, "widths": [8, 16], "blocks": 1}, n_outputs)
    return build("convolutional", {"image": shape, "channels": [6, 16], "n_features": 64}, n_outputs)


def with_dropout(model: nn.Module, share: float) -> nn.Module:
    """The network with dropout: where it has layers for that, else after its rectifiers and before its head."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = share
    if isinstance(model, Rows):
        return model
    *inner, head = model.children()
    layers = chain.from_iterable([one, nn.Dropout(share)] if isinstance(one, nn.ReLU) else [one] for one in inner)
    before = [] if inner and isinstance(inner[-1], nn.ReLU) else [nn.Dropout(share)]
    return nn.Sequential(*layers, *before, head)


def train(network: dict[str, Any], config: dict[str, Any], data: Split, seed: int, dropout: float = 0.0) -> nn.Module:
    """A network, trained by Adam for a fixed number of epochs; weight decay is a penalty of the loss."""
    torch.manual_seed(seed)
    x, y = data.train.dataset.tensors
    model = untrained(network["architecture"], list(x.shape[1:]), data.n_outputs)
    if dropout:
        model = with_dropout(model, dropout)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], weight_decay=network["weight decay"])
    for _ in range(config["epochs"]):
        for rows in torch.randperm(len(y)).split(config["batch"]):
            if len(rows) == 1:  # batch normalization has no variance of one row
                continue
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()
