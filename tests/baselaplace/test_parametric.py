"""Predictions and samples of fitted approximations."""

import pytest
import torch

from laplace import Laplace
from laplace.curvature import AutogradEF
from laplace.errors import InputError, UnsupportedError
from tests import reference
from tests.cases import BASIC, CASES, named
from tests.contracts import generator, model_untouched
from tests.estimators import basic_cases, every_structure, fitted, outputs_and_covariance, posterior
from tests.tools import assert_close, assert_covariance_of, assert_within

CLASSIFICATION = [case for case in CASES if case.likelihood == "classification"]
REGRESSION = [case for case in CASES if case.likelihood == "regression"]
classification_cases = pytest.mark.parametrize("case", CLASSIFICATION, ids=str)
regression_cases = pytest.mark.parametrize("case", REGRESSION, ids=str)
BACKENDS = pytest.mark.parametrize("options", [{}, {"backend": AutogradEF}], ids=["GGN", "EF"])


@pytest.mark.every(4)
@BACKENDS
@every_structure
@classification_cases
def test_class_probabilities_follow_the_closed_forms(case, structure, options):
    la, x = fitted(case, structure, **options), case.test_inputs()
    f, _, V = outputs_and_covariance(case, posterior(case, structure, fisher=bool(options)))
    mean = f.flatten(0, -2)
    assert_close(la(x), reference.probit(mean, V).reshape(f.shape), "probit by default")
    for link, expected in (
        ("probit", reference.probit(mean, V)),
        ("bridge", reference.bridge(mean, V)),
        ("bridge_norm", reference.bridge(mean, V, normalized=True)),
    ):
        probabilities = la(x, link_approx=link)
        assert_close(probabilities, expected.reshape(f.shape), link)
        assert_close(probabilities.sum(-1), torch.ones(f.shape[:-1]), link)


@pytest.mark.every(4)
@every_structure
@pytest.mark.parametrize("case", [BASIC[0], named("soft_labels"), named("conv_classification")], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"link_approx": "mc"}, {"link_approx": "mc", "joint": True}, {"pred_type": "nn"}, {"pred_type": "nn", "link_approx": "mc"}],
    ids=["mc", "joint", "nn", "nn with mc"],
)  # fmt: skip
def test_sampled_probabilities_converge_to_the_exact_integral(case, structure, options):
    la, n = fitted(case, structure), 4000
    f, _, V = outputs_and_covariance(case, posterior(case, structure))
    order = 40 if case.n_outputs < 4 else 20
    exact = reference.expected_softmax(f, V, order)
    probabilities = la(case.test_inputs(), n_samples=n, generator=generator(0), **options)
    assert_within(probabilities, exact, (exact * (1 - exact) / n).sqrt())
    assert_close(probabilities.sum(-1), torch.ones(len(f)))


@every_structure
def test_mc_with_diagonal_output_treats_logits_as_independent(structure):
    case, n = BASIC[0], 20_000
    la = fitted(case, structure)
    f, _, V = outputs_and_covariance(case, posterior(case, structure))
    exact = reference.expected_softmax(f, torch.diag_embed(V.diagonal(dim1=1, dim2=2)), 20)
    options = {"link_approx": "mc", "diagonal_output": True, "n_samples": n, "generator": generator(0)}
    assert_within(la(case.test_inputs(), **options), exact, (exact * (1 - exact) / n).sqrt())


@pytest.mark.every(4)
@BACKENDS
@every_structure
@regression_cases
def test_regression_predicts_mean_and_covariance(case, structure, options):
    la, x = fitted(case, structure, **options), case.test_inputs()
    precision = posterior(case, structure, fisher=bool(options))
    f, J, V = outputs_and_covariance(case, precision)
    mean, cov = la(x)
    assert_close(mean, f, "mean")
    assert_close(cov, V.reshape(*f.shape, -1), "covariance")
    mean, var = la(x, diagonal_output=True)
    assert_close(mean, f, "mean")
    assert_close(var, V.diagonal(dim1=1, dim2=2).reshape(f.shape), "variance")
    mean, joint = la(x, joint=True)
    assert_close(mean, f.flatten(), "joint mean")
    assert_close(joint, reference.joint_covariance(J, precision), "joint covariance")


@every_structure
@pytest.mark.parametrize("case", [BASIC[1], named("positions_regression"), named("squeezed_regression")], ids=str)
def test_weight_sampling_agrees_with_the_closed_form_of_a_linear_layer(case, structure):
    la, n = fitted(case, structure), 20_000
    f, _, V = outputs_and_covariance(case, posterior(case, structure))
    mean, var = la(case.test_inputs(), pred_type="nn", n_samples=n, generator=generator(0))
    V = V.diagonal(dim1=1, dim2=2).reshape(f.shape)
    assert_within(mean, f, (V / n).sqrt(), "mean")
    assert_within(var, V, V * (2 / (n - 1)) ** 0.5, "variance")


