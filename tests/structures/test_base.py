"""The slow defaults of the structure interface, on a structure that overrides nothing."""

import pytest
import torch

from laplace.errors import ShapeError
from laplace.structures.base import AbstractPrecision
from laplace.structures.diag import DiagPrecision
from laplace.structures.full import FullPrecision
from tests.contracts import check_precision
from tests.structures.samples import C, D, psd, uniform


class Dense(AbstractPrecision):
    """The textbook: an explicit inverse."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix, self.covariance = matrix, matrix.inverse()

    n_params = property(lambda self: len(self.matrix))
    public = property(lambda self: self.matrix)

    def solve(self, v):
        return v @ self.covariance

    def quadratic(self, v):
        return ((v @ self.matrix) * v).sum(-1)

    def logdet(self):
        return self.matrix.logdet()

    def diagonal_of_inverse(self):
        return self.covariance.diagonal()

    def sample(self, n, generator=None):
        noise = torch.randn(n, len(self.matrix), dtype=self.matrix.dtype, generator=generator)
        return noise @ torch.linalg.cholesky(self.covariance).T

    def to_dense(self):
        return self.matrix


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_structure_that_overrides_nothing_is_correct(bias):
    size = C * (D + bias)
    dense = psd(size, 1, rank=size) + torch.eye(size).double()
    check_precision(Dense(dense), dense, n_outputs=C, bias=bias)


@pytest.mark.parametrize(
    "precision", [FullPrecision(psd(6, 1, rank=6)), DiagPrecision(uniform(6))], ids=["full", "diag"]
)
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 6), (2, 4, 3, 6)])
def test_jacobians_of_another_shape_are_refused(precision, shape):
    for method in (precision.functional_variance, precision.functional_covariance):
        with pytest.raises(ShapeError, match=r"\[batch, outputs, 6\]"):
            method(torch.zeros(*shape).double())
