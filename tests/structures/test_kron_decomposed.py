"""Kronecker blocks in their eigenbasis with the prior added."""

import pytest
import torch

from laplace.errors import ShapeError
from laplace.structures.head_block import head_blocks
from laplace.structures.kron import Kron
from laplace.utils import KronDecomposed
from tests.contracts import check_precision, shapes_of
from tests.structures.samples import PER_LAYER, SCALAR, C, D, prior, psd
from tests.tools import LargestTensor, assert_close

SIDES = psd(C, 1), psd(D, 2)
EYES = torch.eye(C).double(), torch.eye(D).double()


def blocks(*, bias: bool, diagonal: bool = False) -> list[list[torch.Tensor]]:
    G, A = SIDES
    G = G.diagonal().clone() if diagonal else G
    return [[G, A], [G]][: 1 + bias]


def dense(deltas: torch.Tensor, *, bias: bool, damping: bool = False, diagonal: bool = False) -> torch.Tensor:
    G, A = SIDES
    G = G.diagonal().diag() if diagonal else G
    roots = [M + deltas[0].sqrt() * eye for M, eye in zip((G, A), EYES, strict=True)]
    weight = torch.kron(*roots) if damping else torch.kron(G, A) + deltas[0] * torch.eye(C * D).double()
    return torch.block_diag(weight, *[G + deltas[-1] * EYES[0]] * bias)


@pytest.mark.parametrize("diagonal", [False, True], ids=["dense G", "diagonal G"])
@pytest.mark.parametrize("damping", [False, True], ids=["plain", "damped"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_decomposed_satisfies_the_contract_for_a_linear_layer(bias, damping, diagonal):
    deltas = PER_LAYER[: 1 + bias]
    precision = Kron(blocks(bias=bias, diagonal=diagonal)).decompose(damping=damping) + deltas
    expected = dense(deltas, bias=bias, damping=damping, diagonal=diagonal)
    check_precision(precision, expected, n_outputs=C, bias=bias)


def test_factors_that_differ_between_weight_and_bias_are_allowed():
    G, A = SIDES
    other = psd(C, 9)
    precision = Kron([[G, A], [other]]).decompose() + PER_LAYER
    expected = torch.block_diag(dense(PER_LAYER[:1], bias=False), other + PER_LAYER[1] * EYES[0])
    check_precision(precision, expected, n_outputs=C, bias=True)


def test_public_algebra_adds_priors_and_scales_the_curvature():
    decomposed = Kron(blocks(bias=True)).decompose()
    assert len(decomposed) == 2
    assert_close(decomposed.deltas, torch.zeros(2).double())
    precision = decomposed * 2.0 + PER_LAYER
    assert_close(precision.deltas, PER_LAYER)
    undone = 2.0 * dense(torch.zeros(2).double(), bias=True)
    prior = torch.block_diag(PER_LAYER[0] * torch.eye(C * D).double(), PER_LAYER[1] * EYES[0])
    assert_close(precision.to_matrix(), undone + prior)
    assert_close((decomposed + SCALAR).to_matrix(), dense(SCALAR.expand(2), bias=True))
    assert_close(decomposed.to_matrix(), dense(torch.zeros(2).double(), bias=True))
    with pytest.raises(ShapeError, match="2 blocks"):
        decomposed + torch.ones(3).double()


@pytest.mark.parametrize("exponent", [1, -1, 0.5, -0.5, 2])
def test_powers_of_the_matrix(exponent):
    precision = Kron(blocks(bias=True)).decompose() + PER_LAYER
    values, vectors = torch.linalg.eigh(dense(PER_LAYER, bias=True))
    power = vectors @ (values**exponent).diag() @ vectors.T
    assert_close(precision.to_matrix(exponent), power)
    assert_close(precision.diag(exponent), power.diagonal())
    W = torch.randn(2, 3, len(power)).double()
    assert_close(precision.bmm(W, exponent), W @ power)
    if exponent == -1:
        assert_close(precision.inv_square_form(W), W @ power @ W.mT)


def test_a_sum_of_eigenvalues_and_priors_may_be_built_by_hand():
    """From eigenvectors and eigenvalues, as user code does it; missing eigenvectors are an identity."""
    (G, A), (gammas, U) = SIDES, torch.linalg.eigh(SIDES[0])
    gammas = gammas.clamp(min=0)
    decomposed = KronDecomposed([[U, None], [U]], [[gammas, A.diagonal()], [gammas]])
    expected = torch.block_diag(torch.kron(G, A.diagonal().diag()), G)
    assert_close(decomposed.to_matrix(), expected)
    assert_close((decomposed + PER_LAYER).logdet(), (expected + prior(PER_LAYER).diagonal().diag()).logdet())


def test_detach_cuts_the_graph_and_keeps_the_numbers():
    deltas = PER_LAYER.clone().requires_grad_()
    precision = Kron(blocks(bias=True)).decompose(damping=True) + deltas
    assert precision.logdet().requires_grad
    assert not precision.detach().logdet().requires_grad
    assert_close(precision.detach().to_matrix(), precision.to_matrix())


def test_variances_never_build_a_matrix_a_row():
    n_outputs, n_features, rows = 30, 20, 25
    G, A = psd(n_outputs, 1), psd(n_features, 2)
    precision = Kron([[G, A], [G]]).decompose() + PER_LAYER
    blocks_of_head = head_blocks(torch.randn(rows, n_features).double(), shapes_of(n_outputs, n_features))
    with LargestTensor() as largest:
        precision.block_variance(blocks_of_head)
    assert largest.numel <= max(n_outputs, n_features, rows) ** 2, largest.operation
