"""Products of derivatives at two sets of inputs, in factors, against the derivatives written out."""

import pytest
import torch
from torch import nn

from laplace import DiagLaplace, linalg
from laplace.predictive import NetworkLinearization
from laplace.structures import DiagPrecision
from laplace.structures.head_block import head_blocks, head_of
from laplace.structures.jacobian import DenseBlock, JacobianBlock
from tests.gp.samples import WHOLE, whole_network
from tests.networks import named
from tests.tools import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def blocks(name: str, n_rows: int, columns: slice, shift: int) -> list[JacobianBlock]:
    network = named(name)
    inputs = whole_network(network, network.data(n_rows=n_rows, shift=shift)[0])
    return inputs.blocks(torch.float64, columns.start, columns.stop)


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


@pytest.mark.parametrize("name", [*WHOLE, "attention", "conv_transpose1d", "two_convolutions", "tied_embedding"])
def test_what_is_compact_is_the_same_in_at_most_as_many_numbers(name):
    for block in blocks(name, 3, slice(0, 3), 2):
        compact = block.compact()
        assert compact.size <= block.size
        assert_close(compact.dense(), block.dense())
        w = torch.linspace(0.5, 1.5, block.n_params, dtype=torch.float64)
        assert_close(compact.variance(w), block.variance(w))
        assert_close(compact.covariance(w), block.covariance(w))


def test_convolutions_at_many_positions_are_kept_written_out():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 18 * 18, 3)).double()
    la = DiagLaplace(model, "regression")
    x = torch.randn(2, 1, 20, 20, dtype=torch.float64)
    la.fit([(x, torch.zeros(2, 3, dtype=torch.float64))])
    inputs = la._linearize(x)
    assert isinstance(inputs, NetworkLinearization)
    weight, bias, *head = inputs.blocks(torch.float64)
    found = inputs.kept(10**9)
    assert found is not None
    kept, size = found
    assert (
        size == sum(3 * 2 * block.n_params for block in (weight, bias)) + sum(b.size for b in head) + inputs.f.numel()
    )
    assert size < (weight.size + bias.size + sum(b.size for b in head)) / 2
    assert inputs.kept(size // 2) is None
    posterior = DiagPrecision(la.posterior_precision)
    assert_close(kept.variance(posterior, torch.float64), inputs.variance(posterior, torch.float64))


def test_views_of_a_head_undo_the_flattening():
    layer = nn.Linear(3, 2).double()
    vector = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])
    whole = head_of(head_blocks(torch.zeros(1, 3).double(), [(2, 3), (2,)]))
    weight, bias = whole.matrices(vector.expand(5, 8))
    assert_close(weight, layer.weight.detach().expand(5, 2, 3))
    assert_close(bias.squeeze(-1), layer.bias.detach().expand(5, 2))
    alone = head_of(head_blocks(torch.zeros(1, 3).double(), [(2, 3)]))
    (weight,) = alone.matrices(vector[:6])
    assert_close(weight, layer.weight.detach())
