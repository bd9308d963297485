"""Nothing is left behind on the user's model, and approximations do not share state."""

import copy
import pickle

import pytest
import torch

from laplace.curvature import AutogradEF
from tests.cases import ADDITIVE, CASES
from tests.contracts import model_untouched
from tests.estimators import (
    PREDICTIONS,
    basic_cases,
    estimator,
    every_structure,
    fitted,
)
from tests.tools import assert_close


@pytest.mark.every(10)
@every_structure
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_model_is_untouched(case, structure, training):
    model = case.model().train(training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    la = estimator(case, structure, model)
    with model_untouched(model):
        la.fit(case.batches(2, 3))
        la.fit(case.batches(2, 3), override=structure not in ADDITIVE)
        for options in PREDICTIONS[case.likelihood]:
            la(case.test_inputs(), **{"n_samples": 2, **options})
        la.sample(2)
        la.functional_samples(case.test_inputs(), n_samples=2)
        la.predictive_samples(case.test_inputs(), "nn", 2)
        la.optimize_prior_precision(n_steps=2)
        la.log_marginal_likelihood()


@every_structure
@basic_cases
def test_two_approximations_of_one_model_do_not_disturb_each_other(case, structure):
    model = case.model()
    first = fitted(case, structure, model)
    expected = first(case.test_inputs())
    second = fitted(case, structure, model, backend=AutogradEF, prior_precision=3.0)
    second(case.test_inputs())
    for ours, theirs in zip(first(case.test_inputs()), expected, strict=True):
        assert torch.equal(ours, theirs)


@every_structure
@basic_cases
def test_the_posterior_stays_where_it_was_fitted(case, structure):
    """Copies do not share state with the original, and later training moves the outputs, not the fitted mean."""
    model = case.model()
    la = fitted(case, structure, model)
    mean, twins = la.mean.clone(), [copy.deepcopy(la), pickle.loads(pickle.dumps(la))]
    with torch.no_grad():
        model.head.weight.add_(1.0)
    assert_close(la.mean, mean)
    expected = fitted(case, structure)
    for twin in twins:
        assert_close(twin.mean, mean)
        for ours, theirs in zip(twin(case.test_inputs()), expected(case.test_inputs()), strict=True):
            assert_close(ours, theirs)
