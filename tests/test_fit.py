"""The result of fitting as a value."""

import pytest
import torch

from laplace.errors import InputError
from laplace.fit import Fit
from laplace.structures import DiagCurvature


def fit(n_params: int = 6, n_outputs: int = 2, *, value: float = 1.0) -> Fit:
    curvature = DiagCurvature(torch.full((n_params,), value))
    return Fit(torch.full((n_params,), value), curvature, torch.tensor(value), 3, 5, n_outputs)


def test_merging_adds_data_and_keeps_the_newest_weights():
    union = fit(value=1.0).merge(fit(value=2.0))
    assert union.curvature.vector.tolist() == [3.0] * 6
    assert (float(union.nll), union.n_data, union.n_positions, union.n_outputs) == (3.0, 6, 10, 2)
    assert union.mean.tolist() == [2.0] * 6


@pytest.mark.parametrize("other", [fit(n_params=4), fit(n_outputs=3)], ids=["other weights", "other outputs"])
def test_fits_of_different_models_do_not_merge(other):
    with pytest.raises(InputError, match="override=True"):
        fit().merge(other)
