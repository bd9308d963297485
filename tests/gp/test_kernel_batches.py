"""What is kept of a subset, in how many batches, and what a state can hold."""

import pickle

import pytest
import torch

from laplace.errors import UnsupportedError
from laplace.gp import kernel as room
from laplace.gp.kernel import SubsetKernel
from tests.gp.samples import F64
from tests.gp.subsets import M, sample
from tests.tools import LargestTensor, assert_close


@pytest.mark.parametrize("kind", ["whole", "separate"])
def test_derivatives_that_are_not_kept_are_made_again(kind, monkeypatch):
    here = sample(kind, "positions")
    root = here.roots(diagonal=kind == "separate")
    expected, cross = here.kernel.gram(root), here.kernel.cross(here.inputs, F64)
    assert len(here.kernel._kept) == 2
    monkeypatch.setattr(room, "KEPT_ELEMENTS", 0)
    again = sample(kind, "positions")
    assert_close(again.kernel.gram(root), expected)
    assert_close(again.kernel.cross(again.inputs, F64), cross)
    assert not again.kernel._kept


def test_batches_that_fit_together_are_joined():
    here = sample("whole", "mlp")
    joined, root = here.kernel.joined(M), here.roots(diagonal=False)
    assert joined.sizes == ((M, 1),)
    assert_close(joined.gram(root), here.kernel.gram(root))
    assert here.kernel.joined(M - 1).sizes == here.kernel.sizes


def test_inputs_of_different_shapes_stay_apart():
    here = sample("whole", "mlp").kernel
    other = SubsetKernel((torch.zeros(2, 4),), ((2, 1),), 3, here.n_params, False, F64, here.linearize)
    assert here.union(other).joined(100).sizes == ((M, 1), (2, 1))


def test_pickling_leaves_derivatives_behind():
    here = sample("whole", "mlp").kernel
    bare = SubsetKernel(here.batches, here.sizes, here.n_outputs, here.n_params, False, F64, print, _kept=here._kept)
    here.gram(torch.randn(M, 3, 2))
    assert here._kept
    assert not pickle.loads(pickle.dumps(bare))._kept


def test_a_state_refuses_inputs_that_are_no_plain_values():
    here = sample("whole", "mlp").kernel
    mixed = {"a": torch.ones(2, 1), "b": (torch.zeros(2), "text", None)}
    kernel = SubsetKernel((mixed,), ((2, 1),), 3, here.n_params, False, F64, here.linearize)
    assert kernel.state()["inputs"][0]["b"][1:] == ["text", None]
    odd = SubsetKernel((object(),), ((2, 1),), 3, here.n_params, False, F64, here.linearize)
    with pytest.raises(UnsupportedError, match="hold a object"):
        odd.state()


def test_no_tensor_is_as_large_as_the_jacobians():
    here = sample("whole", "conv2d")
    largest = LargestTensor()
    with largest:
        here.kernel.gram(here.roots(diagonal=False))
    assert largest.numel < here.J.numel(), largest.operation
