"""Kronecker factors: raw sums, a count, and the public `Kron`."""

import pytest
import torch
from torch import nn

from laplace import KronLaplace, linalg, utils
from laplace.errors import NotPositiveDefiniteError, PerformanceWarning, ShapeError, UnsupportedError
from laplace.structures import eigenbases
from laplace.structures.kron import Kron, KronCurvature
from laplace.utils import matrix
from tests.contracts import check_curvature
from tests.structures.samples import PER_LAYER, PER_WEIGHT, SCALAR, C, D, prior, psd
from tests.tools import assert_close


def sums(seed: int, *, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor, Kron]:
    G, A = psd(C, seed), psd(D, seed + 1, rank=3)
    return G, A, Kron([[G, A], [G]] if bias else [[G, A]])


def curvature(factors: Kron, count: int) -> KronCurvature:
    return KronCurvature(factors, (count,) * len(factors))


def dense(G: torch.Tensor, A: torch.Tensor, count: int, *, bias: bool = True) -> torch.Tensor:
    return torch.block_diag(torch.kron(G, A / count), *[G] * bias)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("precision", [SCALAR, PER_LAYER], ids=["scalar", "per layer"])
def test_kron_satisfies_the_contract(precision, bias):
    (G1, A1, first), (G2, A2, second) = sums(1, bias=bias), sums(3, bias=bias)
    sizes = (C * D, C)[: 1 + bias]
    check_curvature(
        curvature(first, 5),
        curvature(second, 2),
        dense(G1 + G2, A1 + A2, 7, bias=bias),
        (dense(G1, A1, 5, bias=bias), dense(G2, A2, 2, bias=bias)),
        prior(precision[: len(sizes)], sizes),
    )


def test_the_union_of_data_is_not_the_sum_of_the_matrices():
    (_, _, first), (_, _, second) = sums(1), sums(3)
    union = curvature(first, 5).merge(curvature(second, 2)).to_dense()
    added = curvature(first, 5).to_dense() + curvature(second, 2).to_dense()
    assert not torch.allclose(union, added)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_damping_adds_the_root_of_the_prior_to_each_side_of_a_product(bias):
    G, A, factors = sums(1, bias=bias)
    delta, s = PER_LAYER[: 1 + bias], 1.7
    eye_C, eye_D = torch.eye(C).double(), torch.eye(D).double()
    sides = (s**0.5 * G + delta[0].sqrt() * eye_C, s**0.5 * A / 5 + delta[0].sqrt() * eye_D)
    blocks = [torch.kron(*sides), *[s * G + d * eye_C for d in delta[1:]]]
    damped = (curvature(factors, 5) * s).posterior(prior(delta, (C * D, C)[: 1 + bias]), damping=True)
    assert_close(damped.to_dense(), torch.block_diag(*blocks))
    assert_close(damped.logdet(), torch.block_diag(*blocks).logdet())


def test_one_precision_a_weight_is_refused():
    with pytest.raises(UnsupportedError, match="Kronecker"):
        curvature(sums(1)[2], 5).posterior(prior(PER_WEIGHT))


# -- the public Kron --------------------------------------------------------------------------------------------------


def test_kron_is_block_diagonal_and_knows_its_algebra():
    G, A, factors = sums(1)
    matrix = dense(G, A, 1)
    assert len(factors) == 2
    assert_close(factors.to_matrix(), matrix)
    assert_close(factors.diag(), matrix.diagonal())
    W = torch.randn(2, 5, len(matrix)).double()
    assert_close(factors.bmm(W), W @ matrix)
    assert_close((factors * 2.5).to_matrix(), 2.5 * matrix)
    assert_close((2.5 * factors).to_matrix(), 2.5 * matrix)
    assert factors.logdet() < -50  # singular


def test_powers_and_log_determinants_go_through_the_eigenbasis():
    G, A = psd(C, 1, rank=C) + torch.eye(C).double(), psd(D, 2, rank=D) + torch.eye(D).double()
    factors, matrix = Kron([[G, A], [G]]), dense(G, A, 1)
    assert_close(factors.logdet(), matrix.logdet())
    W = torch.randn(2, 5, len(matrix)).double()
    assert_close(factors.bmm(W, exponent=-1), W @ matrix.inverse())
    root = factors.bmm(factors.bmm(W, exponent=0.5), exponent=0.5)
    assert_close(root, W @ matrix)


def test_adding_adds_factor_by_factor():
    (G1, A1, first), (G2, A2, second) = sums(1), sums(3)
    assert_close((first + second).to_matrix(), dense(G1 + G2, A1 + A2, 1))
    with pytest.raises(TypeError, match="Kron"):
        first + 1.0


def test_sums_know_how_many_rows_they_are_of_and_the_coarsest_precision():
    G, A = psd(3, 1), psd(4, 2)
    first, second = Kron([[G, A], [G]], counts=[5, 7], resolution=1e-7), Kron([[G, A], [G]], counts=[2, 3])
    for total in (first + second, second + first, (first + second).to(torch.float32)):
        assert total.counts == [7, 10]
        assert total.resolution == 1e-7
    assert (first + Kron([[G, A], [G]])).counts is None
    assert_close((first + second).divide_inputs([7, 10]).kfacs[0][1], 2 * A / 7)
    assert_close((first + second).divide_inputs(4).kfacs[0][1], A / 2)
    assert_close((first + second).divide_inputs(0).kfacs[0][1], 2 * A)


def test_a_vector_is_a_diagonal_factor():
    G, A, _ = sums(1)
    d = torch.rand(C).double()
    factors = Kron([[d, A], [d]])
    matrix = dense(d.diag(), A, 1)
    assert_close(factors.to_matrix(), matrix)
    assert_close(factors.diag(), matrix.diagonal())
    assert_close(factors.decompose().to_matrix(), matrix)


