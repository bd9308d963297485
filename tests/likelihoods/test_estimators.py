"""Estimators hand a likelihood the mean and covariance of the outputs, whatever the structure, weights and tuning."""

import itertools
import random

import pytest
import torch

from laplace.enums import LinkApprox
from laplace.errors import InputError, UnsupportedError
from tests import reference
from tests.contracts import generator
from tests.likelihood_kinds import KINDS, ROWS, gaussian_grid
from tests.likelihoods import situations
from tests.likelihoods.situations import N_OUTPUTS, N_TEST, build, cut, data, inputs, moments, network, outputs
from tests.tools import assert_close, assert_within

pytestmark = [
    pytest.mark.filterwarnings("ignore:The validation score is best"),
    pytest.mark.filterwarnings("ignore:The best "),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no temperature is best"),
]
STRUCTURES = ("full", "kron", "diag", "blockdiag", "ekfac", "lowrank", "gp")
SUBSETS = ("all", "last_layer", "subnetwork")
METHODS = ("none", "marglik", "gridsearch", "tune", "loo", "cv")
PRED_TYPES = ("glm", "nn", "joint")
GRID = {"grid_size": 5, "log_prior_prec_min": -1, "log_prior_prec_max": 2}


def exists(name: str, structure: str, subset: str, *_: str) -> bool:
    return subset != "subnetwork" or structure in ("full", "diag")


AXES = (list(KINDS), STRUCTURES, SUBSETS, PRED_TYPES, METHODS)
COVERING = situations.pairwise(AXES, exists)
REST = [values for values in itertools.product(*AXES) if exists(*values) and values not in COVERING]
SAMPLED = random.Random(1).sample(REST, 200)


def test_the_covering_holds_every_pair():
    found = {pair for values in COVERING for pair in itertools.combinations(enumerate(values), 2)}
    for values in REST:
        assert set(itertools.combinations(enumerate(values), 2)) <= found
    assert len(COVERING) < 80


def tuned_by(la, kind, structure: str, subset: str, method: str) -> None:
    """Choose the prior precision, where there is such a way; others are refused."""
    before = la.prior_precision
    training, validation = cut(*data(kind)), [data(kind, 12, seed=7)]
    if method == "none":
        return
    if method == "tune":
        # Where brute force keeps its digits.
        alone = {"refit": False, "distance_aware": False}  # around the weights that brute force knows
        la.tune(validation, n_steps=10, limits={"prior_precision": (0.1, 50.0)}, **alone)
    elif method == "gridsearch":
        la.optimize_prior_precision(method=method, val_loader=validation, **GRID)
    elif method == "marglik":
        la.optimize_prior_precision(method=method)
    else:
        allowed = subset == "last_layer" and structure != "gp" and kind.refitted
        allowed &= method == "cv" or structure in ("full", "diag")
        options = {"method": method, "train_loader": training, **GRID}
        options |= {"n_folds": 3} if method == "cv" else {"refit": False}
        if not allowed:
            options = {} if structure == "gp" else options
            with pytest.raises((UnsupportedError, InputError)):
                la.optimize_prior_precision(**{"method": method, **options})
            assert torch.equal(la.prior_precision, before)
            return
        la.optimize_prior_precision(**options)
    assert not torch.equal(la.prior_precision, before)


def check_prediction(la, kind, subset: str, structure: str, pred_type: str) -> None:
    """A prediction is that of the likelihood for the mean and covariance by brute force."""
    x = inputs(kind, N_TEST, 3)
    likelihood = la.likelihood_.for_targets()
    pairs = {"fitting": True} if kind.pairs else {}
    mean, cov, joint = moments(la, kind, subset, structure, x)
    if pred_type == "glm":
        for link in kind.links:
            found = la(x, link_approx=link, n_samples=20, generator=generator(0), **pairs)
            if kind.classes is not None and link == "mc":  # with the numbers that are drawn for what it asks
                spread = cov if "mf2" in kind.links else cov.diagonal(dim1=1, dim2=2)
            else:
                spread = cov
            compare(found, likelihood.predict(mean, spread, likelihood.link(LinkApprox(link), 20, generator(0))))
        if "probit" in kind.diagonal:
            expected = likelihood.predict(
                mean, cov.diagonal(dim1=1, dim2=2), likelihood.link(LinkApprox.PROBIT, 1, None)
            )
            compare(la(x, diagonal_output=True), expected)
    elif pred_type == "joint" and kind.classes is None:
        found = la(x, joint=True)
        n = N_TEST * kind.mean(mean).shape[1]
        assert found[0].shape == (n,)
        assert found[1].shape == (n, n)
        compare(found, likelihood.predict_joint(mean, joint))
    elif pred_type == "joint":
        n = 20_000
        found = la(x, joint=True, link_approx="mc", n_samples=n, generator=generator(0), **pairs)
        f, mass = gaussian_grid(mean, cov)
        p = kind.mean(f / la.output_temperature)
        truth, square = (torch.tensordot(mass, p**power, 1) for power in (1, 2))
        assert_within(found, truth, ((square - truth**2).clamp(min=0) / n).sqrt())
    elif structure == "gp":
        with pytest.raises(UnsupportedError, match="nn"):
            la(x, pred_type="nn", **pairs)
    else:
        weights = whole(la.sample(9, generator=generator(0)), kind, subset)
        model = network(N_OUTPUTS[kind.name])
        f = torch.stack([situations.at_weights(model, theta, x) for theta in weights]).detach()
        g = kind.mean(f / (la.output_temperature if kind.of_logits else 1.0))
        found = la(x, pred_type="nn", n_samples=9, generator=generator(0), **pairs)
        compare(found, g.mean(0) if kind.classes is not None else (g.mean(0), g.var(0)))


