"""Numerical safety."""

import pytest
import torch

from laplace import linalg
from laplace.errors import NotPositiveDefiniteError, NumericalWarning
from tests.structures.samples import psd
from tests.tools import assert_close


def test_cholesky_of_a_positive_definite_matrix_is_exact_and_silent():
    matrix = psd(5, 0, rank=5) + torch.eye(5).double()
    L = linalg.cholesky(matrix)
    assert_close(L, L.tril())
    assert_close(L @ L.T, matrix)


def test_a_jitter_is_announced_with_its_size():
    singular = psd(5, 0, rank=2).float()
    with pytest.warns(NumericalWarning, match=r"added \d\.\d\de[+-]\d\d"):
        L = linalg.cholesky(singular, "posterior precision")
    assert (L @ L.T - singular).abs().max() < 1e-3 * singular.abs().max()


def test_an_indefinite_matrix_is_refused_with_its_smallest_eigenvalue():
    with pytest.raises(NotPositiveDefiniteError, match=r"smallest eigenvalue is -1\.000e\+00"):
        linalg.cholesky(torch.diag(torch.tensor([1.0, -1.0]).double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factorize", [linalg.cholesky, linalg.eigh])
def test_what_is_not_finite_is_refused_in_words(factorize, value):
    matrix = torch.eye(3).double()
    matrix[0, 0] = value
    with pytest.raises(NotPositiveDefiniteError, match="NaN or infinite"):
        factorize(matrix)


def test_eigenvalues_of_a_singular_matrix_are_not_negative():
    for seed in range(10):
        matrix = psd(6, seed, rank=2)
        values, vectors = linalg.eigh(matrix)
        assert values.min() >= 0
        assert_close(vectors @ values.diag() @ vectors.T, matrix)


def test_clearly_negative_eigenvalues_are_refused():
    with pytest.raises(NotPositiveDefiniteError, match="negative eigenvalue"):
        linalg.eigh(torch.diag(torch.tensor([1.0, -0.1]).double()))


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_a_root_exists_for_singular_matrices_too(rank):
    matrix = torch.stack([psd(5, seed, rank=rank) for seed in range(3)])
    R = linalg.root(matrix)
    assert_close(R @ R.mT, matrix)
