"""Structures where something is small, large, zero or alone."""

import math

import pytest
import torch

from laplace import linalg
from laplace.errors import UnsupportedError
from laplace.network.parameters import ParameterSubset
from laplace.schema import check_entries
from laplace.structures import KronCurvature, LowRankCurvature
from laplace.structures.by_hand import assigned_curvature, independent
from laplace.structures.entries import chosen
from laplace.structures.full import FullCurvature
from laplace.structures.head_block import follow, head_blocks
from laplace.structures.kron import Kron
from laplace.structures.lowrank import Truncation
from laplace.structures.product import ProductBlock
from laplace.structures.subspace import extended, nystrom
from tests.contracts import generator, linear_jacobian, shapes_of
from tests.structures.samples import prior, psd, uniform
from tests.structures.test_every_structure import ROWS, SHAPES, SIZES, check_moments, every_structure, normal
from tests.tools import assert_close

F64 = torch.float64
scales = pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])


@every_structure
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("features", [1, 2])
def test_heads_of_few_features_predict_like_any_other(name, features, bias):
    shapes, phi = shapes_of(3, features, bias), normal(4, features)
    J = torch.stack([linear_jacobian(row, 3, bias) for row in phi], 1)
    row, over = ROWS[name](shapes), prior(uniform(1), tuple(map(math.prod, shapes)))
    check_moments(row.curvature.posterior(over), head_blocks(phi, shapes), J, row.dense + over.diagonal().diag())


@every_structure
def test_every_state_passes_its_own_table(name):
    curvature = ROWS[name](SHAPES).curvature
    known = {"dtype": F64, "P": sum(SIZES), "sizes": list(SIZES), "shapes": SHAPES, "negative": False}
    check_entries(curvature.state(), curvature.entries, known)


@pytest.mark.parametrize("n_batches", [1, 2, 3])
def test_heads_of_batches_follow_one_another(n_batches):
    phis = [normal(2 + seed, 4, seed=seed) for seed in range(n_batches)]
    found = follow([head_blocks(phi, SHAPES) for phi in phis])
    for ours, theirs in zip(found, head_blocks(torch.cat(phis), SHAPES), strict=True):
        assert_close(ours.dense(), theirs.dense())


def test_weights_of_a_single_tensor_are_in_the_order_in_which_they_are_chosen():
    block = ProductBlock(normal(2, 3, 1, 1, 4), normal(3, 1, 1, 5, seed=1))
    weights = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(20, dtype=F64))])
    (found,) = chosen([block], ParameterSubset.indices(weights, torch.tensor([7, 2, 19])))
    assert (found.n_params, found.n_columns, found.n_rows, found.sample.dtype) == (3, 2, 3, F64)
    assert_close(found.dense(), block.dense()[..., [7, 2, 19]])


def test_positions_that_count_follow_one_another():
    counted = torch.tensor([[True, False], [False, True], [True, True]])
    some = ProductBlock(normal(2, 3, 1, 2, 4), normal(3, 1, 2, 5), counted=counted)
    every = ProductBlock(normal(2, 3, 1, 3, 4), normal(3, 1, 3, 5))
    assert ProductBlock.counted_together([every, every]) is None
    together = ProductBlock.counted_together([some, every])
    assert together is not None
    assert together.tolist() == torch.cat([counted, torch.ones(3, 3, dtype=torch.bool)], 1).tolist()
    assert some.counts.tolist() == [1, 1, 2]
    assert every.counts.tolist() == [3, 3, 3]


@scales
def test_eigenvalues_that_are_rounding_are_zero_in_all_units(scale):
    found = FullCurvature(scale * psd(15, 1, rank=4)).eigenvalues
    assert int((found == 0).sum()) == 11
    values = scale * torch.tensor([1.0, 0.5, 5 * torch.finfo(F64).eps, 0.0], dtype=F64)
    assert Truncation(rank=4).n_kept(values, None) == 2
    values[2] *= 10
    assert Truncation(rank=4).n_kept(values, None) == 3


def test_determinants_for_further_scalar_priors_factorize_nothing(monkeypatch):
    row = ROWS["full"](SHAPES)
    row.curvature.log_det_ratio(prior(uniform(1), SIZES))
    monkeypatch.setattr(torch.linalg, "eigvalsh", None)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    monkeypatch.setattr(linalg, "cholesky", None)
    for precision in (1e-3, 0.5, 20.0):
        over, scaled = prior(torch.tensor([precision], dtype=F64), SIZES), row.curvature * 0.3
        logdet = (0.3 * row.dense + precision * torch.eye(15, dtype=F64)).logdet()
        assert_close(scaled.posterior_logdet(over), logdet)
        assert_close(scaled.log_det_ratio(over), logdet - 15 * math.log(precision))


def test_nystrom_takes_off_all_that_it_adds():
    matrix = torch.tensor([4.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float32).diag()
    values, _ = nystrom(torch.eye(5, 3, dtype=torch.float32), matrix[:, :3])
    torch.testing.assert_close(values, matrix.diagonal()[:3], rtol=1e-7, atol=1e-12)


def test_directions_take_memory_with_those_that_are_kept(monkeypatch):
    like, beside = torch.zeros(10, dtype=F64), torch.eye(10, 2, dtype=F64)
    monkeypatch.setattr(linalg, "memory_of", lambda device: 6 * 8 * 10 * 5)
    found = extended(None, 3, like, generator(0), beside)
    assert_close(torch.cat([beside, found], 1).T @ found, torch.eye(5, dtype=F64)[:, 2:])
    monkeypatch.setattr(linalg, "memory_of", lambda device: 6 * 8 * 10 * 5 - 1)
    with pytest.raises(UnsupportedError, match="5 directions for 10 weights"):
        extended(None, 3, like, generator(0), beside)


def test_no_curvature_is_held_as_a_whole():
    U, zero = torch.eye(4, 1, dtype=F64), torch.zeros((), dtype=F64)
    assert LowRankCurvature(U, zero.view(1), trace=zero).captured == 1.0
    assert LowRankCurvature(U, zero.view(1) + 1, trace=zero + 4).captured == 0.25


@every_structure
@pytest.mark.parametrize("shape", [(3,), (3, 4)], ids=["bias", "weight"])
def test_a_single_group_is_assigned_like_several(name, shape):
    row = ROWS[name]([shape])
    kind, handed = type(row.curvature), independent(row.curvature.public)
    found = assigned_curvature(kind, handed, [shape], lambda _, value: value.clone(), None)
    assert_close(found.to_dense(), row.dense)
    over = prior(uniform(1), (math.prod(shape),))
    assert_close(found.posterior(over).to_dense(), row.dense + over.diagonal().diag())


def test_small_eigenvalues_of_a_decomposition_are_assigned():
    factors = [[uniform(3).diag(), torch.tensor([1.0, 0.1, 1e-3, 1e-6], dtype=F64).diag()], [uniform(3, 1).diag()]]
    found = assigned_curvature(KronCurvature, Kron(factors).decompose(), SHAPES, lambda _, value: value.clone(), None)
    over = prior(torch.full((1,), 1e-6, dtype=F64), SIZES)
    dense = torch.block_diag(torch.kron(*factors[0]), factors[1][0]) + 1e-6 * torch.eye(15, dtype=F64)
    assert_close(found.posterior(over).logdet(), dense.logdet())