def whole(samples: torch.Tensor, kind, subset: str) -> torch.Tensor:
    """Samples of all weights."""
    theta = torch.nn.utils.parameters_to_vector(network(N_OUTPUTS[kind.name]).parameters()).detach()
    if subset != "last_layer":
        return samples
    return torch.cat([theta[: -samples.shape[1]].expand(len(samples), -1), samples], 1)


def compare(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        found, expected = (found,), (expected,)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def check_situation(name: str, structure: str, subset: str, pred_type: str, method: str) -> None:
    kind = KINDS[name]
    la = build(kind, subset, structure)
    la.fit(cut(*data(kind)))
    tuned_by(la, kind, structure, subset, method)
    if not getattr(la, "weight_uncertainty", True):  # as tune chose
        la.weight_uncertainty = True
    if getattr(la, "distance_scale", 0):
        la.distance_scale = 0
    check_prediction(la, kind, subset, structure, pred_type)


@pytest.mark.parametrize(("name", "structure", "subset", "pred_type", "method"), COVERING)
def test_predictions_are_those_of_the_likelihood(name, structure, subset, pred_type, method):
    check_situation(name, structure, subset, pred_type, method)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "structure", "subset", "pred_type", "method"), SAMPLED)
def test_predictions_are_those_of_the_likelihood_in_more_situations(name, structure, subset, pred_type, method):
    check_situation(name, structure, subset, pred_type, method)


@pytest.mark.every(4)
@pytest.mark.parametrize("T", [1.0, 1.6])
@pytest.mark.parametrize("kind", ROWS, ids=str)
@pytest.mark.parametrize(("subset", "structure"), [("all", "full"), ("last_layer", "full"), ("last_layer", "gp"), ("all", "diag"), ("subnetwork", "full")])  # fmt: skip
def test_the_evidence_is_that_of_the_density(kind, subset, structure, T):
    la = build(kind, subset, structure, temperature=T)
    x, y = data(kind)
    la.fit(cut(x, y))
    f, _ = outputs(N_OUTPUTS[kind.name], x, subset)
    normalizer = float(la.likelihood_.log_normalizer(len(y), f.shape[1]))  # which is not tempered
    nll = -kind.log_density(f, y).sum() - normalizer
    theta = torch.nn.utils.parameters_to_vector(network(N_OUTPUTS[kind.name]).parameters()).detach()
    theta = theta[situations.columns(N_OUTPUTS[kind.name], subset)]
    P0 = situations.DELTA * torch.eye(len(theta))
    precision = situations.posterior(la, kind, subset, structure)
    expected = reference.log_evidence(nll, 1 / T, None, len(y), precision, P0, theta)
    assert_close(la.log_marginal_likelihood(), expected - normalizer)
    check_prediction(la, kind, subset, structure, "glm")


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "gp"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_shapes_of_predictions(subset, structure):
    B = N_TEST
    la = build(KINDS["binary"], subset, structure)
    la.fit(cut(*data(KINDS["binary"])))
    x = inputs(KINDS["binary"], B, 3)
    options = [{}, {"link_approx": "mc"}, {"diagonal_output": True}, {"link_approx": "mc", "joint": True}]
    options += [{"pred_type": "nn"}] if structure != "gp" else []
    for chosen in options:
        p = la(x, **chosen)
        assert p.shape == (B, 1)
        assert bool(((p > 0) & (p < 1)).all())

    la, C = build(KINDS["poisson"], subset, structure), N_OUTPUTS["poisson"]
    la.fit(cut(*data(KINDS["poisson"])))
    shapes = {(): (B, C, C), ("diagonal_output",): (B, C), ("joint",): (B * C, B * C)}
    for flags, shape in shapes.items():
        mean, spread = la(x, **dict.fromkeys(flags, True))
        assert mean.shape == ((B * C,) if flags == ("joint",) else (B, C))
        assert spread.shape == shape
    if structure != "gp":
        mean, spread = la(x, pred_type="nn")
        assert mean.shape == spread.shape == (B, C)
