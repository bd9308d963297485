"""The border of inducing points; the rest is seen through VaLLA."""

import pytest
import torch

from laplace.baselaplace.inducing import checked_classes, choose_inducing, count_inducing
from laplace.errors import InputError, ShapeError
from laplace.network import Batch


def test_nested_inputs_are_counted_by_their_rows():
    x = torch.zeros(4, 2)
    for nested in (x, (x, [x]), {"input_ids": x}, [{"deep": (x,)}]):
        assert count_inducing(nested, None) == count_inducing(nested, 4) == 4
    with pytest.raises(ShapeError, match="holds 4 inputs"):
        count_inducing(x, 3)


def test_classes_are_copied():
    classes = torch.tensor([0, 1])
    checked = checked_classes(classes, 2)
    classes[0] = 5
    assert checked is not None
    assert checked.tolist() == [0, 1]
    assert checked_classes(None, 2) is None


def test_inputs_of_different_shapes_are_no_batch():
    batches = [Batch(torch.zeros(2, 3), torch.zeros(2)), Batch(torch.zeros(2, 5), torch.zeros(2))]
    with pytest.raises(InputError, match="different shapes"):
        choose_inducing("random", 4, iter(batches), 0)


def test_centers_keep_the_shape_of_inputs():
    batches = [Batch(torch.randn(4, 2, 3), torch.zeros(4))]
    assert choose_inducing("kmeans", 3, iter(batches), 0).shape == (3, 2, 3)
