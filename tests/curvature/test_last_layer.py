"""The closed forms against the materialized sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace.curvature import last_layer
from laplace.likelihoods import OutputHessian
from laplace.structures.head_block import HeadBlock, head_blocks
from tests.contracts import linear_jacobian
from tests.tools import LargestTensor, assert_close

KINDS = ("diagonal", "shared", "root", "difference", "two roots")


def hessian(kind: str, n_rows: int, n_outputs: int) -> OutputHessian:
    diagonal = torch.rand(n_rows, n_outputs).double()
    root = torch.randn(n_rows, n_outputs, 1).double()
    return {
        "diagonal": OutputHessian(n_outputs, diagonal=diagonal),
        "shared": OutputHessian(n_outputs, diagonal=diagonal[:, :1]),
        "root": OutputHessian(n_outputs, root=root),
        "difference": OutputHessian(n_outputs, diagonal=diagonal, root=root, sign=-1),
        "two roots": OutputHessian(n_outputs, root=torch.cat([root, root + 1], -1)),
    }[kind]


def blocks(phi: torch.Tensor, output_hessian: OutputHessian, bias: bool) -> list[HeadBlock]:
    shapes = [(output_hessian.n_outputs, phi.shape[1]), (output_hessian.n_outputs,)]
    return head_blocks(phi, shapes[: 1 + bias])


def brute_force(phi: torch.Tensor, Lambda: torch.Tensor, bias: bool) -> torch.Tensor:
    n_params = Lambda.shape[1] * (phi.shape[1] + bias)
    total = torch.zeros(n_params, n_params).double()
    for row, block in zip(phi, Lambda, strict=True):
        J = linear_jacobian(row, len(block), bias)
        total += J.T @ block @ J
    return total


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(n_rows=st.integers(0, 6), n_outputs=st.integers(1, 4), n_features=st.integers(1, 5), bias=st.booleans())
def test_closed_forms_equal_the_sum_over_data(kind, n_rows, n_outputs, n_features, bias):
    phi, output_hessian = torch.randn(n_rows, n_features).double(), hessian(kind, n_rows, n_outputs)
    Lambda = output_hessian.dense()
    H = brute_force(phi, Lambda, bias)
    assert_close(last_layer.full(blocks(phi, output_hessian, bias), output_hessian), H, "full")
    assert_close(last_layer.diag(blocks(phi, output_hessian, bias), output_hessian), H.diagonal(), "diag")
    G, A = Lambda.sum(0), phi.T @ phi
    kron = torch.block_diag(torch.kron(G, A), *[G] * bias)
    assert_close(last_layer.kron(blocks(phi, output_hessian, bias), output_hessian).to_matrix(), kron, "kron")


@pytest.mark.parametrize("kind", KINDS)
def test_kron_is_exact_for_a_single_datum(kind):
    phi, output_hessian = torch.randn(1, 4).double(), hessian(kind, 1, 3)
    full = last_layer.full(blocks(phi, output_hessian, False), output_hessian)
    assert_close(last_layer.kron(blocks(phi, output_hessian, False), output_hessian).to_matrix(), full)


def test_kron_is_exact_for_data_that_share_their_hessian():
    """The Gaussian without bias: sum of I x phi phi' is N I x mean of phi phi'."""
    phi = torch.randn(7, 4).double()
    identity = OutputHessian(3, diagonal=torch.ones(7, 1).double())
    factors = last_layer.kron(blocks(phi, identity, False), identity).kfacs[0]
    assert_close(torch.kron(factors[0], factors[1] / 7), last_layer.full(blocks(phi, identity, False), identity))


def test_the_bias_shares_the_factor_of_the_outputs_unless_it_cancels():
    phi, output_hessian = torch.randn(5, 4).double(), hessian("difference", 5, 3)
    weight, bias = last_layer.kron(blocks(phi, output_hessian, True), output_hessian).kfacs
    assert bias[0] is weight[0]
    for constant in (0.0, 2.0):
        head = [*blocks(phi, output_hessian, False), HeadBlock((torch.full((5, 1), constant).double(),), ((3,),))]
        exact = last_layer.full(head, output_hessian)[-3:, -3:]
        assert_close(last_layer.kron(head, output_hessian, constant).kfacs[1][0], exact)
        assert_close(last_layer.blockdiag(head, output_hessian, constant)[1], exact)


@pytest.mark.parametrize("kind", ["root", "difference"])
def test_chunks_do_not_change_the_dense_matrix(kind, monkeypatch):
    phi, output_hessian = torch.randn(9, 3).double(), hessian(kind, 9, 2)
    whole = last_layer.full(blocks(phi, output_hessian, True), output_hessian)
    monkeypatch.setattr(last_layer, "chunk_elements", lambda device: 10)
    assert_close(last_layer.full(blocks(phi, output_hessian, True), output_hessian), whole)


def test_neither_diagonal_nor_factors_take_more_than_inputs_and_result():
    rows, n_outputs, n_features = 32, 40, 50
    phi, output_hessian = torch.randn(rows, n_features).double(), hessian("difference", rows, n_outputs)
    with LargestTensor() as largest:
        last_layer.diag(blocks(phi, output_hessian, True), output_hessian)
        last_layer.kron(blocks(phi, output_hessian, True), output_hessian)
    assert largest.numel <= max(n_outputs * (n_features + 1), n_features**2, n_outputs**2), largest.operation