@pytest.mark.every(4)
@every_structure
@pytest.mark.parametrize("case", CASES, ids=str)
def test_functional_variances_are_those_of_the_jacobian(case, structure):
    la, precision = fitted(case, structure), posterior(case, structure)
    f, J, V = outputs_and_covariance(case, precision)
    assert_close(la.functional_variance(J), V)
    assert_close(la.functional_covariance(J), reference.joint_covariance(J, precision))
    mean, var = la.functional_variance_fast(case.test_inputs())
    assert_close(mean, f)
    assert_close(var, V.diagonal(dim1=1, dim2=2).reshape(f.shape))


# -- samples ----------------------------------------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("case", [*BASIC, named("masked_positions"), named("squeezed_regression")], ids=str)
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_functional_samples_have_the_joint_distribution_of_the_outputs(case, structure, pred_type):
    la, n, precision = fitted(case, structure), 10_000, posterior(case, structure)
    f, J, _ = outputs_and_covariance(case, precision)
    samples = la.functional_samples(case.test_inputs(), pred_type, n, generator=generator(0))
    assert samples.shape == (n, *f.shape)
    assert_covariance_of(samples.flatten(1), f.flatten(), reference.joint_covariance(J, precision))


@every_structure
def test_functional_samples_with_diagonal_output_have_independent_outputs(structure):
    case, n = BASIC[1], 10_000
    la = fitted(case, structure)
    f, _, V = outputs_and_covariance(case, posterior(case, structure))
    samples = la.functional_samples(case.test_inputs(), n_samples=n, diagonal_output=True, generator=generator(0))
    for row in range(len(f)):
        assert_covariance_of(samples[:, row], f[row], V[row].diagonal().diag())


@every_structure
@basic_cases
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_predictive_samples_are_functional_samples_after_the_link(case, structure, pred_type):
    la, x = fitted(case, structure), case.test_inputs()
    f = la.functional_samples(x, pred_type, 7, generator=generator(0))
    samples = la.predictive_samples(x, pred_type, 7, generator=generator(0))
    assert_close(samples, f.softmax(-1) if case.likelihood == "classification" else f)
    assert la.predictive_samples(x).shape == (100, *f.shape[1:])


@every_structure
@basic_cases
def test_every_random_path_is_reproducible_by_its_generator(case, structure):
    la, x = fitted(case, structure), case.test_inputs()
    paths = {
        "nn": lambda g: la(x, pred_type="nn", generator=g),
        "sample": lambda g: la.sample(5, generator=g),
        "functional": lambda g: la.functional_samples(x, generator=g),
        "functional diagonal": lambda g: la.functional_samples(x, diagonal_output=True, generator=g),
        "functional nn": lambda g: la.functional_samples(x, pred_type="nn", generator=g),
        "predictive": lambda g: la.predictive_samples(x, generator=g),
        "predictive nn": lambda g: la.predictive_samples(x, pred_type="nn", generator=g),
    }
    if case.likelihood == "classification":
        paths["mc"] = lambda g: la(x, link_approx="mc", generator=g)
        paths["mc joint"] = lambda g: la(x, link_approx="mc", joint=True, generator=g)
        paths["mc diagonal"] = lambda g: la(x, link_approx="mc", diagonal_output=True, generator=g)
    for name, path in paths.items():
        first, again, other = (path(generator(seed)) for seed in (0, 0, 1))
        pairs = [(first, again, other)] if isinstance(first, torch.Tensor) else zip(first, again, other, strict=True)
        for a, b, c in pairs:
            assert torch.equal(a, b), name
            assert not torch.equal(a, c), name
        state = torch.get_rng_state()
        path(generator(0))
        assert torch.equal(state, torch.get_rng_state()), f"{name} drew from the global generator"


# -- gradients to the inputs ------------------------------------------------------------------------------------------


@pytest.mark.every(4)
@every_structure
@pytest.mark.parametrize("case", [*BASIC, named("positions_regression"), named("average")], ids=str)
def test_predictions_are_differentiable_in_the_inputs_on_request(case, structure):
    la = fitted(case, structure, enable_backprop=True)
    x = case.data(n_rows=2, shift=2)[0].requires_grad_()
    options = [{}] if case.likelihood == "classification" else [{}, {"diagonal_output": True}, {"joint": True}]
    if case.likelihood == "classification":
        options += [{"link_approx": "bridge"}, {"link_approx": "bridge_norm"}]
    requests = [lambda x, chosen=chosen: la(x, **chosen) for chosen in options]
    requests += [
        la.functional_variance_fast,
        lambda x: la.functional_samples(x, n_samples=2, generator=generator(0)),
        lambda x: la(x, pred_type="nn", n_samples=3, generator=generator(0)),
    ]
    for request in requests:
        assert torch.autograd.gradcheck(request, (x,), fast_mode=True)


