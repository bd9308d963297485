"""Products of derivatives at two sets of inputs, in factors, against the derivatives written out."""

import pytest
import torch

from laplace import linalg
from laplace.structures.jacobian import DenseBlock, JacobianBlock
from tests.gp.samples import WHOLE, whole_network
from tests.networks import named
from tests.tools import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def blocks(name: str, n_rows: int, columns: slice, shift: int) -> list[JacobianBlock]:
    network = named(name)
    inputs = whole_network(network, network.data(n_rows=n_rows, shift=shift)[0])
    return inputs._blocks(torch.float64, columns.start, columns.stop)


@pytest.mark.parametrize("name", [*WHOLE, "attention", "conv_transpose1d", "two_convolutions", "tied_embedding"])
@pytest.mark.parametrize("limited", [False, True])
def test_cross_products_are_those_of_written_derivatives(name, limited, monkeypatch):
    first, second = blocks(name, 3, slice(0, 3), 2), blocks(name, 2, slice(1, 3), 3)
    if limited:
        for module in ("jacobian", "product"):
            monkeypatch.setattr(f"laplace.structures.{module}.piece_elements", lambda device: 1)
    for a, b in zip(first, second, strict=True):
        truth = torch.einsum("qbp,kzp->qbkz", a.dense(), b.dense())
        assert_close(a.cross(b), truth)
        assert_close(b.cross(a), truth.permute(2, 3, 0, 1), "the other way round")
        assert_close(a.cross(DenseBlock(b.dense())), truth, "with a block of another kind")
        assert_close(DenseBlock(a.dense()).cross(b), truth, "with a block of another kind")


def test_a_wide_layer_with_one_position_writes_no_weights(monkeypatch):
    model = torch.nn.Linear(300, 200)
    from laplace.curvature import AutogradGGN

    backend = AutogradGGN(model, "regression")
    derivatives = backend.derivatives(torch.randn(3, 300))
    weight, _ = derivatives.columns(torch.eye(200)[:2])

    def forbidden(*_):
        raise AssertionError("written out")

    monkeypatch.setattr(type(weight), "piece", forbidden)
    assert weight.cross(weight).shape == (2, 3, 2, 3)
    assert linalg.piece_elements(torch.device("cpu")) > 0
