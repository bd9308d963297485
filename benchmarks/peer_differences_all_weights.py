"""The numbers of docs/differences.md for all weights (`subset_of_weights="all"`).

Run like peer_differences.py, in the environment of either package:

    python benchmarks/peer_differences_all_weights.py                        # this library
    /path/to/laplace-torch/bin/python benchmarks/peer_differences_all_weights.py   # the peer, installed on its own
"""

from __future__ import annotations

import contextlib

import torch
from peer_differences import CASES, case, class_data, largest, loader, main, net, regression_data
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import laplace.curvature as curvature
from laplace import Laplace

CASES.clear()  # those of the last layer have a script of their own


class Attention(nn.Module):
    """Self-attention over five positions, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [batch, 3]."""
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """A recurrent layer and its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [batch, 3]."""
        return self.head(self.cell(x)[0][:, -1])


class Offset(nn.Module):
    """A linear layer and a parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(4))
        self.net = nn.Sequential(nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [batch, 3]."""
        return self.net(x.mean(1) + self.offset)


class Tied(nn.Module):
    """One linear layer that is applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [batch, 3]."""
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x.mean(1))))))


class SharedWeight(nn.Module):
    """Two linear layers with one weight and two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [batch, 3]."""
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x.mean(1))))))


class Pooled(nn.Module):
    """Layers over positions, then their mean."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [batch, 3]."""
        return self.layers(x).mean(1)


class Channels(nn.Module):
    """A convolution over positions and a linear layer."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [batch, 3]."""
        return self.layers(x)


NETWORKS = {
    "LayerNorm": lambda: Pooled(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
    "BatchNorm1d": lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
    "Embedding": lambda: Pooled(nn.Embedding(10, 4), nn.Linear(4, 3)),
    "MultiheadAttention": Attention,
    "LSTM": Recurrent,
    "Conv1d": lambda: Channels(nn.Conv1d(5, 2, 3, padding=1)),
    "Conv2d": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3)),
    "ConvTranspose1d": lambda: Channels(nn.ConvTranspose1d(5, 2, 3, padding=1)),
    "a parameter of no layer": Offset,
    "a layer used twice": Tied,
    "a weight of two layers": SharedWeight,
}


