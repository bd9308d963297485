"""Small fitted estimators of every class, made of numbers that every machine computes alike, and what is seen of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from laplace import Laplace


def numbers(*shape: int, step: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """Eighths between -5/8 and 5/8 without a pattern that matters: exact in every precision, on every machine."""
    n = torch.Size(shape).numel()
    return ((torch.arange(n) * step % 11 - 5).to(dtype) / 8).reshape(shape)


def network(*layers: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Layers with fixed weights."""
    model = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(*parameter.shape, step=3 + 2 * number, dtype=dtype))
    return model.eval()


def perceptron(n_outputs: int = 2, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two inputs, three features."""
    return network(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, n_outputs), dtype=dtype)


def of_tokens() -> nn.Module:
    """An embedding, a norm and a head: groups with one factor, with a diagonal one, and without."""
    return network(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(6, 2))


CLASSES = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
X, X_NEW = numbers(8, 2), numbers(3, 2, step=5)
TOKENS, TOKENS_NEW = torch.arange(16).reshape(8, 2) * 3 % 4, torch.tensor([[0, 3], [2, 1]])
PAIRS, PAIRS_NEW = numbers(8, 2, 2), numbers(3, 2, 2, step=5)
TARGETS = numbers(8, 2, step=4)

Situation = tuple[Callable[[], nn.Module], str, dict[str, Any], Tensor, Tensor, Tensor]
"""Model, likelihood, options of ``Laplace``; inputs, targets, new inputs."""


def classify(subset: str, structure: str, model: Callable[[], nn.Module] = perceptron, **options: Any) -> Situation:
    """Classification."""
    chosen = {"subset_of_weights": subset, "hessian_structure": structure, "prior_precision": 1.5, **options}
    return model, "classification", chosen, X, CLASSES, X_NEW


def regress(subset: str, structure: str, **options: Any) -> Situation:
    """Regression."""
    chosen = {"subset_of_weights": subset, "hessian_structure": structure, "sigma_noise": 0.5, **options}
    return perceptron, "regression", chosen, X, TARGETS, X_NEW


STRUCTURES = ("full", "kron", "diag", "blockdiag", "ekfac", "lowrank")
RANK = {"lowrank": {"rank": 3}}
APPROXIMATIONS: dict[str, dict[str, Any]] = {
    "sod": {"n_subset": 4},
    "nystrom": {"subsample_size": 4, "n_eigenvalues": 3},
    "variational": {"inducing_locations": X_NEW, "inducing_classes": [0, 1, 0]},
}
SUBNETWORK = {"subnetwork_indices": torch.tensor([0, 4, 7, 11, 16])}
LAYERS = torch.tensor([0.5, 2.0])

SITUATIONS: dict[str, Situation] = {
    **{f"{s}_{h}": classify(s, h, **RANK.get(h, {})) for s in ("all", "last_layer") for h in STRUCTURES},
    **{
        f"{s}_{name}": classify(s, "gp", functional_approximation=name, **options)
        for s in ("all", "last_layer")
        for name, options in APPROXIMATIONS.items()
    },
    **{f"subnetwork_{h}": classify("subnetwork", h, **SUBNETWORK) for h in ("full", "diag")},
    "regression_full": regress("all", "full", prior_mean=0.125, temperature=0.75),
    "regression_by_output": regress("last_layer", "diag", sigma_noise=torch.tensor([0.5, 0.25]), prior_precision=LAYERS),
    "regression_shaped_noise": regress("all", "kron", sigma_noise=torch.tensor([0.5, 0.25])),
    "regression_damped": regress("last_layer", "kron", damping=True, enable_backprop=True),
    "regression_process": regress("last_layer", "gp", n_subset=4, independent_outputs=True),
    "regression_ella": regress("all", "gp", functional_approximation="nystrom", subsample_size=4, n_eigenvalues=2),
    "preferences": (
        lambda: perceptron(1), "reward_modeling", {"subset_of_weights": "all", "hessian_structure": "kron"},
        PAIRS, CLASSES, PAIRS_NEW,
    ),
    "tokens_kron": (
        of_tokens, "classification", {"subset_of_weights": "all", "hessian_structure": "kron"},
        TOKENS, CLASSES, TOKENS_NEW,
    ),
    "tokens_ekfac": (
        of_tokens, "classification", {"subset_of_weights": "all", "hessian_structure": "ekfac"},
        TOKENS, CLASSES, TOKENS_NEW,
    ),
    "single_precision": classify("last_layer", "kron", lambda: perceptron(dtype=torch.float32)),
    "double_curvature": classify(
        "all", "full", lambda: perceptron(dtype=torch.float32), curvature_dtype=torch.float64
    ),
}  # fmt: skip


PEER: dict[str, Situation] = {
    f"{kind.__name__}_{s}_{h}": kind(s, h, **(SUBNETWORK if s == "subnetwork" else {}))
    for kind in (classify, regress)
    for s, h in [(s, h) for s in ("all", "last_layer") for h in ("full", "kron", "diag")]
    + [("subnetwork", "full"), ("subnetwork", "diag")]
}
"""Those of which laplace-torch saves states."""


def build(name: str) -> Any:
    """The estimator of a situation, not fitted."""
    model, likelihood, options, *_ = {**SITUATIONS, **PEER}[name]
    return Laplace(model(), likelihood, **options)


def inputs(la: Any, x: Tensor) -> Tensor:
    """Inputs in the precision of the model."""
    dtype = next(la.model.parameters()).dtype
    return x.to(dtype) if x.is_floating_point() else x


def fitted(name: str) -> Any:
    """The same, fitted in two batches."""
    *_, x, y, _ = {**SITUATIONS, **PEER}[name]
    la = build(name)
    x, y = inputs(la, x), inputs(la, y)
    la.fit([(x[:5], y[:5]), (x[5:], y[5:])])
    return la


def seen(la: Any, name: str) -> dict[str, Any]:
    """What is compared of a fit: predictions, evidence where the class has one, loss and counts."""
    x = inputs(la, SITUATIONS[name][-1])
    options = {"fitting": True} if SITUATIONS[name][1] == "reward_modeling" else {}
    result = la(x, **options)
    found = {f"prediction {i}": part for i, part in enumerate([result] if isinstance(result, Tensor) else result)}
    if "VaLLA" not in type(la).__name__:
        found["evidence"] = la.log_marginal_likelihood()
    found |= {"loss": la.loss, "mean": la.mean, "prior_precision": la.prior_precision, "sigma_noise": la.sigma_noise}
    counts = {"class": type(la).__name__, "n_data": la.n_data, "n_outputs": la.n_outputs}
    return {key: value.detach().tolist() for key, value in found.items()} | counts
