"""The Kronecker eigenbasis with eigenvalues of its own."""

import pytest
import torch

from laplace.errors import UnsupportedError
from laplace.structures.ekfac import EKFACCurvature, EKFACPrecision
from tests.contracts import check_precision, check_scaling
from tests.structures.samples import PER_LAYER, PER_WEIGHT, SCALAR, SIZES, C, D, prior, uniform


def basis(size: int, seed: int) -> torch.Tensor:
    matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(matrix).Q


def sample(seed: int, *, bias: bool = True) -> tuple[EKFACCurvature, torch.Tensor]:
    U, V, s = basis(C, seed), basis(D, seed + 1), uniform(C * D, seed).view(C, D)
    s[0, 0] = 0.0  # a direction the data say nothing about
    vectors, diagonals = [[U, V], [U]], [s, uniform(C, seed + 2)]
    Q = torch.kron(U, V)
    blocks = [Q @ s.flatten().diag() @ Q.T, U @ diagonals[1].diag() @ U.T]
    return EKFACCurvature(vectors[: 1 + bias], diagonals[: 1 + bias]), torch.block_diag(*blocks[: 1 + bias])


@pytest.mark.parametrize("precision", [SCALAR, PER_LAYER], ids=["scalar", "per layer"])
def test_ekfac_satisfies_the_contract(precision):
    curvature, dense = sample(1)
    check_scaling(curvature, dense, prior(precision))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_ekfac_knows_the_closed_forms_of_a_linear_layer(bias):
    curvature, dense = sample(2, bias=bias)
    P0 = prior(SCALAR, SIZES[: 1 + bias])
    check_precision(curvature.posterior(P0), dense + P0.diagonal().diag(), n_outputs=C, bias=bias)


def test_the_identity_may_be_left_out():
    s = uniform(C * D).view(C, D)
    precision = EKFACPrecision([[None, None], [None]], [s, uniform(C, 1)])
    check_precision(precision, torch.cat([s.flatten(), uniform(C, 1)]).diag(), n_outputs=C)


def test_what_cannot_be_merged_or_fitted_together_is_refused():
    first, second = sample(1)[0], sample(2)[0]
    with pytest.raises(UnsupportedError, match=r"override=False.*eigenbases.*\"kron\""):
        first.merge(second)
    with pytest.raises(UnsupportedError, match="Kronecker"):
        first.posterior(prior(PER_WEIGHT))
    with pytest.raises(UnsupportedError, match=r"mixes them. Pass one sigma_noise"):
        first.scale_weights(uniform(C * D + C))
