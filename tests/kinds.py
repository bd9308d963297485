"""One small regression for every kind of posterior over weights, fitted or not, and all that can be seen of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laplace import Laplace
from tests.contracts import generator
from tests.estimators import dense

KINDS = [
    *[("all", structure) for structure in ("full", "diag", "kron", "blockdiag", "ekfac", "lowrank")],
    *[("last_layer", structure) for structure in ("full", "diag", "kron", "blockdiag", "ekfac", "lowrank")],
    *[("subnetwork", structure) for structure in ("full", "diag")],
]
every_kind = pytest.mark.parametrize(("subset", "structure"), KINDS)
weights_kinds = pytest.mark.parametrize(("subset", "structure"), [kind for kind in KINDS if kind[0] != "subnetwork"])
CHOSEN = torch.tensor([7, 0, 3, 12])
DOUBLE = {"dtype": torch.float64}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(likelihood: str = "regression") -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, **DOUBLE, generator=noise)
    return x, torch.randn(20, 2, **DOUBLE, generator=noise) if likelihood == "regression" else (x[:, 0] > 0).long()


def make(subset: str, structure: str, model: nn.Module | None = None, **options: Any) -> Any:
    options = {"likelihood": "regression", "prior_precision": 0.7, **options}
    if subset == "last_layer":
        options.setdefault("last_layer_name", "2")
    if subset == "subnetwork":
        options["subnetwork_indices"] = CHOSEN
    if structure == "lowrank":
        options["rank"] = 3
    return Laplace(
        network() if model is None else model, subset_of_weights=subset, hessian_structure=structure, **options
    )


def fitted(subset: str, structure: str, **options: Any) -> Any:
    la = make(subset, structure, **options)
    la.fit([data(la.likelihood.value)])
    return la


def random_weights(la: Any) -> list[Tensor]:
    return list(la.model.last_layer.parameters() if hasattr(la.model, "last_layer") else la.model.parameters())


def tensors_in(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """All tensors that somebody can reach from a value, but for those of the network."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (nn.Module, type)):
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item, seen)]
    return tensors_in(vars(value), seen) if hasattr(value, "__dict__") else []


def observed(la: Any) -> list[Tensor]:
    x = data()[0][:4]
    f, var = la(x)
    draws = la.sample(2, generator=generator(3))
    return [f, var, draws, dense(la.H), dense(la.posterior_precision), la.log_marginal_likelihood(), la.mean]
