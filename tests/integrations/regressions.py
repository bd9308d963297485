"""Networks and their posteriors for tests of ``LaplaceModel``, and their dense precision by autograd."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models.transforms import Standardize
from torch import Tensor, nn

from laplace import Laplace

SIGMA, DELTA, HIDDEN = 0.3, 2.0, 5
X = torch.rand(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCHES = torch.rand(4, 2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
UNIT = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64)


def targets(x: Tensor, n_outputs: int = 1) -> Tensor:
    return torch.stack([(3 * x[..., 0]).sin() + x[..., 1], x[..., 1] * x[..., 2]], -1)[..., :n_outputs]


def network(n_outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, n_outputs))


def fitted(n_outputs: int = 1, subset: str = "last_layer", structure: str = "full", **options: Any) -> Any:
    told: dict[str, Any] = {"sigma_noise": SIGMA, "prior_precision": DELTA, **options}
    la = Laplace(network(n_outputs), "regression", subset, structure, **told)
    return la.fit([(X, targets(X, n_outputs))])


def jacobians(model: nn.Sequential, x: Tensor, *, last_layer: bool) -> Tensor:
    """Derivatives of all outputs at all rows in the random weights, ``[n·C, P]``, by autograd."""
    names = [name for name, _ in model.named_parameters() if name.startswith("2.") or not last_layer]

    def outputs(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,)).flatten()

    weights = tuple(model.get_parameter(name).detach() for name in names)
    found: Any = torch.autograd.functional.jacobian(outputs, weights)
    return torch.cat([part.flatten(1) for part in found], 1)


def precision(la: Any, *, last_layer: bool, x: Tensor = X) -> Tensor:
    J = jacobians(la.model.model if last_layer else la.model, x, last_layer=last_layer)
    return J.T @ J / SIGMA**2 + DELTA * torch.eye(J.shape[1])


def scaled(y: Tensor) -> Standardize:
    transform = Standardize(m=y.shape[-1])
    transform(y)
    return transform
