"""The fit loop and the posterior."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace.curvature import AutogradEF
from laplace.errors import InputError, NotFittedError
from tests import reference
from tests.cases import CASES, named, stream, tensor_loader
from tests.contracts import generator, model_untouched
from tests.estimators import additive_structures, basic_cases, dense, estimator, every_structure, fitted, posterior
from tests.tools import assert_close, assert_covariance_of

SPLIT_CASES = pytest.mark.parametrize(
    "case", [*CASES[:2], named("masked_positions"), named("positions_regression"), named("soft_labels")], ids=str
)
BACKENDS = pytest.mark.parametrize("options", [{}, {"backend": AutogradEF}], ids=["GGN", "EF"])


def same_fit(la, other) -> None:
    assert_close(dense(la.posterior_precision), dense(other.posterior_precision), "posterior precision")
    assert_close(torch.as_tensor(la.loss), torch.as_tensor(other.loss), "loss")
    assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood(), "evidence")
    assert la.n_data == other.n_data


@pytest.mark.every(5)
@BACKENDS
@every_structure
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fit_is_exact(case, structure, options):
    la, fisher = fitted(case, structure, **options), bool(options)
    problem = case.problem()
    assert_close(dense(la.H), problem.curvature(structure, fisher=fisher), "H")
    assert_close(dense(la.posterior_precision), posterior(case, structure, fisher=fisher), "posterior precision")
    assert_close(torch.as_tensor(la.loss), problem.nll(), "loss")
    assert_close(la.mean, problem.theta(), "mean")
    assert (la.n_data, la.n_outputs, la.n_params, la.n_layers) == (
        len(case.data()[1]), case.n_outputs, len(problem.theta()), len(case.names),
    )  # fmt: skip


@every_structure
@basic_cases
def test_any_iterable_of_batches_can_be_fitted(case, structure):
    expected = fitted(case, structure)
    for loader in (
        tensor_loader(case, 4),
        case.batches(1, 3),
        tuple(case.batches(5)),
        stream(case.batches(2, 2)),
        iter(case.batches(4)),
    ):
        la = estimator(case, structure)
        la.fit(loader)
        same_fit(la, expected)


@pytest.mark.every(4)
@BACKENDS
@every_structure
@SPLIT_CASES
def test_fit_does_not_depend_on_batches_or_order(case, structure, options):
    expected = fitted(case, structure, **options)
    x, y = case.data()
    order = torch.randperm(len(y), generator=generator(0)).tolist()
    shuffled = case.batch(reference.rows_of(x, order), y[order])
    for batches in ([shuffled], case.batches(*[1] * len(y)), case.batches(2, 1, 1)):
        la = estimator(case, structure, **options)
        la.fit(batches)
        same_fit(la, expected)


@BACKENDS
@additive_structures
@SPLIT_CASES
def test_two_halves_without_override_equal_one_call(case, structure, options):
    la = estimator(case, structure, **options)
    first, *rest = case.batches(3, 1)
    la.fit([first])
    la.log_marginal_likelihood()  # whatever is cached must be dropped
    la.fit(rest, override=False)
    same_fit(la, fitted(case, structure, **options))


@every_structure
@basic_cases
def test_override_starts_again(case, structure):
    la = fitted(case, structure)
    la.fit(case.batches(3)[:1])
    la.fit(case.batches(1, 3))
    same_fit(la, fitted(case, structure))
    fresh = estimator(case, structure)
    fresh.fit(case.batches(1, 3), override=False)
    same_fit(fresh, la)


@every_structure
def test_only_rows_that_were_seen_count(structure):
    case = CASES[1]
    la = estimator(case, structure)
    la.fit(tensor_loader(case, 4, drop_last=True))
    assert la.n_data == 8
    seen = estimator(case, structure)
    seen.fit(case.batches(4, 4)[:2])
    same_fit(la, seen)


@additive_structures
@basic_cases
def test_data_only_add_precision(case, structure):
    """More data: no marginal variance grows."""
    la = estimator(case, structure)
    first, *rest = case.batches(3)
    la.fit([first])
    before = dense(la.posterior_precision).inverse().diagonal()
    la.fit(rest, override=False)
    assert bool((dense(la.posterior_precision).inverse().diagonal() <= before + 1e-12).all()) or structure == "kron"


@every_structure
@basic_cases
def test_a_fit_that_fails_changes_nothing(case, structure):
    model = case.model()
    la = fitted(case, structure, model)
    expected = fitted(case, structure)
    good = case.batches(3)
    for bad, error in (((good[0][0], good[0][1][:1]), ValueError), ("nonsense", InputError)):
        with model_untouched(model), pytest.raises(error):
            la.fit([good[0], bad])
        same_fit(la, expected)


@every_structure
def test_an_empty_loader_is_an_error(structure):
    with pytest.raises(InputError, match=r"empty|no batch"):
        estimator(CASES[0], structure).fit([])


@every_structure
@pytest.mark.parametrize("case", [named("conv_classification"), named("conv_regression")], ids=str)
def test_dropout_and_batch_statistics_are_off_while_fitting_and_predicting(case, structure):
    model = case.model().train()
    with model_untouched(model):
        la = fitted(case, structure, model)
        prediction = la(case.test_inputs())
    expected = fitted(case, structure)
    same_fit(la, expected)
    for ours, theirs in zip(prediction, expected(case.test_inputs()), strict=True):
        assert_close(ours, theirs)


@every_structure
@basic_cases
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_fit_and_predict_work_without_autograd(case, structure, mode):
    with mode():
        la = fitted(case, structure)
        prediction = la(case.test_inputs())
    same_fit(la, fitted(case, structure))
    assert prediction is not None
    delta = torch.tensor([2.0], requires_grad=True)
    la.log_marginal_likelihood(delta).backward()
    assert delta.grad.abs().max() > 0


@every_structure
def test_a_progress_bar_is_shown_on_request(structure, capsys):
    la = estimator(CASES[0], structure)
    la.fit(CASES[0].batches(3))
    assert capsys.readouterr().err == ""
    la.fit(CASES[0].batches(3), progress_bar=True)
    assert "it/s" in capsys.readouterr().err


@every_structure
@basic_cases
def test_frozen_weights_can_be_random(case, structure):
    model = case.model().requires_grad_(False)
    same_fit(fitted(case, structure, model), fitted(case, structure))


# -- the posterior ----------------------------------------------------------------------------------------------------


@every_structure
@basic_cases
def test_samples_of_the_weights_have_the_posterior_as_their_distribution(case, structure):
    la = fitted(case, structure, prior_precision=2.0)
    samples = la.sample(20_000, generator(0))
    assert samples.shape == (20_000, la.n_params)
    assert_covariance_of(samples, case.problem().theta(), posterior(case, structure, delta=2.0).inverse())


@every_structure
@basic_cases
def test_samples_are_reproducible(case, structure):
    la = fitted(case, structure)
    assert la.sample().shape == (100, la.n_params)
    assert torch.equal(la.sample(5, generator(1)), la.sample(5, generator=generator(1)))
    assert not torch.equal(la.sample(5, generator(1)), la.sample(5, generator(2)))


@every_structure
@basic_cases
def test_log_prob_is_the_density_of_the_posterior(case, structure):
    la = fitted(case, structure)
    precision, theta = posterior(case, structure), case.problem().theta()
    value = theta + 0.1 * torch.randn(len(theta), generator=generator(0))
    density = torch.distributions.MultivariateNormal(theta, precision_matrix=precision)
    assert_close(la.log_prob(value), density.log_prob(value))
    shift = value - theta
    assert_close(la.square_norm(value), shift @ precision @ shift)
    unnormalized = la.log_prob(value, normalized=False)
    assert_close(la.log_prob(theta, normalized=False) - unnormalized, 0.5 * shift @ precision @ shift)


@every_structure
def test_what_needs_a_fit_says_so(structure):
    case = CASES[1]
    la = estimator(case, structure)
    requests = {
        "call": lambda: la(case.test_inputs()),
        "nn": lambda: la(case.test_inputs(), pred_type="nn", link_approx="mc"),
        "functional_samples": lambda: la.functional_samples(case.test_inputs()),
        "predictive_samples": lambda: la.predictive_samples(case.test_inputs()),
        "sample": lambda: la.sample(2),
        "log_prob": lambda: la.log_prob(torch.zeros(12)),
        "square_norm": lambda: la.square_norm(torch.zeros(12)),
        "evidence": la.log_marginal_likelihood,
        "log_likelihood": lambda: la.log_likelihood,
        "scatter": lambda: la.scatter,
        "posterior_precision": lambda: la.posterior_precision,
        "log_det_posterior_precision": lambda: la.log_det_posterior_precision,
        "functional_variance": lambda: la.functional_variance(torch.zeros(1, 2, 12)),
        "functional_variance_fast": lambda: la.functional_variance_fast(case.test_inputs()),
        "optimize": lambda: la.optimize_prior_precision(),
    }
    said = {}
    for name, request in requests.items():
        try:
            request()
        except NotFittedError as error:
            said[name] = str(error)
    assert said.keys() == requests.keys()
    assert all("fit(" in message for message in said.values())


def test_a_data_set_of_tensors_may_hold_more_than_two():
    """(x1, x2, y) rows of a `TensorDataset` in a `DataLoader`."""
    case = named("two_inputs")
    (first, second), y = case.data()
    la = estimator(case, "full")
    la.fit(DataLoader(TensorDataset(first, second, y), batch_size=4))
    same_fit(la, fitted(case, "full"))
