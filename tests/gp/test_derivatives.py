"""Products of derivatives, in factors and from features, against Jacobians written out."""

import pytest
import torch

from laplace.curvature import AutogradGGN
from laplace.errors import UnsupportedError
from laplace.gp.derivatives import InducingPoints, Jacobian, jacobian, one_output, product
from laplace.predictive import NetworkLinearization
from laplace.predictive.linearization import StoredDerivatives
from laplace.predictive.pairs import compare
from laplace.structures.jacobian import DenseBlock
from tests.cases import named as case_named
from tests.contracts import of_head
from tests.gp.samples import F64, WHOLE, Situation, columns_for, last_layer, situation, whole_network
from tests.networks import named
from tests.tools import LargestTensor, assert_close

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
LAST = ("classification", "no_bias_regression", "positions_regression", "image_positions")
SITUATIONS = [*[("whole", name) for name in WHOLE], *[("written", "mlp"), ("written", "positions")], *[("last", name) for name in LAST]]  # fmt: skip
everywhere = pytest.mark.parametrize(("kind", "name"), SITUATIONS)


def build(kind: str, name: str) -> Situation:
    return situation(case_named(name)) if kind == "last" else situation(named(name), written=kind == "written")


@everywhere
def test_products_are_those_of_jacobians(kind, name):
    here = build(kind, name)
    found, J, Z = jacobian(here.inputs, F64), here.J, here.Z
    directions = torch.randn(3, J.shape[-1])
    weights = torch.randn(2, *J.shape[:2])
    assert_close(found.times(directions), J @ directions.T, "J v")
    assert_close(found.combine(weights), torch.einsum("ncp,vnc->vp", J, weights), "Jᵀ u")
    assert_close(found.cross(here.points), J @ Z.T, "J Zᵀ")
    kernel = J.flatten(0, 1) @ J.flatten(0, 1).T
    assert_close(found.joint(), kernel, "J Jᵀ across rows")
    assert_close(found.covariance(), J @ J.mT, "J Jᵀ")
    assert_close(found.variance(), (J @ J.mT).diagonal(dim1=1, dim2=2), "its diagonal")


@everywhere
def test_points_are_rows_of_the_jacobian(kind, name):
    here = build(kind, name)
    weights = torch.randn(3, len(here.Z))
    assert here.points.n_points == len(here.Z)
    assert_close(here.points.gram(), here.Z @ here.Z.T, "kernel")
    assert_close(here.points.combine(weights), weights @ here.Z, "combinations")


@everywhere
def test_written_jacobians_give_the_same(kind, name):
    here = build(kind, name)
    blocks = one_output(here.inputs, torch.zeros(len(here.inputs.f), dtype=torch.long), F64)
    parts = here.J.transpose(0, 1).split([block.n_params for block in blocks], -1)
    written = StoredDerivatives([DenseBlock(part) for part in parts])
    found, expected = Jacobian(NetworkLinearization(here.J[..., 0], written), F64), jacobian(here.inputs, F64)
    for method in ("variance", "covariance", "joint"):
        assert_close(getattr(found, method)(), getattr(expected, method)(), method)
    assert_close(found.cross(here.points), expected.cross(here.points))


def test_pairs_are_differences():
    case = case_named("preferences")
    x = case.data(n_rows=3, shift=2)[0]
    inputs = compare(last_layer(case, x))
    J = case.problem().jacobian(x).flatten(1, 2)
    J = torch.stack([J[:, 0] - J[:, 1], torch.zeros_like(J[:, 0])], 1)
    found = jacobian(inputs, F64)
    directions = torch.randn(3, J.shape[-1])
    assert_close(found.times(directions), J @ directions.T)
    assert_close(found.covariance(), J @ J.mT)
    assert_close(found.variance(), J.square().sum(-1))
    assert_close(found.joint(), J.flatten(0, 1) @ J.flatten(0, 1).T)


def test_points_of_a_back_end_without_directions_are_the_same():
    network = named("mlp")
    x = network.data(n_rows=4, shift=3)[0]
    inputs, whole = whole_network(network, x, written=True), whole_network(network, x)
    columns = columns_for(inputs.f)

    class OneByOne:
        """Only what every back end gives."""

        n_columns_at_once = 2
        columns = inputs.derivatives.columns

    slow = NetworkLinearization(inputs.f, OneByOne(), inputs.evaluate, inputs.theta)
    for ours, theirs in zip(one_output(slow, columns, F64), one_output(whole, columns, F64), strict=True):
        assert_close(ours.dense(), theirs.dense())


def test_kernels_in_factors_need_no_memory_of_jacobians():
    model = torch.nn.Sequential(torch.nn.Linear(500, 500), torch.nn.Tanh(), torch.nn.Linear(500, 3))
    derivatives = AutogradGGN(model, "classification").derivatives(torch.randn(40, 500))
    one_hot = torch.nn.functional.one_hot(torch.arange(40) % 3, 3).to(F64)
    inputs = NetworkLinearization(derivatives.f, derivatives, lambda theta: theta, torch.zeros(()))
    with LargestTensor() as largest:
        blocks = one_output(inputs, one_hot.argmax(1), F64)
        kernel = product(blocks, blocks)[0, :, 0]
    assert kernel.shape == (40, 40)
    assert largest.numel < 252003, largest.operation  # one row of J: 40 of them are never written out


def test_a_last_layer_needs_no_matrix_over_outputs():
    C, n, width, M = 300, 20, 5, 6
    inputs, at = (of_head(torch.zeros(rows, C), torch.randn(rows, width)) for rows in (n, M))
    with LargestTensor() as largest:
        found, blocks = jacobian(inputs, F64), one_output(at, columns_for(at.f), F64)
        points = InducingPoints([lambda: blocks], [M])
        found.cross(points), found.variance(), found.times(torch.randn(2, C * (width + 1)))
        points.gram(), points.combine(torch.randn(2, M))
    assert largest.numel <= n * C * M, largest.operation


def test_other_linearizations_are_refused():
    whole = whole_network(named("mlp"), named("mlp").data()[0])
    without = NetworkLinearization(whole.f, None, whole.evaluate, whole.theta)
    with pytest.raises(UnsupportedError, match="no derivatives"):
        jacobian(without, F64)