def test_the_recorded_path_leads_to_the_same_classes():
    assert matrix.Kron is utils.Kron is Kron
    assert matrix.KronDecomposed is utils.KronDecomposed is type(sums(1)[2].decompose())


@pytest.mark.parametrize("exponent", [1, -1, 0.5])
def test_a_diagonal_factor_takes_part_in_all_algebra(exponent):
    A, d = psd(D, 2, rank=D) + torch.eye(D).double(), 0.5 + torch.rand(C).double()
    factors, matrix = Kron([[d, A], [d]]), dense(d.diag(), A, 1)
    assert_close(factors.logdet(), matrix.logdet())
    assert_close((factors + factors).to_matrix(), dense(2 * d.diag(), 2 * A, 1))
    assert_close((3.0 * factors).to_matrix(), 3 * matrix)
    values, vectors = torch.linalg.eigh(matrix)
    W = torch.randn(2, 5, len(matrix)).double()
    assert_close(factors.bmm(W, exponent), W @ vectors @ (values**exponent).diag() @ vectors.T)
    precision = factors.decompose() + PER_LAYER
    assert_close(precision.to_matrix(), matrix + prior(PER_LAYER).diagonal().diag())
    assert_close(precision.diag(), precision.to_matrix().diagonal())
    assert_close(precision.diag(-1), precision.to_matrix().inverse().diagonal())
    assert_close(precision.logdet(), (matrix + prior(PER_LAYER).diagonal().diag()).logdet())
    assert factors.n_params == len(matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_init_from_model_takes_modules_and_parameters_of_any_shape(dtype):
    conv = nn.Conv2d(2, 3, 4)
    conv.register_parameter("gain", nn.Parameter(torch.ones(())))
    conv.register_parameter("frozen", nn.Parameter(torch.ones(7), requires_grad=False))
    factors = Kron.init_from_model(conv, torch.device("cpu"), dtype)
    assert [[tuple(side.shape) for side in block] for block in factors.kfacs] == [
        [(3, 3), (32, 32)],
        [(3, 3)],
        [(1, 1)],
    ]
    assert {side.dtype for block in factors.kfacs for side in block} == {dtype}
    assert factors.n_params == 3 * 32 + 3 + 1
    of_parameters = Kron.init_from_model(iter(conv.parameters()), "cpu", dtype)
    assert len(of_parameters) == 4
    layer = nn.Linear(D, C)
    G, A, other = sums(1)
    assert_close((Kron.init_from_model(layer, "cpu", torch.float64) + other).to_matrix(), dense(G, A, 1))


def test_factors_from_a_model_are_zero_and_fit_its_parameters():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    factors = Kron.init_from_model(model, "cpu", torch.float64)
    assert [[len(side) for side in block] for block in factors.kfacs] == [[3, 4], [3], [2, 3]]
    assert_close(factors.to_matrix(), torch.zeros(21, 21).double())


@pytest.mark.parametrize("block", [[], [torch.zeros(2, 3)], [torch.eye(2)] * 3])
def test_blocks_that_are_no_products_of_square_matrices_are_refused(block):
    with pytest.raises(ShapeError, match="one or two factors"):
        Kron([block])


def test_factors_that_are_not_finite_are_refused_in_words():
    with pytest.raises(NotPositiveDefiniteError, match="NaN"):
        Kron([[torch.full((2, 2), float("nan"))]]).decompose()


# -- eigendecompositions ----------------------------------------------------------------------------------------------


def wide_network() -> KronLaplace:
    """More inputs of a layer than four times the rows, in float32; fitted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 90), nn.Tanh(), nn.Linear(90, 3)).float()
    la = KronLaplace(model, "classification", prior_precision=0.1)
    la.fit([(torch.randn(7, 80).float(), torch.arange(7) % 3)])
    return la


def test_predictions_and_evidence_are_those_of_a_decomposition_in_float64(monkeypatch):
    x, found = torch.randn(4, 80).float(), []
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr(linalg, "is_few", lambda rank, size: False)
            monkeypatch.setattr(linalg, "is_coarse", lambda dtype, resolution: False)
        la = wide_network()
        found.append((la(x), la.functional_variance_fast(x)[1], la.log_marginal_likelihood().detach()))
        found[-1] += (la.posterior_precision.diag(-1),)
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


def test_few_rows_are_decomposed_by_their_range(monkeypatch):
    la, sizes, eigh = wide_network(), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda each: sizes.append(len(each)) or eigh(each))
    la(torch.randn(2, 80).float())
    assert sorted(sizes) == [3, 7 + linalg.PROBES, 7 + linalg.PROBES, 90], "inputs of both layers have 7 rows"


def test_a_long_decomposition_is_told_before_and_shows_how_far_it_is(monkeypatch, capsys):
    la = wide_network()
    monkeypatch.setattr(eigenbases, "LONG", 0.0)
    with pytest.warns(PerformanceWarning, match=r"4 Kronecker factors of up to 90×90 .* once for this fit: .* seconds"):
        la(torch.randn(2, 80).float())
    assert "[Eigendecompositions]" in capsys.readouterr().err
    la(torch.randn(2, 80).float())
    assert not capsys.readouterr().err, "they are kept"


def test_the_time_of_large_matrices_is_measured(monkeypatch):
    monkeypatch.setattr(eigenbases, "PROBE", 20)
    like = torch.zeros((), dtype=torch.float64)
    assert eigenbases.expected_seconds(1e6, 100, like) == pytest.approx(1e6 * eigenbases.SECONDS), "short"
    measured = eigenbases.expected_seconds(1e12, 10_000, like)
    assert measured > 0
    assert measured != 1e12 * eigenbases.SECONDS
