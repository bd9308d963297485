"""Small networks of every kind of layer: models x data x likelihood, float64, for what concerns all weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests import reference
from tests.cases import Net, labels, normal, soft_labels


class Applied(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: Any):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def tokens(size: int, length: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(size, (n, length))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def images(*layers: nn.Module, features: int, n_outputs: int = 3) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(features, n_outputs))


def attention(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.MultiheadAttention(4, 2, **options)
        if options.get("batch_first"):
            return Applied(lambda m, x: m.head(m.attend(x, x, x)[0].mean(1)), attend=layer, head=nn.Linear(4, 3))
        return Applied(
            lambda m, x: m.head(m.attend(*[x.transpose(0, 1)] * 3, need_weights=False)[0].mean(0)),
            attend=layer,
            head=nn.Linear(4, 3),
        )

    return build


def cross_attention() -> nn.Module:
    """Queries, keys and values of different widths and lengths; the queries are parameters shared by all data."""
    layer = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)
    return Applied(
        lambda m, x: m.head(m.attend(m.query.expand(len(x), -1, -1), x, x)[0].flatten(1)),
        attend=layer,
        query=parameter(1, 2, 4),
        head=nn.Linear(8, 3),
    )


def packed_cross_attention() -> nn.Module:
    """One packed weight whose rows are used apart."""
    return Applied(
        lambda m, x: m.head(m.attend(x[:, :2], x, x.flip(1))[0].mean(1)),
        attend=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )


def encoder(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True, norm_first=norm_first)
    return Applied(
        lambda m, x: m.head(m.layer(m.embed(x) + m.position(torch.arange(x.shape[1])))[:, 0]),
        embed=nn.Embedding(7, 4),
        position=nn.Embedding(6, 4),
        layer=layer,
        head=nn.Linear(4, 3),
    )


def vision() -> nn.Module:
    """Patches, a class token, positions cut to length, a scale: bare parameters in the ways of vision transformers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        patches = m.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([m.token.expand(len(x), -1, -1), patches], 1) + m.position[:, : patches.shape[1] + 1]
        return m.head(m.norm(h + m.scale * torch.tanh(h @ m.mix))[:, 0])

    return Applied(
        forward, patch=nn.Conv2d(1, 4, 2, stride=2), token=parameter(1, 1, 4), position=parameter(1, 7, 4),
        scale=parameter(4), mix=parameter(4, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 3),
    )  # fmt: skip


def recurrent(cls: type[nn.Module], width: int = 4, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Applied(
        lambda m, x: m.head(m.recurrent(x)[0][:, -1]),
        recurrent=cls(3, 4, batch_first=True, **options),
        head=nn.Linear(width, 3),
    )


def tied_layers() -> nn.Module:
    """One weight in two layers."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def tied_embedding() -> nn.Module:
    """A table that is also the head."""
    model = Applied(
        lambda m, x: m.head(torch.tanh(m.embed(x)).mean(1)), embed=nn.Embedding(4, 3), head=nn.Linear(3, 4, bias=False)
    )
    model.head.weight = model.embed.weight
    return model


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(not any(name.startswith(prefix) for prefix in names))
    return model


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    h += m.shift
    F.relu_(h)
    return m.head(F.leaky_relu(m.second(h), inplace=True).sum(1))


def residual(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.first(x))
    return m.head(h + torch.relu(m.second(h)))


@dataclass(frozen=True)
class Network:
    """One situation."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    targets: Callable[[int], Tensor]
    n_outputs: int = 3
    likelihood: str = "classification"
    n_rows: int = 5
    kron: bool = True
    """Whether a Kronecker structure can represent all of its weights."""
    slow: tuple[str, ...] = ()
    """Parameters that are differentiated row by row."""

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.name))
            model = self.build().double()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "norm" in name or p.dim() == 1:  # what starts at 0 or 1
                        p.add_(0.3 * torch.randn(p.shape).double())
                for buffer in model.buffers():
                    if buffer.is_floating_point():
                        buffer.copy_(torch.rand(buffer.shape).double() + 0.5)
        return model.eval()

    def data(self, shift: int = 1, n_rows: int | None = None) -> tuple[Any, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 * shift + len(self.name))
            return self.inputs(n_rows or self.n_rows), self.targets(n_rows or self.n_rows)

    def problem(self, model: nn.Module | None = None) -> reference.Problem:
        model = self.model() if model is None else model
        names = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        x, y = self.data()
        return reference.Problem(model, lambda m, x: m(x), names, x, y, self.likelihood, self.n_outputs)


