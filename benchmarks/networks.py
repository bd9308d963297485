"""The networks of the cost benchmarks: plain ``torch.nn``, so that every library sees the same modules."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def convolutional(image: list[int], channels: list[int], n_features: int, n_outputs: int) -> nn.Sequential:
    """A convolutional backbone and a linear head."""
    layers: list[nn.Module] = []
    width, size = image[0], image[1]
    for wider in channels:
        layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        width, size = wider, size // 2
    layers += [nn.Flatten(), nn.Linear(width * size * size, n_features), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(n_features, n_outputs)).eval()


def fully_connected(widths: list[int], n_outputs: int) -> nn.Sequential:
    """Linear layers with rectifiers between them."""
    layers: list[nn.Module] = []
    for width, wider in pairwise(widths):
        layers += [nn.Linear(width, wider), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], n_outputs))


class Transformer(nn.Module):
    """Tokens and learned positions, encoder layers, the mean over positions, a linear head."""

    def __init__(
        self, vocabulary: int, length: int, width: int, heads: int, hidden: int, depth: int, n_outputs: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of token sequences."""
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


class HandWritten(nn.Module):
    """The same with attention as functions of tensors, normalized before each part."""

    def __init__(
        self, vocabulary: int, length: int, width: int, heads: int, hidden: int, depth: int, n_outputs: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.head = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of token sequences."""
        h = self.tokens(x) + self.positions
        for k, (qkv, out, up, down) in enumerate(zip(self.qkv, self.out, self.up, self.down, strict=True)):
            parts = qkv(self.norms[2 * k](h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            q, key, v = parts
            attended = torch.softmax(q @ key.mT / q.shape[-1] ** 0.5, -1) @ v
            h = h + out(attended.transpose(1, 2).flatten(2))
            h = h + down(torch.nn.functional.gelu(up(self.norms[2 * k + 1](h))))
        return self.head(h.mean(1))


class Recurrent(nn.Module):
    """Tokens, an LSTM, a linear head on its last state."""

    def __init__(self, vocabulary: int, width: int, hidden: int, n_outputs: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of token sequences."""
        return self.head(self.lstm(self.tokens(x))[0][:, -1])


class SmallGPT2(nn.Module):
    """GPT-2 of the transformers package by its configuration, and a linear head on the mean of its states."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int, n_outputs: int) -> None:
        from transformers import GPT2Config, GPT2Model

        super().__init__()
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=length,
            n_embd=width,
            n_layer=depth,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        self.backbone = GPT2Model(config)
        self.head = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of token sequences."""
        return self.head(self.backbone(x, use_cache=False).last_hidden_state.mean(1))


class Block(nn.Module):
    """Two normalized convolutions beside a shortcut."""

    def __init__(self, width: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, wider, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wider)
        self.shortcut = nn.Sequential()
        if stride != 1 or width != wider:
            self.shortcut = nn.Sequential(nn.Conv2d(width, wider, 1, stride, bias=False), nn.BatchNorm2d(wider))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps."""
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


def residual(image: list[int], widths: list[int], blocks: int, n_outputs: int) -> nn.Sequential:
    """A ResNet for small images: with widths of 64 to 512 and two blocks each, ResNet-18."""
    width = widths[0]
    layers = [nn.Conv2d(image[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage, wider in enumerate(widths):
        for block in range(blocks):
            layers.append(Block(width, wider, 2 if stage and not block else 1))
            width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_outputs)).eval()


def build(kind: str, options: dict[str, Any], n_outputs: int) -> nn.Module:
    """One of the networks by its name."""
    builders = {
        "convolutional": convolutional,
        "fully connected": fully_connected,
        "transformer": Transformer,
        "hand-written": HandWritten,
        "recurrent": Recurrent,
        "GPT-2": SmallGPT2,
        "residual": residual,
    }
    return builders[kind](**options, n_outputs=n_outputs).eval()
