"""Last-layer approximations: which layer, in which precision and device, and exact where theory says so."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from laplace import (
    BlockDiagLaplace,
    BlockDiagLLLaplace,
    DiagLaplace,
    DiagLLLaplace,
    EKFACLaplace,
    EKFACLLLaplace,
    FullLaplace,
    FullLLLaplace,
    KronLaplace,
    KronLLLaplace,
    Laplace,
    LLLaplace,
    LowRankLaplace,
    LowRankLLLaplace,
    ParametricLaplace,
)
from laplace.curvature import AutogradEF
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.network import FeatureExtractor
from tests import reference
from tests.cases import BASIC, EVERYTHING, Net, named
from tests.contracts import generator, model_untouched
from tests.estimators import (
    PREDICTIONS,
    basic_cases,
    dense,
    estimator,
    every_structure,
    evidence,
    fitted,
    outputs_and_covariance,
    posterior,
)
from tests.tools import assert_close

# -- the classes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "structure", "base"),
    [
        (FullLLLaplace, "full", FullLaplace),
        (KronLLLaplace, "kron", KronLaplace),
        (DiagLLLaplace, "diag", DiagLaplace),
        (BlockDiagLLLaplace, "blockdiag", BlockDiagLaplace),
        (EKFACLLLaplace, "ekfac", EKFACLaplace),
        (LowRankLLLaplace, "lowrank", LowRankLaplace),
    ],
)
@basic_cases
def test_the_classes_can_be_constructed_by_themselves(case, cls, structure, base):
    la = cls(case.model(), case.likelihood, **case.laplace_options(), **EVERYTHING.get(structure, {}))
    assert isinstance(la, (LLLaplace, base))
    assert issubclass(cls, LLLaplace)
    assert issubclass(cls, base)
    assert issubclass(cls, ParametricLaplace)
    la.fit(case.batches(4))
    assert_close(dense(la.posterior_precision), posterior(case, structure))


def test_recorded_arguments_can_be_given_by_position():
    """Positional order of the recorded interface, up to the last argument."""
    case, model = BASIC[1], BASIC[1].model()
    la = KronLLLaplace(
        model, "regression", 0.5, 2.0, 0.1, 3.0, True, None, "x", "y", AutogradEF, "head", True, {}, {}
    )  # fmt: skip
    assert (float(la.sigma_noise), float(la.prior_precision), float(la.prior_mean), la.temperature) == (
        0.5,
        2.0,
        0.1,
        3.0,
    )
    assert (la.enable_backprop, la.dict_key_x, la.dict_key_y, la.damping) == (True, "x", "y", True)
    assert la.model.last_layer is model.head
    la = DiagLLLaplace(model, "regression", 0.5, 2.0, 0.1, 3.0, False, None, "x", "y", AutogradEF, "head", {}, {})
    la.fit(case.batches(4))
    assert type(la.backend) is AutogradEF


# -- which layer ------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Two linear layers, a first head that runs and is not the last, and the head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())

    def forward(self, x):
        return self.head(self.body(x))


@every_structure
def test_the_last_layer_is_found_or_named(structure):
    case, model = BASIC[1], Deep().double()
    found, named_layer = (estimator(case, structure, model, last_layer_name=name) for name in (None, "head"))
    for la in (found, named_layer):
        la.fit(case.batches(4))
        assert la.model.last_layer is model.head
        assert_close(la.mean, parameters_to_vector(model.head.parameters()))
    assert_close(dense(found.posterior_precision), dense(named_layer.posterior_precision))


@every_structure
def test_a_wrong_layer_lists_the_candidates(structure):
    case, model = BASIC[1], Deep().double()
    with pytest.raises(UnsupportedError, match=r"no module 'fc'.*'head' \(4 → 2\).*'body.0' \(3 → 5\)"):
        estimator(case, structure, model, last_layer_name="fc")
    with pytest.raises(UnsupportedError, match=r"must be a torch\.nn\.Linear, .*; 'body\.1' is a Tanh"):
        estimator(case, structure, model, last_layer_name="body.1")
    la = estimator(case, structure, model, last_layer_name="body.2")
    with pytest.raises((UnsupportedError, ShapeError), match=r"'body\.2'"):
        la.fit(case.batches(4))


@every_structure
def test_a_feature_extractor_may_be_given_as_the_model(structure):
    case = named("average")
    extractor = FeatureExtractor(case.model(), "head", feature_reduction="average")
    la = Laplace(extractor, case.likelihood, hessian_structure=structure, **EVERYTHING.get(structure, {}))
    la.fit(case.batches(4))
    assert_close(dense(la.posterior_precision), posterior(case, structure))


@every_structure
def test_weights_of_a_parametrized_head_are_its_effective_weights(structure):
    """Weight normalization keeps other parameters than weight and bias: the layer computes with their product."""
    case, model = BASIC[1], BASIC[1].model()
    nn.utils.parametrizations.weight_norm(model.head)
    with model_untouched(model):
        la = fitted(case, structure, model)
        mean, _ = la(case.test_inputs())
    assert_close(la.mean, torch.cat([model.head.weight.flatten(), model.head.bias]))
    assert_close(dense(la.posterior_precision), posterior(case, structure))
    assert_close(mean, model(case.test_inputs()))


@every_structure
def test_one_logit_is_no_classifier(structure):
    """A softmax over one class is 1 whatever the input: binary models need two outputs here."""
    model = Net(3, 5, 1).double()
    x, y = torch.randn(6, 3), torch.zeros(6, dtype=torch.long)
    for targets in (y, y.double().unsqueeze(-1), torch.ones(6, 1)):
        la = Laplace(model, "classification", hessian_structure=structure)
        with pytest.raises((UnsupportedError, InputError), match=r"one output|two"):
            la.fit([(x, targets)])


@every_structure
@basic_cases
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_explained(case, structure, value):
    model = case.model()
    with torch.no_grad():
        model.head.bias[0] = value
    with pytest.raises((InputError, torch.linalg.LinAlgError), match=r"NaN|finite"):
        fitted(case, structure, model)


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "delta"), [(0.3, 1.0), (1.0, 0.1), (2.0, 5.0)])
def test_a_linear_model_at_its_optimum_is_exact_bayesian_linear_regression(sigma, delta):
    """Predictions, marginal likelihood and posterior of conjugate theory, at the ridge solution."""
    noise = generator(0)
    X, Y, T = (torch.randn(*shape, generator=noise) for shape in ((12, 3), (12, 2), (4, 3)))
    weights, cov, log_marginal = reference.linear_regression(X, Y, sigma, delta)
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.copy_(weights[:, :-1])
        model[1].bias.copy_(weights[:, -1])
    la = Laplace(model, "regression", hessian_structure="full", sigma_noise=sigma, prior_precision=delta)
    la.fit([(X[:5], Y[:5]), (X[5:], Y[5:])])
    assert_close(la.log_marginal_likelihood(), log_marginal)
    mean, predictive = la(T)
    design = torch.cat([T, torch.ones(4, 1)], 1)
    assert_close(mean, design @ weights.T)
    assert_close(predictive, ((design @ cov) * design).sum(1)[:, None, None] * torch.eye(2))
    kernel = design @ cov @ design.T
    assert_close(la(T, joint=True)[1], torch.kron(kernel, torch.eye(2)))


def test_the_bias_free_gaussian_is_exact_in_every_structure_that_can_hold_it():
    """G x A holds the exact Hessian of a bias-free Gaussian, so kron is exact linear regression, too."""
    noise = generator(1)
    X, Y = torch.randn(10, 4, generator=noise), torch.randn(10, 3, generator=noise)
    A = (X.T @ X + 2.0 * torch.eye(4)).inverse()
    model = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_((A @ X.T @ Y).T)
    for structure in ("full", "kron"):
        la = Laplace(nn.Sequential(model), "regression", hessian_structure=structure, prior_precision=2.0)
        la.fit([(X, Y)])
        density = torch.distributions.MultivariateNormal(torch.zeros(10), X @ X.T / 2 + torch.eye(10))
        assert_close(la.log_marginal_likelihood(), sum(density.log_prob(Y[:, c]) for c in range(3)))
        assert_close(la(X[:2])[1], ((X[:2] @ A) * X[:2]).sum(1)[:, None, None] * torch.eye(3))


# -- precision and device -----------------------------------------------------------------------------------------------


@every_structure
def test_model_kwargs_reach_the_model_when_predicting(structure):
    case = named("keyword_inputs")
    la = fitted(case, structure)
    x = case.test_inputs()
    doubled = la({"input_ids": x["input_ids"]}, scale=2 * x["scale"])
    assert_close(doubled, la({"input_ids": x["input_ids"], "scale": 2 * x["scale"]}))
    assert not torch.allclose(doubled, la(x))


@every_structure
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_narrow_models_get_a_curvature_of_float32_at_least(case, structure, dtype):
    x, y = case.data()
    narrow = [(x.to(dtype), y if case.likelihood == "classification" else y.to(dtype))]
    for asked in (None, torch.float64):
        la = estimator(case, structure, case.model().to(dtype), curvature_dtype=asked)
        la.fit(narrow)
        wide_dtype = asked or torch.float32
        assert dense(la.posterior_precision).dtype == la.mean.dtype == la.prior_precision.dtype == wide_dtype
        assert la.log_marginal_likelihood().dtype == la.sample(2).dtype == wide_dtype
        result = la(case.test_inputs().to(dtype))
        for part in (result,) if isinstance(result, torch.Tensor) else result:
            assert part.dtype == dtype
            assert bool(torch.isfinite(part).all())


@every_structure
@basic_cases
def test_float64_models_do_not_depend_on_the_default_dtype(case, structure):
    """Users rarely change torch's default of float32; a model in float64 gets numbers in float64."""
    options = {"prior_precision": 0.3, "temperature": 0.9, "prior_mean": 0.1}
    precision = posterior(case, structure, delta=0.3, temperature=0.9)
    expected = evidence(case, precision, delta=0.3, temperature=0.9, mean=0.1)
    x, batches, model = case.test_inputs(), case.batches(4), case.model()
    f, _, V = outputs_and_covariance(case, precision)
    torch.set_default_dtype(torch.float32)
    la = estimator(case, structure, model, **options)
    la.fit(batches)
    assert_close(dense(la.posterior_precision), precision)
    assert_close(la.log_marginal_likelihood(), expected)
    result = la(x)
    if case.likelihood == "classification":
        assert_close(result, reference.probit(f, V))
    else:
        assert_close(result[1], V)
    la.optimize_prior_precision(n_steps=2)
    assert la.prior_precision.dtype == torch.float64


@every_structure
@basic_cases
def test_results_do_not_depend_on_the_device(case, structure, device):
    """Batches are moved to the model; hyperparameters, samples and results live where it does."""
    la = estimator(case, structure, case.model().to(device))
    la.fit(case.batches(4))
    expected = fitted(case, structure)
    assert la.mean.device.type == la.prior_precision.device.type == device.type
    assert_close(dense(la.posterior_precision).cpu(), dense(expected.posterior_precision))
    assert_close(la.log_marginal_likelihood().cpu(), expected.log_marginal_likelihood())
    x = case.test_inputs()
    for options in PREDICTIONS[case.likelihood]:
        seeded = {"generator": torch.Generator(device).manual_seed(0)} if "mc" in options.values() else {}
        result, truth = la(x.to(device), **options, **seeded), expected(x, **options)
        for ours, theirs in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (result, truth)), strict=True):
            assert ours.device.type == device.type
            assert ours.shape == theirs.shape
            if not {"mc", "nn"} & set(options.values()):
                assert_close(ours.cpu(), theirs)
    la.optimize_prior_precision(n_steps=3)
    assert la.functional_samples(x.to(device), n_samples=2).device.type == device.type