C3 = labels(3)
NETWORKS = (
    Network("mlp", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), normal(3), C3),
    Network("mlp_regression", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(3), normal(2), 2, "regression"),
    Network("squeezed", lambda: Applied(lambda m, x: m.net(x).squeeze(1), net=Net(3, 4, 1)), normal(3), normal(), 1, "regression"),
    Network("soft_labels", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), normal(3), soft_labels(3)),
    Network("no_bias", lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)), normal(3), C3),
    Network("positions", lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), normal(4, 2), labels(3, 4, masked=True), n_rows=4),
    Network("batch_is_as_long_as_positions", lambda: Applied(lambda m, x: m.head(torch.tanh(m.first(x.transpose(0, 1))).sum(0)), first=nn.Linear(2, 3), head=nn.Linear(3, 3)), normal(5, 2), C3),
    Network("flattened_positions", lambda: Applied(lambda m, x: m.head(torch.tanh(m.first(x.transpose(0, 1).reshape(-1, 2))).view(4, -1, 3).sum(0)), first=nn.Linear(2, 3), head=nn.Linear(3, 3)), normal(4, 2), C3),
    Network("permuted_rows", lambda: Applied(lambda m, x: m.head(torch.tanh(m.first(x[x[:, 0].argsort()]))[x[:, 0].argsort().argsort()]), first=nn.Linear(3, 4), head=nn.Linear(4, 3)), normal(3), C3),
    Network("masked_rows", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), normal(3), labels(3, masked=True), n_rows=6),
    Network("flattened_head", lambda: Applied(lambda m, x: m.head(torch.tanh(m.first(x))).sum(1), first=nn.Linear(2, 4), head=nn.Linear(4, 3)), normal(3, 2), C3),
    Network("positions_then_flat", lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), normal(4, 2), C3),
    Network("residual", lambda: Applied(residual, first=nn.Linear(3, 4), second=nn.Linear(4, 4), head=nn.Linear(4, 3)), normal(3), C3),
    Network("functional", lambda: Applied(lambda m, x: m.head(F.relu(m.first(x)) + torch.tanh(m.second(x))), first=nn.Linear(3, 4), second=nn.Linear(3, 4), head=nn.Linear(4, 3)), normal(3), C3),
    Network("conv2d", lambda: images(nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), features=54), normal(2, 6, 4), C3),
    Network("conv2d_same_in_place", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding="same", bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)), normal(1, 4, 4), C3),
    Network("conv2d_groups_reflect", lambda: images(nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"), features=54), normal(4, 3, 3), C3),
    Network("two_convolutions", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Conv2d(2, 3, 2, stride=(1, 2), bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)), normal(1, 8, 8), C3),
    Network("few_positions", lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.Flatten(), nn.Linear(54, 3)), normal(3, 8, 8), C3),
    Network("conv1d_depthwise", lambda: images(nn.Conv1d(3, 6, 3, groups=3), features=18), normal(3, 5), C3),
    Network("conv3d", lambda: images(nn.Conv3d(1, 2, 2), features=16), normal(1, 3, 3, 3), C3),
    Network("conv_transpose2d", lambda: images(nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=1), features=64), normal(2, 2, 2), C3),
    Network("conv_transpose1d", lambda: images(nn.ConvTranspose1d(2, 3, 2, stride=3, output_padding=2), features=30), normal(2, 3), C3),
    Network("batch_norm", lambda: images(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), features=12), normal(1, 3, 3), C3),
    Network("batch_norm_1d", lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), normal(3), C3),
    Network("group_norm", lambda: images(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), features=16), normal(1, 3, 3), C3),
    Network("layer_norm", lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)), normal(3), C3),
    Network("layer_norm_positions", lambda: Applied(lambda m, x: m.head(m.norm(x).flatten(1)), norm=nn.LayerNorm([2, 3]), head=nn.Linear(12, 3)), normal(2, 2, 3), C3),
    Network("rms_norm", lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 3)), normal(3), C3),
    Network("prelu", lambda: images(nn.Conv2d(1, 3, 2), nn.PReLU(3), features=12), normal(1, 3, 3), C3),
    Network("embedding", lambda: Applied(lambda m, x: m.head(torch.tanh(m.embed(x)).sum(1)), embed=nn.Embedding(5, 3, padding_idx=1), head=nn.Linear(3, 3)), tokens(5, 4), C3),
    Network("attention", attention(), normal(3, 4), C3),
    Network("attention_batch_first", attention(batch_first=True, bias=False), normal(3, 4), C3),
    Network("attention_as_long_as_batch", attention(batch_first=True), normal(5, 4), C3),
    Network("attention_with_extra_key", attention(batch_first=True, add_bias_kv=True), normal(3, 4), C3, slow=("attend.bias_k", "attend.bias_v")),
    Network("cross_attention", cross_attention, normal(3, 3), C3),
    Network("packed_cross_attention", packed_cross_attention, normal(3, 4), C3),
    Network("encoder", encoder, tokens(7, 4), C3),
    Network("encoder_norm_first", lambda: encoder(norm_first=True), tokens(7, 4), C3),
    Network("vision", vision, normal(1, 4, 4), C3, slow=()),
    Network("lstm", recurrent(nn.LSTM), normal(4, 3), C3),
    Network("gru_two_layers", recurrent(nn.GRU, num_layers=2), normal(4, 3), C3),
    Network("lstm_projected", recurrent(nn.LSTM, width=2, proj_size=2), normal(3, 3), C3, slow=tuple(f"recurrent.{k}_l0" for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"))),
    Network("tied_layers", tied_layers, normal(4), C3),
    Network("tied_embedding", tied_embedding, tokens(4, 3), labels(4), 4, kron=False),
    Network("weight_norm", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)), normal(3), C3),
    Network("in_place", lambda: Applied(in_place, first=nn.Linear(2, 3), shift=parameter(3), second=nn.Linear(3, 4), head=nn.Linear(4, 3)), normal(3, 2), C3),
    Network("bare_parameters", lambda: Applied(lambda m, x: torch.tanh(x @ m.first + m.shift) @ m.second.T * m.scale - m.offset, first=parameter(3, 4), shift=parameter(4), second=parameter(3, 4), scale=parameter(1), offset=parameter(3)), normal(3), C3),
    Network("einsum", lambda: Applied(lambda m, x: m.head(torch.tanh(torch.einsum("bi,ij->bj", x, m.weight))), weight=parameter(3, 4), head=nn.Linear(4, 3)), normal(3), C3, slow=("weight",)),
    Network("transposed_weight", lambda: Applied(lambda m, x: F.linear(torch.tanh(F.linear(x, m.first.T)), m.second[1:4], m.second[4:].sum(1)), first=parameter(3, 4), second=parameter(7, 4)), normal(3), C3, kron=False),
    Network("frozen_backbone", lambda: frozen(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), "0", "2.bias"), normal(3), C3),
    Network("unused", lambda: Applied(lambda m, x: m.net(x), net=Net(3, 4, 3), other=nn.Linear(2, 2)), normal(3), C3, kron=False),
)  # fmt: skip


def named(name: str) -> Network:
    return next(network for network in NETWORKS if network.name == name)
