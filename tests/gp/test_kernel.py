"""Kernels of last layers, from features, and of whole networks, from factors, against Jacobians written out."""

import pytest
import torch

from laplace.errors import UnsupportedError
from laplace.gp.derivatives import jacobian
from laplace.gp.kernel import SubsetKernel
from laplace.structures.head_block import HeadBlock
from tests.contracts import of_head
from tests.gp.samples import F64
from tests.gp.subsets import KINDS, Sample, sample
from tests.tools import LargestTensor, assert_close

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
everywhere = pytest.mark.parametrize(("kind", "name"), KINDS)


def roots(here: Sample) -> list[torch.Tensor]:
    """Of every form that a kernel takes."""
    if here.kernel.shares:
        shared = here.roots(diagonal=True, shared=True)
        return [here.roots(diagonal=False), here.roots(diagonal=True), shared]
    return [here.roots(diagonal=here.kernel.separates)]


def dense_parts(here: Sample, parts: torch.Tensor, n_rows: int) -> torch.Tensor:
    """From parts with columns a row, ``[parts, points, rows']``, to ``[points·C, rows'·C]``."""
    C = here.n_outputs
    return torch.einsum("ck,cnm->ncmk", torch.eye(C), parts.expand(C, -1, -1)).reshape(n_rows * C, -1)


@everywhere
def test_gram_and_projections_are_products_with_roots(kind, name):
    here = sample(kind, name)
    K, cross = here.unit(), here.between(here.J_inputs, here.J)
    for root in roots(here):
        R = here.dense_root(root)
        gram, projected = here.kernel.gram(root), here.kernel.project(here.kernel.cross(here.inputs, F64), root)
        if root.dim() == 2:
            gram = dense_parts(here, gram, len(here.J)).unsqueeze(0)
            projected = dense_parts(here, projected, len(here.J_inputs)).unsqueeze(0)
        assert_close(gram[0], R.T @ K @ R, "Rᵀ K R")
        assert_close(projected[0], cross @ R, "k(x, ·) R")


@everywhere
def test_a_basis_is_multiplied_on(kind, name):
    here = sample(kind, name)
    for root in roots(here):
        gram = here.kernel.gram(root)
        basis = torch.randn(*gram.shape[:2], 3)
        cross = here.kernel.cross(here.inputs, F64)
        assert_close(here.kernel.project(cross, root, basis), here.kernel.project(cross, root) @ basis)


@everywhere
def test_weights_and_outputs_are_products_with_the_jacobian(kind, name):
    here = sample(kind, name)
    v, u = torch.randn(4, here.J.shape[2]), torch.randn(3, *here.J.shape[:2])
    assert_close(here.kernel.apply(v), torch.einsum("ncp,vp->vnc", here.J, v), "J v")
    assert_close(here.kernel.combine(u), torch.einsum("ncp,vnc->vp", here.J, u), "Jᵀ u")
    assert (here.kernel.n_rows, here.kernel.n_outputs) == here.J.shape[:2]
    assert here.kernel.n_params == here.J.shape[2]


@pytest.mark.parametrize("n_rows", [2, 9])
def test_fewer_features_and_fewer_rows_give_the_same(n_rows):
    phi, x = torch.randn(n_rows, 5), torch.randn(3, 4)
    kernel = SubsetKernel.of_head(HeadBlock((phi[:, :4], phi[:, 4:]), ((2, 4), (2,))))
    K = torch.nn.functional.pad(x, (0, 1), value=1.0) @ phi.T
    cross = kernel.cross(of_head(torch.zeros(3, 2), x), F64)
    assert cross.shape == (1, 3, min(n_rows, 5))
    for root in (torch.rand(n_rows, 2), torch.randn(n_rows, 2, 2)):
        sides = list(kernel.sides(root))
        found, expected = torch.stack([cross[0] @ side.T for side in sides]), kernel.project(cross, root)
        truth = torch.einsum("bn,nck->cbnk", K, root.reshape(n_rows, 2, -1)).flatten(2)
        if root.dim() == 3:
            expected = expected[0].unflatten(0, (-1, 2)).transpose(0, 1)
        assert_close(expected, truth)
        assert_close(found, truth)


@everywhere
def test_a_union_has_the_rows_of_both(kind, name):
    here = sample(kind, name)
    root = roots(here)[0]
    both = here.kernel.union(here.kernel)
    assert both.n_rows == 2 * here.kernel.n_rows
    found = both.gram(torch.cat([root, root]))
    assert_close(found[:, : found.shape[1] // 2, : found.shape[1] // 2], here.kernel.gram(root))
    assert_close(found[:, : found.shape[1] // 2, found.shape[1] // 2 :], here.kernel.gram(root))


@everywhere
def test_state_describes_the_kernel(kind, name):
    here = sample(kind, name)
    state, root = here.kernel.state(), roots(here)[0]
    assert set(state) == set(SubsetKernel.head_entries if kind == "last" else SubsetKernel.network_entries)
    again = SubsetKernel.from_state(state, F64, here.kernel.linearize)
    assert torch.equal(again.gram(root), here.kernel.gram(root))


@pytest.mark.parametrize("width", [4, 40])
def test_a_last_layer_needs_no_matrix_over_outputs(width):
    C, n = 1000, 12
    phi, x = torch.randn(n, width), torch.randn(7, width)
    roots, inputs = (torch.rand(n, 1), torch.rand(n, C)), of_head(torch.zeros(7, C), x)
    with LargestTensor() as largest:
        kernel = SubsetKernel.of_head(HeadBlock((phi, torch.ones(n, 1)), ((C, width), (C,))))
        cross = kernel.cross(inputs, F64)
        J = jacobian(inputs, F64)
        J.variance(), kernel.apply(torch.randn(1, C * (width + 1))), kernel.combine(torch.randn(1, n, C))
        for root in roots:
            kernel.gram(root), kernel.project(cross, root)
    assert largest.numel <= C * max(n * n, width + 1), largest.operation


def test_kernels_refuse_inputs_of_the_other_kind():
    whole, last = sample("whole", "mlp"), sample("last", "classification")
    with pytest.raises(UnsupportedError, match="derivatives"):
        whole.kernel.cross(last.inputs, F64)
    with pytest.raises(UnsupportedError, match="features"):
        last.kernel.cross(whole.inputs, F64)
