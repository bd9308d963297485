"""Numerical safety."""

import pytest
import torch

from laplace import linalg
from laplace.errors import InputError, NotPositiveDefiniteError, NumericalWarning, ShapeError
from laplace.utils import block_diag, diagonal_add_scalar, invsqrt_precision, kron, symeig
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


def test_clearly_negative_eigenvalues_are_refused_where_the_range_is_found_by_products():
    matrix = low_rank(200, 3)
    vectors = torch.linalg.eigh(matrix)[1][:, -3:]
    indefinite = vectors @ torch.diag(torch.tensor([1.0, 0.5, -0.4]).double()) @ vectors.T
    with pytest.raises(NotPositiveDefiniteError, match="negative eigenvalue, -4"):
        linalg.eigh(indefinite, rank=3)


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_a_root_exists_for_singular_matrices_too(rank):
    matrix = torch.stack([psd(5, seed, rank=rank) for seed in range(3)])
    R = linalg.root(matrix)
    assert_close(R @ R.mT, matrix)


# -- the recorded helpers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_invsqrt_precision_is_the_lower_triangular_scale_of_a_precision(dtype):
    M = (psd(6, 0, rank=6) + torch.eye(6).double()).to(dtype)
    before = M.clone()
    L = invsqrt_precision(M)
    assert L.dtype == dtype
    assert torch.equal(M, before)
    assert torch.equal(L, L.tril())
    assert float(L.diagonal().min()) > 0
    assert_close(L @ L.T, M.double().inverse())
    density = torch.distributions.MultivariateNormal(torch.zeros(6).to(dtype), precision_matrix=M)
    assert_close(L, density.scale_tril)
    with pytest.raises(NotPositiveDefiniteError, match="smallest eigenvalue"):
        invsqrt_precision(-M)


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_symeig_is_the_eigendecomposition_clamped_at_zero(rank):
    M = psd(6, 1, rank=rank)
    values, vectors = symeig(M)
    assert_close(values, torch.linalg.eigvalsh(M).clamp(min=0))
    assert float(values.min()) >= 0
    assert bool((values.diff() >= 0).all()), "ascending"
    assert_close(vectors @ values.diag() @ vectors.T, M)
    assert_close(vectors.T @ vectors, torch.eye(6))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_symeig_raises_instead_of_answering_zeros(value):
    M = torch.eye(3)
    M[1, 2] = M[2, 1] = value
    with pytest.raises(NotPositiveDefiniteError, match="matrix holds NaN or infinite entries"):
        symeig(M)
    with pytest.raises(NotPositiveDefiniteError, match="negative eigenvalue"):
        symeig(torch.diag(torch.tensor([1.0, -1.0])))


def test_kron_multiplies_every_entry_with_the_second_matrix():
    A, B = torch.arange(6.0).view(2, 3), torch.tensor([[1.0, -1.0], [2.0, 0.5], [0.0, 3.0]])
    product = kron(A, B)
    assert product.shape == (6, 6)
    for i in range(2):
        for j in range(3):
            assert_close(product[3 * i : 3 * i + 3, 2 * j : 2 * j + 2], A[i, j] * B)


def test_block_diag_puts_blocks_on_the_diagonal():
    blocks = [torch.ones(2, 2), 2 * torch.ones(1, 3), 3 * torch.ones(2, 1)]
    assert_close(
        block_diag(blocks),
        torch.tensor(
            [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 2, 2, 2, 0], [0, 0, 0, 0, 0, 3], [0, 0, 0, 0, 0, 3]]
        ).double(),
    )


@pytest.mark.parametrize("value", [2.0, torch.tensor(2.0, dtype=torch.float64)])
def test_diagonal_add_scalar_returns_a_new_matrix(value):
    X = torch.arange(9.0).view(3, 3)
    result = diagonal_add_scalar(X, value)
    assert_close(result, torch.tensor([[2.0, 1, 2], [3, 6, 5], [6, 7, 10]]))
    assert torch.equal(X, torch.arange(9.0).view(3, 3))
    assert diagonal_add_scalar(X.float(), 2.0).dtype == torch.float32
    with pytest.raises(ShapeError, match=r"square matrix; got the shape \[2, 3\]"):
        diagonal_add_scalar(torch.ones(2, 3), 1.0)


# -- border checks ----------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_are_counted_by_rows():
    values = torch.ones(2, 3, 4)
    linalg.check_finite(values, "Values", "Look.")
    values[0, 1, 2] = values[0, 1, 3] = float("nan")
    values[1, 2, 0] = -float("inf")
    with pytest.raises(InputError, match=r"Values must be finite; 2 of 6 rows hold NaN or infinite values\. Look\."):
        linalg.check_finite(values, "Values", "Look.")


def test_lasting_results_are_no_inference_tensors_and_modes_come_back():
    @linalg.lasting
    def make() -> torch.Tensor:
        """Documented."""
        return torch.ones(2) * 2

    with torch.inference_mode():
        kept = make()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    assert not kept.is_inference()
    assert make.__doc__ == "Documented."
    x = torch.ones(2, requires_grad=True)
    assert (linalg.lasting(lambda: x * kept)()).requires_grad, "outside inference mode nothing changes"


def low_rank(size: int, rank: int) -> torch.Tensor:
    root = torch.randn(size, rank, generator=torch.Generator().manual_seed(rank)).double()
    return (root * torch.logspace(0, -3, rank).double()) @ root.T


@pytest.mark.parametrize("rank", [0, 1, 12])
def test_few_outer_products_are_decomposed_by_their_range(rank, monkeypatch):
    matrix = low_rank(90, rank)
    expected, sizes = torch.linalg.eigvalsh(matrix), []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda each: sizes.append(len(each)) or eigh(each))
    values, vectors = linalg.eigh(matrix, rank=rank)
    assert sizes == [rank + linalg.PROBES]
    assert_close(values, expected.clamp(min=0))
    assert_close((vectors * values) @ vectors.T, matrix, "the matrix")
    assert_close(vectors.T @ vectors, torch.eye(90, dtype=torch.float64), "a basis of all")


def test_more_outer_products_than_said_are_seen(monkeypatch):
    matrix, sizes, eigh = low_rank(90, 60), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda each: sizes.append(len(each)) or eigh(each))
    values, vectors = linalg.eigh(matrix, rank=12)
    assert sizes[-1] == 90
    assert_close((vectors * values) @ vectors.T, matrix)


def test_a_matrix_with_the_digits_of_float32_is_decomposed_in_float32(monkeypatch):
    eps, dtypes, eigh = torch.finfo(torch.float32).eps, [], torch.linalg.eigh
    matrix = 1e60 * low_rank(60, 60)
    expected = torch.linalg.eigvalsh(matrix)
    monkeypatch.setattr(torch.linalg, "eigh", lambda each: dtypes.append(each.dtype) or eigh(each))
    values, vectors = linalg.eigh(matrix, resolution=eps)
    assert dtypes == [torch.float32]
    assert values.dtype == vectors.dtype == torch.float64
    torch.testing.assert_close(values / expected[-1], expected / expected[-1], rtol=0, atol=8 * eps)
    torch.testing.assert_close((vectors * values) @ vectors.T / 1e60, matrix / 1e60, rtol=0, atol=1e-4)
