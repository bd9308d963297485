"""Fitted approximations of the cases, and what they must be, as dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laplace import Laplace
from laplace.structures import STRUCTURES as TYPES
from laplace.structures import LowRankCurvature, Truncation
from tests import reference
from tests.cases import ADDITIVE, BASIC, EVERYTHING, STRUCTURES, Case

every_structure = pytest.mark.parametrize("structure", STRUCTURES)
additive_structures = pytest.mark.parametrize("structure", ADDITIVE)
basic_cases = pytest.mark.parametrize("case", BASIC, ids=str)


def structure_type(structure: str) -> type:
    """The class of a structure, with all that it can hold."""
    chosen = EVERYTHING.get(structure)
    return TYPES[structure] if chosen is None else LowRankCurvature.choosing(Truncation(**chosen))


PREDICTIONS = {
    "classification": ({}, {"link_approx": "mc"}, {"link_approx": "bridge"}, {"link_approx": "bridge_norm"}, {"link_approx": "mc", "joint": True}, {"pred_type": "nn"}),
    "regression": ({}, {"diagonal_output": True}, {"joint": True}, {"pred_type": "nn"}),
    "reward_modeling": ({}, {"diagonal_output": True}, {"joint": True}, {"pred_type": "nn"}, {"fitting": True}, {"fitting": True, "link_approx": "mc"}, {"fitting": True, "pred_type": "nn"}),
}  # fmt: skip
"""Every kind of prediction."""


def estimator(case: Case, structure: str, model: nn.Module | None = None, **options: Any) -> Any:
    """A last-layer approximation of a case, not fitted."""
    model = case.model() if model is None else model
    return Laplace(
        model,
        case.likelihood,
        hessian_structure=structure,
        **{**case.laplace_options(), **EVERYTHING.get(structure, {}), **options},
    )


def fitted(case: Case, structure: str, model: nn.Module | None = None, **options: Any) -> Any:
    """The same, fitted to the data of the case in three batches."""
    la = estimator(case, structure, model, **options)
    la.fit(case.batches(1, 3))
    return la


def everything(la: Any, case: Case) -> list[Tensor]:
    """All that a user can see of a fit, with fixed seeds: to be compared bit for bit."""
    found = [la.log_marginal_likelihood().detach(), la.sample(2, generator=torch.Generator().manual_seed(0))]
    for options in PREDICTIONS[case.likelihood]:
        noise = torch.Generator().manual_seed(0)
        result = la(case.test_inputs(), n_samples=5, generator=noise, **options)
        found += [result] if isinstance(result, Tensor) else result
    return found


def dense(matrix: Any) -> Tensor:
    """Whatever a structure calls H or the posterior precision, as a matrix."""
    if isinstance(matrix, tuple):  # of low rank: (U, eigenvalues), or that and the diagonal of the prior
        (U, values), delta = matrix if isinstance(matrix[0], tuple) else (matrix, None)
        return (U * values) @ U.T + (0 if delta is None else delta.diag())
    if isinstance(matrix, list):
        return torch.block_diag(*matrix)
    if hasattr(matrix, "to_matrix"):
        return matrix.to_matrix()
    return matrix.diag() if matrix.dim() == 1 else matrix


def group_sizes(case: Case) -> list[int]:
    model = case.model()
    return [model.get_parameter(name).numel() for name in case.names]


def prior_diagonal(case: Case, delta: float | Tensor) -> Tensor:
    """One precision per weight from a scalar, one per parameter group, or one per weight."""
    sizes, delta = group_sizes(case), torch.as_tensor(delta, dtype=torch.float64).reshape(-1)
    if len(delta) == len(sizes) > 1:
        return torch.cat([value.expand(size) for value, size in zip(delta, sizes, strict=True)])
    return delta.expand(sum(sizes))


def posterior(
    case: Case,
    structure: str,
    *,
    delta: float | Tensor = 1.0,
    sigma: float | None = None,
    temperature: float = 1.0,
    fisher: bool = False,
    damping: bool = False,
) -> Tensor:
    """The posterior precision, [P, P], by brute force."""
    problem, diagonal = case.problem(), prior_diagonal(case, delta)
    scale = (case.sigma if sigma is None else sigma) ** (-4 if fisher else -2) / temperature
    if damping:
        sizes = group_sizes(case)
        deltas = torch.stack([part[0] for part in diagonal.split(sizes)])
        return problem.damped_kron_precision(scale, deltas, fisher=fisher)
    return scale * problem.curvature(structure, fisher=fisher) + diagonal.diag()


def evidence(
    case: Case,
    precision: Tensor,
    *,
    delta: float | Tensor = 1.0,
    sigma: float | None = None,
    temperature: float = 1.0,
    mean: float = 0.0,
) -> Tensor:
    """The log marginal likelihood for a posterior precision, by brute force."""
    problem = case.problem()
    sigma = case.sigma if sigma is None else sigma
    n_values = problem.n_positions() * case.n_outputs
    noise = sigma if case.likelihood == "regression" else None
    P0, shift = prior_diagonal(case, delta).diag(), problem.theta() - mean
    return reference.log_evidence(problem.nll(), 1 / (sigma**2 * temperature), noise, n_values, precision, P0, shift)


def outputs_and_covariance(case: Case, precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At the test inputs: f [B, *positions, C], J [rows, C, P] and covariances [rows, C, C] by brute force."""
    model, x = case.model(), case.test_inputs()
    with torch.no_grad():
        f = case.forward(model, x)
    if f.shape[-1] != case.n_outputs or f.dim() == 1:
        f = f.unsqueeze(-1)
    J = case.problem(model).jacobian(x).flatten(0, 1)
    return f, J, reference.output_covariance(J, precision)
