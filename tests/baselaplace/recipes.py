"""Small trained networks with an overconfident head, and what `tune` chooses, written out in float64 on its own."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laplace import Laplace

D, C = 4, 3


class Net(nn.Module):
    """A head on features."""

    def __init__(self, n_outputs: int, *, bias: bool = True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, D), nn.Tanh())
        self.head = nn.Linear(D, n_outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Data(NamedTuple):
    """A model, and loaders."""

    model: Net
    train: list[tuple[Tensor, Tensor]]
    val: list[tuple[Tensor, Tensor]]
    test: Tensor


def classification(seed: int = 0, *, bias: bool = True, n_val: int = 60) -> Data:
    """Three overlapping classes; the head is three times too large."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(C, bias=bias).double()
        x = torch.randn(90 + n_val, 3, dtype=torch.float64)
        y = (x[:, 0] + torch.randn(len(x)) > 0).long() + (x[:, 1] + 0.5 * torch.randn(len(x)) > 0.5).long()
        with torch.no_grad():
            model.head.weight.mul_(6)
        test = torch.randn(7, 3, dtype=torch.float64)
    return Data(model.eval(), _batches(x[:90], y[:90]), _batches(x[90:], y[90:]), test)


def regression(seed: int = 0, n_outputs: int = 2) -> Data:
    """Two outputs of different noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(n_outputs).double()
        x = torch.randn(150, 3, dtype=torch.float64)
        scale = torch.linspace(0.3, 1.0, n_outputs, dtype=torch.float64)
        y = x[:, :1].sin() + x[:, 1:2] * 0.3 + scale * torch.randn(150, n_outputs, dtype=torch.float64)
        test = torch.randn(7, 3, dtype=torch.float64)
    return Data(model.eval(), _batches(x[:90], y[:90]), _batches(x[90:], y[90:]), test)


def tuned(data: Data, structure: str = "kron", likelihood: str = "classification", **options: Any) -> Any:
    """Fitted and tuned."""
    la = Laplace(data.model, likelihood, hessian_structure=structure)
    la.fit(data.train)
    la.tune(data.val, **options)
    return la


def _batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(40), y.split(40), strict=True))


def joined(loader: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All rows."""
    return torch.cat([x for x, _ in loader]), torch.cat([y for _, y in loader])


def features(data: Data, loader: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Features and targets."""
    x, y = joined(loader)
    return data.model.body(x).detach(), y


def head_vector(model: Net) -> Tensor:
    """The weights of the head, public order."""
    return torch.cat([p.detach().flatten() for p in model.head.parameters()])


def logits(theta: Tensor, phi: Tensor, n_outputs: int = C) -> Tensor:
    """W φ + b."""
    W = theta[: n_outputs * D].view(n_outputs, D)
    b = theta[n_outputs * D :]
    return phi @ W.T + (b if len(b) else 0)


def precisions(phi: Tensor, n_outputs: int, scale: float = 1.0) -> list[float]:
    """Nine, from strong to weak, in units of the mean curvature of a weight where all outputs are equally likely."""
    size = float(phi.square().mean()) * len(phi) / n_outputs * scale
    return [size * 10 ** (1 - 7 * k / 8) for k in range(9)]


def best_head(phi: Tensor, y: Tensor, delta: float, start: Tensor) -> Tensor:
    """argmin Σ cross entropy + δ/2 ‖θ‖², by L-BFGS of PyTorch."""
    theta = torch.zeros_like(start).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(logits(theta, phi), y, reduction="sum") + delta / 2 * theta.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach()


class Choice(NamedTuple):
    """Weights, log T, δ, and all points: share, candidate, log T."""

    theta: Tensor
    log_t: float
    delta: float
    points: list[tuple[float, int, float]]


def choice(data: Data, *, parameters: bool = True) -> Choice:
    """Heads and temperatures weighed by validation data, by a fine grid in log T; without widths for foreign inputs."""
    (phi, y), (phi_val, y_val) = features(data, data.train), features(data, data.val)
    own = head_vector(data.model)
    deltas = precisions(phi, C)
    heads = [own] + [best_head(phi, y, delta, own) for delta in deltas]
    grid = torch.linspace(math.log(0.05), math.log(20), 20001, dtype=torch.float64)
    points = []
    for k, theta in enumerate(heads):
        f = logits(theta, phi_val)
        values = torch.stack(
            [nn.functional.cross_entropy(f / t.exp(), y_val, reduction="sum") + t**2 / 2 for t in grid[::50]]
        )
        near = int(values.argmin()) * 50
        window = grid[max(0, near - 60) : near + 61]
        fine = torch.stack(
            [nn.functional.cross_entropy(f / t.exp(), y_val, reduction="sum") + t**2 / 2 for t in window]
        )
        best = int(fine.argmin())
        h = float(window[1] - window[0]) * 20
        curve = [
            float(nn.functional.cross_entropy(f / math.exp(t), y_val, reduction="sum")) + t**2 / 2
            for t in (float(window[best]) - h, float(window[best]), float(window[best]) + h)
        ]
        spread = h**2 / (curve[0] - 2 * curve[1] + curve[2])
        points.append((curve[1], k, float(window[best]), spread))
    if not parameters:
        points = [(*min(points)[:3], 0.0)]
    w = torch.tensor(
        [-value + 0.5 * math.log(spread) if spread else -value for value, *_, spread in points], dtype=torch.float64
    ).softmax(0)
    log_t = sum(float(a) * t for a, (_, _, t, _) in zip(w, points, strict=True))
    theta = torch.zeros_like(own)
    for a, (_, k, t, spread) in zip(w, points, strict=True):
        theta += float(a) * math.exp(log_t - t + spread / 2) * heads[k]
    refitted = [(float(a), deltas[k - 1]) for a, (_, k, _, _) in zip(w, points, strict=True) if k]
    total = sum(a for a, _ in refitted)
    delta = math.exp(sum(a / total * math.log(d) for a, d in refitted)) if total else math.nan
    return Choice(theta, log_t, delta, [(float(a), k, t) for a, (_, k, t, _) in zip(w, points, strict=True)])
