"""Objects whose head `tune` fitted again: everything is taken at it; and objects whose head stays."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import InputError, UnsupportedError
from tests.baselaplace import recipes
from tests.baselaplace.recipes import classification, head_vector, regression, tuned
from tests.cases import BASIC, named
from tests.contracts import generator
from tests.estimators import dense, every_structure, fitted
from tests.tools import assert_close

near = torch.testing.assert_close

NARROW = {"distance_aware": False}


@every_structure
def test_everything_is_taken_at_the_chosen_head(structure):
    data = classification()
    la = tuned(data, structure)
    other = copy.deepcopy(data.model)
    other.head.load_state_dict(la.head_.state_dict())
    again = Laplace(other, "classification", hessian_structure=structure)
    again.fit(data.train)
    near(dense(la.H), dense(again.H), rtol=1e-8, atol=1e-8)
    assert_close(la.loss, again.loss)
    for name in ("prior_precision", "output_temperature"):
        setattr(again, name, getattr(la, name))
    assert_close(la.log_marginal_likelihood(), again.log_marginal_likelihood())
    la.distance_scale, la.weight_uncertainty = 0, True
    assert_close(la(data.test), again(data.test))
    near(la.sample(3, generator=generator(0)), again.sample(3, generator=generator(0)), rtol=1e-6, atol=1e-6)
    assert not torch.equal(la.mean, head_vector(data.model))


def test_a_second_call_starts_from_the_model_and_finds_the_same():
    data = classification()
    la = tuned(data)
    first = la.mean, la.output_temperature, la.distance_scale, la.tuning_.value
    la.tune(data.val)
    near(la.mean, first[0], rtol=1e-6, atol=1e-6)
    assert first[1:] == pytest.approx((la.output_temperature, la.distance_scale, la.tuning_.value), rel=1e-6)
    la.tune(data.val, refit=False)
    assert_close(la.mean, head_vector(data.model))


def test_assigning_hyperparameters_keeps_the_head_and_fitting_again_does_not():
    data = classification()
    la = tuned(data)
    head = la.mean
    la.prior_precision = 3.0
    assert torch.equal(la.mean, head)
    for method in ("marglik", "gridsearch"):
        temperature, scale = la.output_temperature, la.distance_scale
        with pytest.warns(UserWarning, match="leave the posterior's variance out"):
            la.optimize_prior_precision(method=method, val_loader=data.val)
        assert not la.weight_uncertainty
        assert torch.equal(la.mean, head)
        assert (la.output_temperature, la.distance_scale) == (temperature, scale)
    with pytest.warns(UserWarning, match="fit starts from the head of the model"):
        la.fit(data.train)
    assert_close(la.mean, head_vector(data.model))
    assert (la.distance_scale, la.output_temperature, la.weight_uncertainty) == (0, 1.0, True)


def test_more_data_are_added_at_the_chosen_head():
    data = classification()
    la = tuned(data, "full")
    with pytest.warns(UserWarning, match=r"Call tune\(val_loader\) again"):
        la.fit(data.val, override=False)
    assert la.distance_scale == 0
    other = copy.deepcopy(data.model)
    other.head.load_state_dict(la.head_.state_dict())
    both = Laplace(other, "classification", hessian_structure="full")
    both.fit(data.train + data.val)
    assert_close(la.H, both.H)
    assert_close(la.loss, both.loss)
    la.tune(data.val)  # on the features of both
    assert any("150 rows" in note for note in la.tuning_.notes)


@pytest.mark.slow
def test_states_and_copies_predict_the_same_and_hold_no_data():
    data = classification()
    x = torch.cat([data.test, 4 * data.test])
    for average in ("parameters", "mixture"):
        la = tuned(data, average=average)
        la.distance_scale = 3.0
        other = Laplace(data.model, "classification")
        other.load_state_dict(la.state_dict())
        for same in (other, pickle.loads(pickle.dumps(la)), copy.deepcopy(la)):
            assert torch.equal(same(x), la(x))
            assert torch.equal(same.ood_score(x), la.ood_score(x))
            assert torch.equal(same.mean, la.mean)
            with pytest.raises(UnsupportedError, match="starts from the head of the model"):
                same.tune(data.val)
            same.tune(data.val, data.train)
            assert_close(same.mean, la.mean)


# -- what is left as it is ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The best .* stays at its limits")
def test_what_cannot_be_refitted_says_why():
    case = named("preferences")
    la = fitted(case, "diag")
    x, y = case.data(n_rows=60, shift=3)
    la.tune([(x, y)])
    assert any("compare two inputs" in note for note in la.tuning_.notes)
    with pytest.raises(UnsupportedError, match="refit=True is not possible"):
        la.tune([(x, y)], refit=True)
    data = classification()
    la = Laplace(data.model, "classification", "all", "diag")
    la.fit(data.train)
    la.tune(data.val)
    assert la.distance_scale > 0
    assert_close(la.mean, torch.cat([p.detach().flatten() for p in data.model.parameters()]))
    with pytest.raises(UnsupportedError, match="last_layer"):
        la.tune(data.val, refit=True)


def test_an_assigned_mean_is_what_predicts():
    data = classification()
    for average in ("parameters", "mixture"):
        la = tuned(data, average=average)
        la.mean = torch.zeros_like(la.mean)
        assert_close(la(data.test), torch.full((7, 3), 1 / 3))


def test_a_head_that_goes_takes_its_temperature_along():
    data = classification()
    grid = {"train_loader": data.train, "grid_size": 5}
    fresh, la = Laplace(data.model, "classification", hessian_structure="full"), tuned(data, "full")
    fresh.fit(data.train)
    for options in ({"method": "loo"}, {"method": "loo", "refit": False}, {"method": "elbo"}):
        fresh.optimize_prior_precision(**options, **grid)
        la.tune(data.val)
        la.optimize_prior_precision(**options, **grid)
        assert la.output_temperature == fresh.output_temperature == 1
        assert la.weight_uncertainty == fresh.weight_uncertainty
        assert_close(la.prior_precision, fresh.prior_precision)
        assert_close(la(data.test), fresh(data.test))


def test_counts_keep_the_posteriors_variance():
    data = classification()
    model = nn.Sequential(data.model.body, nn.Linear(recipes.D, 1).double())
    loaders = [[(x, y.double()[:, None]) for x, y in loader] for loader in (data.train, data.val)]
    la = Laplace(model, "poisson")
    la.fit(loaders[0])
    la.tune(loaders[1])
    assert (la(data.test)[1] > 0).all()


def test_functions_of_processes_are_tuned_as_before():
    data = classification()
    la = Laplace(data.model, "classification", hessian_structure="gp", n_subset=20)
    la.fit(data.train)
    with pytest.warns(UserWarning, match="best without weight uncertainty"):
        la.tune(data.val)
    for options in ({"refit": True}, {"distance_aware": True}, {"average": "mixture"}):
        with pytest.raises(UnsupportedError, match="posterior over functions"):
            la.tune(data.val, **options)


def test_all_weights_see_the_same_features():
    data = classification()
    la = Laplace(data.model, "classification", "all", "kron")
    la.fit(data.train)
    last = tuned(data)
    x = 4 * data.test
    assert_close(la.ood_score(x, "density"), last.ood_score(x, "density"))
    la.tune(data.val)
    s2 = la.distance_scale
    assert s2 > 0
    wide = la(x)
    la.distance_scale = 0
    assert (wide.max(-1).values <= la(x).max(-1).values + 1e-9).all()


@pytest.mark.every(4, each_value=False)
@pytest.mark.parametrize(
    "name", ["soft_labels", "masked_positions", "poisson", "negative_binomial", "binary", "multilabel"]
)
def test_other_targets_are_refitted_too(name):
    case = (
        next(case for case in [*BASIC, named("soft_labels"), named("masked_positions")] if case.name == name)
        if name in ("soft_labels", "masked_positions")
        else None
    )
    if case is None:
        data = classification()
        model = nn.Sequential(data.model.body, nn.Linear(recipes.D, 1).double())
        loaders = [
            [
                (x, (y > 0).double()[:, None] if name in ("binary", "multilabel") else y.double()[:, None])
                for x, y in loader
            ]
            for loader in (data.train, data.val)
        ]
        la = Laplace(model, name)
        la.fit(loaders[0])
        la.tune(loaders[1])
    else:
        la = fitted(case, "kron")
        x, y = case.data(n_rows=40, shift=3)
        la.tune([case.batch(x, y)])
    assert any("Heads refitted" in note for note in la.tuning_.notes)
    assert math.isfinite(la.tuning_.value)


@pytest.mark.slow
def test_layerwise_precisions_are_refined_with_the_head_fixed():
    data = classification()
    one = tuned(data)
    la = tuned(data, prior_structure="layerwise")
    assert_close(la.mean, one.mean)
    assert la.output_temperature == pytest.approx(one.output_temperature)


def test_options_that_do_not_exist_are_refused():
    la = fitted(BASIC[0], "diag")
    x, y = BASIC[0].data()
    for options in ({"average": "median"}, {"average": True}):
        with pytest.raises(UnsupportedError, match="'parameters', 'mixture' or False"):
            la.tune([(x, y)], **options)
    with pytest.raises(InputError, match="max_rows"):
        la.tune([(x, y)], max_rows=0)
    with pytest.raises(InputError, match="refit"):
        la.tune([(x, y)], refit="yes")
    with pytest.raises(UnsupportedError, match="averages probabilities"):
        tuned(regression(), likelihood="regression", average="mixture")