@every_structure
@basic_cases
def test_predictions_carry_no_graph_unless_asked_and_can_be_switched(case, structure):
    la, x = fitted(case, structure), case.test_inputs().requires_grad_()

    def tracked() -> set[bool]:
        result = la(x)
        return {t.requires_grad for t in ((result,) if isinstance(result, torch.Tensor) else result)}

    assert tracked() == {False}
    la.enable_backprop = True
    assert tracked() == {True}
    la.enable_backprop = False
    assert tracked() == {False}


@every_structure
@basic_cases
def test_differentiable_predictions_leave_no_gradient_on_the_model(case, structure):
    model = case.model()
    la = fitted(case, structure, model, enable_backprop=True)
    x = case.test_inputs().requires_grad_()
    with model_untouched(model):
        result = la(x)
        torch.autograd.grad((result if isinstance(result, torch.Tensor) else result[1]).square().sum(), x)


# -- limits and refusals ----------------------------------------------------------------------------------------------


@every_structure
@basic_cases
def test_a_strong_prior_predicts_what_the_network_does(case, structure):
    la = fitted(case, structure, prior_precision=1e12)
    with torch.no_grad():
        f = case.forward(case.model(), case.test_inputs())
    result = la(case.test_inputs())
    assert_close(
        result if case.likelihood == "classification" else result[0],
        f.softmax(-1) if case.likelihood == "classification" else f,
    )


EVERY_LINK = ({}, {"link_approx": "mc"}, {"link_approx": "bridge"}, {"link_approx": "bridge_norm"}, {"pred_type": "nn"})


@every_structure
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [10.0, 30.0, 100.0, 1e4])
def test_confident_networks_still_predict_probabilities(structure, dtype, size):
    """Logits of this size: the curvature of most data is far below the rounding of its parts."""
    case, model = BASIC[0], BASIC[0].model()
    with torch.no_grad():
        model.head.weight.mul_(size)
    model.to(dtype)
    la = Laplace(model, case.likelihood, hessian_structure=structure, prior_precision=0.1)
    la.fit([(x.to(dtype), y) for x, y in case.batches(4, 4)])
    assert bool(torch.isfinite(la.log_marginal_likelihood()))
    for options in EVERY_LINK:
        probabilities = la(case.test_inputs().to(dtype), **options)
        assert probabilities.dtype == dtype
        assert bool(torch.isfinite(probabilities).all()), options
        assert_close(probabilities.sum(-1), torch.ones(4))


def test_predictive_is_the_call_by_position():
    case = BASIC[0]
    la = fitted(case, "kron")
    assert_close(la.predictive(case.test_inputs(), "glm", "bridge", 10), la(case.test_inputs(), link_approx="bridge"))


@pytest.mark.parametrize(
    ("likelihood", "options", "says"),
    [
        ("classification", {"pred_type": "gp"}, "gp"),
        ("classification", {"pred_type": "glm2"}, "'glm', 'nn'"),
        ("classification", {"link_approx": "softmax"}, "'probit', 'mc', 'mf1', 'mf2', 'bridge', 'bridge_norm'"),
        ("classification", {"joint": True}, 'link_approx="mc"'),
        ("classification", {"link_approx": "bridge", "pred_type": "nn"}, "glm"),
        ("classification", {"link_approx": "bridge", "diagonal_output": True}, "covariances"),
        ("classification", {"fitting": True}, "reward"),
        ("regression", {"link_approx": "bridge"}, "regression"),
        ("regression", {"joint": True, "diagonal_output": True}, "one of them"),
        ("regression", {"joint": True, "pred_type": "nn"}, "glm"),
    ],
)
def test_options_that_do_not_go_together_are_refused(likelihood, options, says):
    case = BASIC[likelihood == "regression"]
    with pytest.raises(UnsupportedError, match=says):
        fitted(case, "diag")(case.test_inputs(), **options)


@pytest.mark.parametrize("n_samples", [0, -3, 2.5, True])
def test_numbers_of_samples_are_positive_whole_numbers(n_samples):
    case = BASIC[0]
    la = fitted(case, "diag")
    for request in (
        lambda: la(case.test_inputs(), link_approx="mc", n_samples=n_samples),
        lambda: la.sample(n_samples),
        lambda: la.functional_samples(case.test_inputs(), n_samples=n_samples),
    ):
        with pytest.raises(InputError, match="n_samples"):
            request()