def problem(name: str, n: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with fixed random weights, inputs [n, 5, 4] (tokens [n, 5] for an embedding) and labels."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, 4, generator=generator)
    if name == "Embedding":
        x = torch.randint(10, (n, 5), generator=generator)
    elif name == "Conv2d":
        x = x.unsqueeze(1)
    model = NETWORKS[name]()
    model(x[:2])  # makes lazy layers
    return model.eval(), x, torch.randint(3, (n,), generator=generator)


def exact_diagonal(model: nn.Module, x: Tensor) -> Tensor:
    """Diagonal of the GGN of a classifier, one datum at a time."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    total = torch.zeros(sum(p.numel() for p in weights.values()))
    for row in x.split(1):
        J = jacrev(lambda w, row=row: functional_call(model, w, (row,))[0])(weights)
        J = torch.cat([part.reshape(3, -1) for part in J.values()], 1)
        p = model(row)[0].softmax(-1)
        total += torch.einsum("cp,ck,kp->p", J, torch.diag(p) - torch.outer(p, p), J)
    return total


def diagonal(la: object) -> Tensor:
    """Diagonal of the curvature of a fitted approximation."""
    precision = la.posterior_precision
    if hasattr(precision, "to_matrix"):
        precision = precision.to_matrix()
    return (precision.diagonal() if precision.ndim == 2 else precision) - 1.0


def fit(name: str, structure: str, n: int = 12, **options: object) -> tuple[object, nn.Module, Tensor]:
    """A fitted approximation of all weights."""
    model, x, y = problem(name, n)
    la = Laplace(model, "classification", "all", structure, **options)
    la.fit(loader(x, y, 4))
    return la, model, x


def kron_and_prediction(name: str) -> str:
    la, _, x = fit(name, "kron")
    return f"probabilities {tuple(la(x).shape)}"


for layer in NETWORKS:
    case(f"kron of all weights, {layer}", layer)(kron_and_prediction)


def shared_expand(name: str, model: nn.Module, x: Tensor) -> float:
    """Trace of G ⊗ A of a weight that is used twice, by the definition of KFAC-expand: sums over data and uses."""
    first, second = (model.shared, model.shared) if name == "a layer used twice" else (model.first, model.second)
    outer, inner = torch.zeros(()), torch.zeros(())
    for row in x.mean(1).split(1):
        a = row.detach()
        h = first(a).detach()
        b = torch.tanh(h)
        g = second(b).detach()
        p = model.head(torch.tanh(g))[0].softmax(-1)
        Lambda = torch.diag(p) - torch.outer(p, p)
        last = jacrev(lambda v: model.head(torch.tanh(v))[0])(g)[:, 0]
        whole = jacrev(lambda v: model.head(torch.tanh(second(torch.tanh(v))))[0])(h)[:, 0]
        outer = outer + sum(torch.einsum("co,ck,ko->", J, Lambda, J) for J in (last, whole))
        inner = inner + a.square().sum() + b.square().sum()
    return (outer * inner / (2 * len(x))).item()


@case("a weight of two layers: trace of its kron block over that of KFAC-expand", "a weight of two layers")
@case("a layer used twice: trace of its kron block over that of KFAC-expand by definition", "a layer used twice")
def shared_trace(name: str) -> float:
    la, model, x = fit(name, "kron")
    return diagonal(la)[:16].sum().item() / shared_expand(name, model, x)


@case("a weight of two layers: trace of diag over that of the exact diagonal", "a weight of two layers")
@case("a layer used twice: trace of diag over that of the exact diagonal", "a layer used twice")
@case("LSTM: trace of diag over that of the exact diagonal", "LSTM")
@case("MultiheadAttention: trace of diag over that of the exact diagonal", "MultiheadAttention")
@case("BatchNorm1d: trace of diag over that of the exact diagonal", "BatchNorm1d")
@case("Conv1d: trace of diag over that of the exact diagonal", "Conv1d")
def diag_trace(name: str) -> float:
    la, model, x = fit(name, "diag")
    return (diagonal(la).sum() / exact_diagonal(model, x).sum()).item()


def kfac_expand(model: nn.Module, x: Tensor) -> float:
    """Trace of G ⊗ A of a convolution's weight by the definition of KFAC-expand: sums over data and positions."""
    convolution, rest = model[0], model[1:]
    patches = nn.functional.unfold(x, 3, padding=1)  # [batch, inputs of a position, positions]
    inner, outer = patches.square().sum() / (len(x) * patches.shape[2]), torch.zeros(())
    for row in x.split(1):
        hidden = convolution(row).detach()
        J = jacrev(lambda h: rest(h)[0])(hidden)[:, 0].flatten(2)  # [3, channels, positions]
        p = rest(hidden)[0].softmax(-1)
        outer = outer + torch.einsum("cot,ck,kot->", J, torch.diag(p) - torch.outer(p, p), J)
    return (outer * inner).item()


@case("Conv2d, kron, its default back end: trace of the weight's block over that of KFAC-expand", "default")
@case("Conv2d, kron, BackPACK: the same", "BackPackGGN")
@case("Conv2d, kron, ASDL: the same", "AsdlGGN")
def conv_trace(backend: str) -> str:
    options = {} if backend == "default" else {"backend": getattr(curvature, backend)}
    model, x, _ = problem("Conv2d")
    expected, exact = kfac_expand(model, x), exact_diagonal(model, x)[:18].sum().item()
    la, _, _ = fit("Conv2d", "kron", **options)
    trace = diagonal(la)[:18].sum().item()
    return f"{trace / expected:.4g}; over that of the exact block {trace / exact:.4g}"


@case("all weights, sequences [B, 5, 3], diag", "diag")
@case("all weights, sequences [B, 5, 3], kron", "kron")
@case("all weights, sequences [B, 5, 3], full", "full")
def sequences(structure: str) -> str:
    x = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(1))
    la = Laplace(net(3), "classification", "all", structure)
    la.fit(loader(x, torch.zeros(12, 5, dtype=torch.long)))
    return f"shape {tuple(la(x[:2]).shape)}"


@case("all weights: gradients that were on the weights before fit are there afterwards")
def gradients_kept() -> bool:
    model, (x, y) = net(3), class_data()
    nn.functional.cross_entropy(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    Laplace(model, "classification", "all", "kron").fit(loader(x, y))
    return all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@case("all weights, pred_type='nn': largest change of the user's weights if a forward pass fails halfway")
def nn_interrupted() -> float:
    model, (x, y) = net(3), class_data()
    la = Laplace(model, "classification", "all", "diag")
    la.fit(loader(x, y))
    before = [p.detach().clone() for p in model.parameters()]
    with contextlib.suppress(RuntimeError):
        la(torch.randn(2, 7), pred_type="nn", link_approx="mc", n_samples=2)
    return max(largest(p, b) for p, b in zip(model.parameters(), before, strict=True))


@case("all weights, empirical Fisher, regression, diag, sigma 1: the same", "diag")
@case(
    "all weights, empirical Fisher, regression, full, sigma 1: trace over that of the outer products of gradients",
    "full",
)
def fisher_ratio(structure: str) -> float:
    model, (x, y) = net(2), regression_data()
    backend = getattr(curvature, "AutogradEF", None) or curvature.CurvlinopsEF
    la = Laplace(model, "regression", "all", structure, backend=backend)
    la.fit(loader(x, y))
    exact = 0.0
    for xi, yi in zip(x, y, strict=True):
        nll = -torch.distributions.Normal(model(xi), 1.0).log_prob(yi).sum()
        exact += sum(g.square().sum().item() for g in torch.autograd.grad(nll, list(model.parameters())))
    return diagonal(la).sum().item() / exact


if __name__ == "__main__":
    main()
