"""Fits of every likelihood: targets, closed forms, equal models, function space, states."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from laplace import Laplace, curvature
from laplace.enums import LinkApprox
from laplace.errors import InputError, NotFittedError, NumericalWarning, ShapeError, UnsupportedError
from tests.contracts import generator
from tests.estimators import dense
from tests.likelihood_kinds import KINDS, ROWS
from tests.likelihoods import situations
from tests.likelihoods.situations import DELTA, N_OUTPUTS, N_TEST, N_TRAIN, build, cut, data, inputs, network, outputs
from tests.networks import Applied
from tests.tools import assert_close

F64 = torch.float64
NEW = [KINDS[name] for name in ("binary", "poisson", "multilabel", "negative_binomial", "heteroscedastic_regression")]
BINARY, POISSON = NEW[:2]
every_kind = pytest.mark.parametrize("kind", ROWS, ids=str)
new_kinds = pytest.mark.parametrize("kind", NEW, ids=str)
some_weights = pytest.mark.parametrize(
    ("subset", "structure"), [("all", "full"), ("all", "kron"), ("last_layer", "kron"), ("last_layer", "gp")]
)
few_weights = pytest.mark.parametrize(("subset", "structure"), [("all", "full"), ("last_layer", "gp")])
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def fitted(kind, subset="all", structure="full", **options):
    la = build(kind, subset, structure, **options)
    la.fit(cut(*data(kind)))
    return la


def compare(found, expected) -> None:
    found, expected = ((v,) if isinstance(v, torch.Tensor) else v for v in (found, expected))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def options_of(kind) -> dict:
    return {"fitting": True} if kind.pairs else {}


# -- targets ----------------------------------------------------------------------------------------------------------


@few_weights
def test_binary_targets_of_any_type_and_either_shape_are_the_same_fit(subset, structure):
    x, y = data(BINARY)
    expected = fitted(BINARY, subset, structure)
    for dtype in (torch.bool, torch.int32, torch.int64, torch.float32):
        for shape in ((N_TRAIN,), (N_TRAIN, 1)):
            la = build(BINARY, subset, structure)
            la.fit(cut(x, y.reshape(shape).to(dtype)))
            assert_close(la.log_marginal_likelihood(), expected.log_marginal_likelihood())
            assert_close(la(inputs(BINARY, N_TEST, 3)), expected(inputs(BINARY, N_TEST, 3)))


@few_weights
def test_counts_of_any_type_are_the_same_fit(subset, structure):
    x, y = data(POISSON)
    expected = fitted(POISSON, subset, structure).log_marginal_likelihood()
    for dtype in (torch.uint8, torch.int64, torch.float32):
        la = build(POISSON, subset, structure)
        la.fit(cut(x, y.to(dtype)))
        assert_close(la.log_marginal_likelihood(), expected)


WRONG = {
    "binary": {
        "half": lambda y: 0.5 + 0 * y,
        "two": lambda y: 2 * torch.ones_like(y),
        "minus one": lambda y: (2 * y - 1).long(),
        "nan": lambda y: y * torch.nan,
        "one-hot": lambda y: torch.cat([1 - y, y], 1),
        "too few": lambda y: y[:-1],
        "extra axis": lambda y: y[None],
    },
    "poisson": {
        "fraction": lambda y: y + 0.5,
        "negative": lambda y: -1 - y,
        "negative int": lambda y: (-1 - y).long(),
        "nan": lambda y: y * torch.nan,
        "infinite": lambda y: y + torch.inf,
        "bool": lambda y: y > 0,
        "one column": lambda y: y[:, :1],
        "no column": lambda y: y[:, 0],
        "too few": lambda y: y[:-1],
    },
    "multilabel": {
        "two": lambda y: 2 * torch.ones_like(y),
        "minus one": lambda y: (2 * y - 1).long(),
        "infinite": lambda y: y + torch.inf,
        "one column": lambda y: y[:, :1],
        "no column": lambda y: y[:, 0].long(),
    },
    "negative_binomial": {"fraction": lambda y: y + 0.5, "negative": lambda y: -1 - y},
    "heteroscedastic_regression": {
        "integers": lambda y: y.long(),
        "nan": lambda y: y * torch.nan,
        "one column": lambda y: y[:, :1],
        "as many as outputs": lambda y: torch.cat([y, y], 1),
        "too few": lambda y: y[:-1],
    },
}
SHAPES = ("one-hot", "too few", "extra axis", "one column", "no column", "as many as outputs")


@pytest.mark.every(4)
@some_weights
@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, rows in WRONG.items() for wrong in rows])
def test_targets_without_a_meaning_are_refused_and_nothing_is_fitted(name, wrong, subset, structure):
    kind = KINDS[name]
    la, (x, y) = build(kind, subset, structure, **({"n_subset": 1} if structure == "gp" else {})), data(kind)
    with pytest.raises(ShapeError if wrong in SHAPES else InputError, match=r"[tT]argets|[cC]ounts|[lL]abels"):
        la.fit([(x, WRONG[name][wrong](y))])
    with pytest.raises(NotFittedError):
        la(inputs(kind, N_TEST, 3))


@some_weights
def test_two_logits_are_not_binary(subset, structure):
    la = build(BINARY, subset, structure, model=network(2))
    x, y = data(BINARY)
    with pytest.raises(UnsupportedError, match=r"binary.*2 outputs.*classification"):
        la.fit([(x, y)])


@new_kinds
def test_noise_and_output_temperature_without_a_meaning_are_refused(kind):
    with pytest.raises(UnsupportedError, match=f"sigma_noise.*{kind.name}"):
        build(kind, "all", "full", sigma_noise=0.5)
    la = fitted(kind)
    with pytest.raises(UnsupportedError, match=f"sigma_noise.*{kind.name}"):
        la.sigma_noise = 0.5
    with pytest.raises(UnsupportedError, match=f"{kind.name}.*observation noise|noise.*{kind.name}"):
        la.tune([data(kind)], noise="scalar")
    if kind.classes is None:
        with pytest.raises(UnsupportedError, match=f"output_temperature.*{kind.name}"):
            la.output_temperature = 2.0
        with pytest.raises(UnsupportedError, match=f"output_temperature.*{kind.name}"):
            la.tune([data(kind)], output_temperature=True)
    for options in ({"link_approx": "bridge"}, {"link_approx": "bridge_norm"}, {"fitting": True}):
        with pytest.raises(UnsupportedError, match=r"bridge|fitting"):
            la(inputs(kind, N_TEST, 3), **options)


# -- models that are equal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "diag", "blockdiag"])
def test_binary_is_classification_with_the_logits_zero_and_f(structure):
    x, y = data(BINARY)
    single = fitted(BINARY, "all", structure)
    model = Applied(lambda m, x: nn.functional.pad(m.net(x), (1, 0)), net=network(1))
    double = Laplace(model, "classification", "all", structure, prior_precision=DELTA)
    double.fit(cut(x, y[:, 0].long()))
    assert_close(single.log_marginal_likelihood(), double.log_marginal_likelihood(), "evidence")
    assert_close(dense(single.posterior_precision), dense(double.posterior_precision), "posterior precision")
    at = inputs(BINARY, N_TEST, 3)
    for temperature in (1.0, 2.5):
        single.output_temperature = double.output_temperature = temperature
        assert_close(single(at)[:, 0], double(at)[:, 1], "probit")
        one, two = (la(at, pred_type="nn", generator=generator(0)) for la in (single, double))
        assert_close(one[:, 0], two[:, 1], "nn")
    for la in (single, double):
        la.output_temperature = 1.0
        la.optimize_prior_precision()
    assert_close(single.prior_precision, double.prior_precision, "tuned by evidence")


@pytest.mark.parametrize("score", ["nll", "brier"])
@pytest.mark.filterwarnings(
    "ignore:The validation score is best", "ignore:The best ", "ignore:.*no temperature is best"
)
def test_binary_is_tuned_as_that_classification_is(score):
    x, y = data(BINARY)
    validation = data(BINARY, 30, seed=5)
    single = fitted(BINARY)
    model = Applied(lambda m, x: nn.functional.pad(m.net(x), (1, 0)), net=network(1))
    double = Laplace(model, "classification", "all", "full", prior_precision=DELTA)
    double.fit(cut(x, y[:, 0].long()))
    labels = [(validation[0], validation[1][:, 0].long())]
    for loss in (score, "ece"):
        for la, loader in ((single, [validation]), (double, labels)):
            la.optimize_prior_precision(method="gridsearch", val_loader=loader, loss=loss, grid_size=7)
        assert_close(single.tuning_.values, double.tuning_.values, loss)
    alone = {"refit": False, "distance_aware": False}  # priors of two logits are others than of one
    first, second = single.tune([validation], score=score, **alone), double.tune(labels, score=score, **alone)
    assert first.value == pytest.approx(second.value, abs=1e-9)


def test_counts_around_a_constant_have_closed_forms():
    """y_n ~ Poisson(exp(w)) and a prior N(0, 1/delta) on w."""
    n, delta, w = 10, 0.8, 0.4
    y = torch.tensor([0.0, 1, 2, 1, 3, 0, 2, 1, 1, 4])[:, None]
    for subset, options in (("all", {}), ("last_layer", {"last_layer_name": "1"})):
        model = nn.Sequential(nn.Identity(), nn.Linear(1, 1, bias=False)).double()
        nn.init.constant_(model[1].weight, w)
        la = Laplace(model, "poisson", subset, "full", prior_precision=delta, **options)
        la.fit([(torch.ones(n, 1), y)])
        precision = n * math.exp(w) + delta
        assert_close(dense(la.posterior_precision), torch.tensor([[precision]]))
        log_p = sum(t * w - math.exp(w) - math.lgamma(t + 1) for t in y.flatten().tolist())
        evidence = log_p - 0.5 * math.log(precision / delta) - 0.5 * delta * w**2
        assert_close(la.log_marginal_likelihood(), torch.tensor(evidence))
        mean, cov = la(2 * torch.ones(1, 1))
        rate = math.exp(2 * w + 2 / precision)
        assert_close(mean, torch.tensor([[rate]]))
        assert_close(cov, torch.tensor([[[rate**2 * math.expm1(4 / precision)]]]))


def test_tuning_by_evidence_finds_the_maximum_of_the_closed_form():
    n, w = 10, 0.4
    model = nn.Sequential(nn.Identity(), nn.Linear(1, 1, bias=False)).double()
    nn.init.constant_(model[1].weight, w)
    la = Laplace(model, "poisson", "all", "full")
    la.fit([(torch.ones(n, 1), torch.ones(n, 1))])
    la.optimize_prior_precision()
    # d/d delta of log(delta) - log(h + delta) - delta w^2: h / (delta (h + delta)) = w^2
    h = n * math.exp(w)
    best = (-h + math.sqrt(h**2 + 4 * h / w**2)) / 2
    torch.testing.assert_close(la.prior_precision, torch.tensor([best]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("subset", "structure"), [("all", "full"), ("last_layer", "kron"), ("last_layer", "gp")])
def test_a_rate_that_overflows_is_a_warning_that_names_tune(subset, structure):
    """Of a weak prior and little data, far away; the network itself says 1."""
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2)).double()
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    options = {"n_subset": 1} if structure == "gp" else {}
    options |= {"last_layer_name": "1"} if subset == "last_layer" else {}
    la = Laplace(model, "poisson", subset, structure, prior_precision=0.1, **options)
    la.fit([(torch.ones(1, 2), torch.ones(1, 2))])
    far = torch.tensor([[100.0, -100.0]])
    for flags in ({}, {"joint": True}, {"diagonal_output": True}):
        with pytest.warns(NumericalWarning, match=r"rate is too large.*tune\(val_loader\)"):
            la(far, **flags)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(bool(part.isfinite().all()) for part in la(0.01 * far))
        la.prior_precision = 1e4
        assert all(bool(part.isfinite().all()) for part in la(far))


# -- positions, samples, back ends ------------------------------------------------------------------------------------


@new_kinds
@pytest.mark.parametrize(("subset", "structure"), [("all", "full"), ("last_layer", "full"), ("last_layer", "gp")])
def test_positions_are_data_of_their_own(kind, subset, structure):
    x, y = data(kind)
    x3, y3 = x.reshape(4, 3, 2), y.reshape(4, 3, -1)
    flat = fitted(kind, subset, structure)
    la = build(kind, subset, structure, **({"n_subset": 4} if structure == "gp" else {}))
    la.fit([(x3[:2], y3[:2]), (x3[2:], y3[2:, ..., 0] if kind is BINARY else y3[2:])])
    assert_close(la.log_marginal_likelihood(), flat.log_marginal_likelihood())
    found, expected = la(x3), flat(x)
    if kind.classes is not None:
        assert_close(found, expected.reshape(4, 3, -1))
    else:
        assert_close(found[0], expected[0].reshape(4, 3, 2))
        assert_close(found[1], expected[1].reshape(4, 3, 2, 2))


@new_kinds
@pytest.mark.parametrize("options", [{}, {"diagonal_output": True}, {"pred_type": "nn"}], ids=str)
def test_predictive_samples_are_means_of_targets_for_sampled_outputs(kind, options):
    la, x = fitted(kind), inputs(kind, N_TEST, 3)
    functions = la.functional_samples(x, n_samples=6, generator=generator(0), **options)
    found = la.predictive_samples(x, n_samples=6, generator=generator(0), **options)
    assert functions.shape == (6, N_TEST, N_OUTPUTS[kind.name])
    assert_close(found, kind.mean(functions))


BACKENDS = {
    "GGN": ("AutogradGGN", "BackPackGGN", "AsdlGGN", "CurvlinopsGGN"),
    "EF": ("AutogradEF", "BackPackEF", "AsdlEF", "CurvlinopsEF"),
    "Hessian": ("AutogradHessian", "AsdlHessian", "CurvlinopsHessian"),
}


@pytest.mark.every(3)
@new_kinds
@pytest.mark.parametrize(("matrix", "backend"), [(m, b) for m, names in BACKENDS.items() for b in names])
def test_every_back_end_computes_the_curvature_of_the_density_or_refuses(kind, matrix, backend):
    cls = getattr(curvature, backend)
    x, y = data(kind)
    la, refusal = None, ""
    try:
        la = build(kind, "all", "full", backend=cls)
        la.fit(cut(x, y))
    except UnsupportedError as error:
        refusal = str(error)
    if refusal:
        assert not backend.startswith("Autograd")
        assert kind.name in refusal
        return
    f, J = outputs(N_OUTPUTS[kind.name], x, "all")
    if matrix == "EF":
        g = torch.einsum("nc,ncp->np", kind.gradients(f, y), J)
        expected = g.T @ g
    elif matrix == "Hessian":
        model = network(N_OUTPUTS[kind.name])
        theta = nn.utils.parameters_to_vector(model.parameters()).detach()
        expected = torch.autograd.functional.hessian(
            lambda theta: -kind.log_density(situations.at_weights(model, theta, x), y).sum(), theta
        )
    else:
        expected = situations.curvature(kind.name, "all")
    assert_close(dense(la.H), expected)
    assert_close(la.log_likelihood, kind.log_density(f, y).sum(), "log-likelihood")


# -- function space ---------------------------------------------------------------------------------------------------


@every_kind
def test_ella_is_the_posterior_along_its_directions(kind):
    x = inputs(kind, N_TEST, 3)
    la = Laplace(
        network(N_OUTPUTS[kind.name]), kind.name, "all", "gp", functional_approximation="nystrom", subsample_size=6,
        n_eigenvalues=4, prior_precision=DELTA,
    )  # fmt: skip
    la.fit(cut(*data(kind)))
    V = la.state_dict()["learned"]["directions"]
    H = situations.curvature(kind.name, "all")
    S = V.T @ (V @ H @ V.T + DELTA * torch.eye(len(V))).inverse() @ V
    check_predictions(la, kind, S, x)


def check_predictions(la, kind, S, x) -> None:
    likelihood = la.likelihood_.for_targets()
    mean, cov, joint = situations.moments_of(kind, *outputs(N_OUTPUTS[kind.name], x, "all"), S)
    expected = likelihood.predict(mean, cov, likelihood.link(LinkApprox.PROBIT, 1, None))
    compare(la(x, **options_of(kind)), expected)
    if kind.classes is None:
        compare(la(x, joint=True), likelihood.predict_joint(mean, joint))


@pytest.mark.every(3)
@every_kind
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_valla_predicts_by_its_moments_and_its_objective_never_rises(kind, alpha):
    x, y = data(kind)
    at = inputs(kind, 4, 9)
    la = Laplace(
        network(N_OUTPUTS[kind.name]), kind.name, "all", "gp", functional_approximation="variational", alpha=alpha,
        inducing_locations=at[:, 0] if kind.pairs else at, prior_precision=DELTA,
    )  # fmt: skip
    la.fit([(x, y)], iterations=8, lr=0.1)
    history = la.fit_history_["objective"]
    assert all(later <= earlier for earlier, later in itertools.pairwise(history))
    assert history[0] - history[-1] > 1e-3
    x = inputs(kind, N_TEST, 3)
    mean, J = outputs(N_OUTPUTS[kind.name], x, "all")
    likelihood = la.likelihood_.for_targets()
    joint = la.functional_covariance(J)
    n, C = J.shape[:2]
    cov = torch.stack([joint[C * i : C * (i + 1), C * i : C * (i + 1)] for i in range(n)])
    if kind.pairs:
        gap = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
        mean, cov = mean @ gap.T, gap @ cov @ gap.T
    expected = likelihood.predict(mean, cov, likelihood.link(LinkApprox.PROBIT, 1, None))
    compare(la(x, **options_of(kind)), expected)


def kinds_and(weights: list[tuple[str, str]]):
    """All combinations; the first for every likelihood, the rest for one each and otherwise slow."""
    rows = []
    for number, (subset, structure) in enumerate(weights):
        for place, kind in enumerate(ROWS):
            kept = number == 0 or number % len(ROWS) == place
            marks = () if kept else pytest.mark.slow
            rows.append(pytest.param(kind, subset, structure, id=f"{kind}-{subset}-{structure}", marks=marks))
    return pytest.mark.parametrize(("kind", "subset", "structure"), rows)


# -- states -----------------------------------------------------------------------------------------------------------


@kinds_and([("all", "full"), ("all", "kron"), ("all", "lowrank"), ("last_layer", "ekfac"), ("last_layer", "gp"), ("subnetwork", "diag")])  # fmt: skip
def test_what_is_saved_is_what_is_loaded(kind, subset, structure, tmp_path):
    la, x = fitted(kind, subset, structure), inputs(kind, N_TEST, 3)
    la.prior_precision = 0.9
    if kind.of_logits:
        la.output_temperature = 1.4
    la.save(tmp_path / "state")
    other = build(kind, subset, structure)
    other.load(tmp_path / "state")
    for options in ({}, options_of(kind)):
        if options or not kind.pairs:
            compare(other(x, **options), la(x, **options))
    assert_close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert float(other.prior_precision) == pytest.approx(0.9)


@new_kinds
def test_a_state_of_another_likelihood_is_refused(kind, tmp_path):
    la = fitted(kind)
    la.save(tmp_path / "state")
    name = "regression" if kind is POISSON else "poisson"
    other = Laplace(network(N_OUTPUTS[kind.name]), name, "all", "full", prior_precision=DELTA)
    with pytest.raises(InputError, match=f"{kind.name}.*{name}|{name}.*{kind.name}"):
        other.load(tmp_path / "state")


@kinds_and([("all", "full"), ("all", "diag"), ("all", "blockdiag"), ("all", "kron"), ("last_layer", "kron"), ("subnetwork", "full")])  # fmt: skip
def test_two_fits_without_override_are_one(kind, subset, structure):
    first, second = cut(*data(kind))
    whole, la = fitted(kind, subset, structure), build(kind, subset, structure)
    la.fit([first])
    la.fit([second], override=False)
    x = inputs(kind, N_TEST, 3)
    assert_close(dense(la.posterior_precision), dense(whole.posterior_precision))
    assert_close(la.log_marginal_likelihood(), whole.log_marginal_likelihood())
    compare(la(x, **options_of(kind)), whole(x, **options_of(kind)))
