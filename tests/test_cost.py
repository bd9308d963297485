"""What fitting and predicting cost: no Jacobian, no covariance that nobody asked for, one pass of the model."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradEF
from tests.contracts import generator
from tests.estimators import PREDICTIONS, basic_cases, estimator, every_structure
from tests.tools import LargestTensor, assert_close


def wide(rows: int, n_features: int, n_outputs: int, likelihood: str):
    model = nn.Sequential(nn.Linear(4, n_features), nn.ReLU(), nn.Linear(n_features, n_outputs)).float()
    noise = generator(0)
    x = torch.randn(rows, 4, generator=noise).float()
    y = (
        torch.randint(n_outputs, (rows,), generator=noise)
        if likelihood == "classification"
        else torch.randn(rows, n_outputs).float()
    )
    return model, x, y


@pytest.mark.every(2)
@every_structure
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("backend", [None, AutogradEF], ids=["GGN", "EF"])
def test_no_jacobian_is_ever_built(structure, likelihood, backend):
    """No tensor of rows x outputs x weights, in fit and in every kind of prediction."""
    rows, n_features, n_outputs = 32, 10, 9
    model, x, y = wide(rows, n_features, n_outputs, likelihood)
    la = Laplace(model, likelihood, hessian_structure=structure, backend=backend)
    jacobian = rows * n_outputs * n_outputs * (n_features + 1)
    with LargestTensor() as largest:
        la.fit([(x, y)])
        for options in PREDICTIONS[likelihood]:
            la(x, **{"n_samples": 20, **options})
        la.functional_variance_fast(x)
        la.functional_samples(x, n_samples=20)
        la.log_marginal_likelihood()
    # The joint covariance of regression is a result of its own size; the dense posterior another.
    allowed = max((rows * n_outputs) ** 2, (n_outputs * (n_features + 1)) ** 2)
    assert largest.numel <= max(allowed, jacobian - 1)
    with LargestTensor() as largest:
        la.fit([(x, y)])
        la(x)
        la(x, diagonal_output=True)
        la.functional_variance_fast(x)
    assert largest.numel < jacobian, largest.operation


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_a_thousand_classes_need_no_covariance_of_them(structure):
    """C = 1000, D = 1280 (an ImageNet head): nothing of rows x C x C, in fit and in the probit prediction."""
    rows, n_features, n_outputs = 2, 1280, 1000
    model, x, y = wide(rows, n_features, n_outputs, "classification")
    la = Laplace(model, "classification", hessian_structure=structure)
    with LargestTensor() as largest:
        la.fit([(x, y)])
        probabilities = la(x)
        la.functional_variance_fast(x)
    assert_close(probabilities.sum(-1), torch.ones(rows))
    assert largest.numel < rows * n_outputs**2, largest.operation


@every_structure
@basic_cases
def test_fit_and_predict_run_the_model_once_a_batch(case, structure):
    model, calls = case.model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    la = estimator(case, structure, model, last_layer_name="head")
    la.fit(case.batches(4, 4))
    assert len(calls) == 3
    for options in PREDICTIONS[case.likelihood]:
        calls.clear()
        la(case.test_inputs(), **options)
        assert len(calls) == 1, options
