"""A model that is brought to another precision after ``fit``: what was learned follows, and predictions are those."""

import warnings

import pytest
import torch
from torch import nn

from laplace import Laplace
from tests.network.test_failures import KINDS, X, Y, estimator, net

STRUCTURES = {
    **{f"last layer, {s}": ("last_layer", s) for s in ("full", "kron", "diag", "blockdiag", "ekfac", "lowrank")},
    **{f"all, {s}": ("all", s) for s in ("full", "kron", "diag", "blockdiag", "ekfac", "lowrank")},
}
X32 = X.float()


def made(name: str, model: nn.Module):
    if name in KINDS:
        return estimator(name, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of low rank: what it leaves out
        return Laplace(model, "classification", *STRUCTURES[name], prior_precision=2.0)


@pytest.mark.parametrize("name", [*STRUCTURES, *(kind for kind in KINDS if kind not in ("last layer", "all"))])
def test_predictions_follow_a_model_in_another_precision(name):
    model = net()
    la = made(name, model)
    la.fit([(X32, Y)])
    before, evidence = la(X32), la.log_marginal_likelihood()
    model.double()
    after = la(X32.double())
    assert after.dtype is torch.float64
    torch.testing.assert_close(after, before.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence.double(), rtol=1e-4, atol=1e-4)
    assert la.mean.dtype is la.prior_precision.dtype is torch.float64
    model.float()
    torch.testing.assert_close(la(X32), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_everything_else_follows_whatever_is_asked_first(subset):
    def fitted():
        model = net()
        la = Laplace(model, "classification", subset, "kron")
        la.fit([(X32, Y)])
        return model, la

    asked = {
        "evidence": lambda la, x: la.log_marginal_likelihood(),
        "samples of weights": lambda la, x: la.sample(3, torch.Generator().manual_seed(0)).mean(),
        "density": lambda la, x: la.log_prob(la.mean),
        "sampled networks": lambda la, x: la(x, pred_type="nn", n_samples=3, generator=torch.Generator().manual_seed(0)),
        "functions": lambda la, x: la.functional_samples(x, n_samples=200, generator=torch.Generator().manual_seed(0)).mean(),
        "density of the prior": lambda la, x: la.scatter + la.log_det_prior_precision,
        "more data": lambda la, x: la.fit([(x, Y)], override=False).log_marginal_likelihood(),
        "data again": lambda la, x: la.fit([(x, Y)])(x),
        "a saved state": lambda la, x: la.load_state_dict(la.state_dict()) or la(x),
    }  # fmt: skip
    for what, ask in asked.items():
        if subset == "last_layer" and what == "sampled networks":
            continue
        model, la = fitted()
        expected = ask(la, X32)
        model, la = fitted()
        model.double()
        found = ask(la, X32.double())
        assert found.dtype is torch.float64, what
        if "sample" not in what and what != "functions":  # which draw other numbers in another precision
            torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_half_precision_rounds_the_weights_and_does_not_count_as_training(subset):
    model = net()
    la = Laplace(model, "classification", subset, "diag")
    la.fit([(X32, Y)])
    before = la(X32)
    model.bfloat16()
    after = la(X32.bfloat16())
    assert after.dtype is torch.bfloat16
    torch.testing.assert_close(after.float(), before, rtol=0, atol=0.02)


def test_weights_that_were_trained_are_still_noticed():
    model = net()
    la = Laplace(model, "classification", "all", "diag")
    la.fit([(X32, Y)])
    model.double()
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    with pytest.warns(UserWarning, match="have changed since fit"):
        la(X32.double())


def test_evidence_is_differentiated_in_a_prior_that_was_assigned_before():
    model = net()
    la = Laplace(model, "classification", "last_layer", "kron")
    la.fit([(X32, Y)])
    model.double()
    precision = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(la.log_marginal_likelihood(precision), precision)
    assert torch.isfinite(gradient)
