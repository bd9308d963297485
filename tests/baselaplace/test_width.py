"""Widths of predictions where inputs are foreign."""

import math

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import UnsupportedError
from tests.baselaplace.recipes import C, D, classification, features, joined, logits, regression, tuned
from tests.contracts import generator
from tests.density import brute_force
from tests.tools import assert_close

near = torch.testing.assert_close


def excess_of(data, x):
    """e by its definition, with class densities and quantiles of validation rows."""
    (phi, y), (phi_val, _) = features(data, data.train), features(data, data.val)
    density = brute_force.mixture(phi, y)
    g = -density.log_prob(phi_val)

    def quantile(q):  # type 6
        values, h = g.sort().values, (len(g) + 1) * q
        low = int(h)
        return values[low - 1] + (h - low) * (values[low] - values[low - 1])

    q50, q95 = quantile(0.5), quantile(0.95)
    return ((-density.log_prob(data.model.body(x).detach()) - q95) / (q95 - q50)).clamp(min=0)


def test_foreign_inputs_are_predicted_with_the_width_of_the_formula():
    data = classification()
    la = tuned(data)
    x = torch.cat([data.test, 4 * data.test])
    e = excess_of(data, x)
    assert (e > 1).any()
    s2 = la.distance_scale if la.distance_scale else 3.0
    la.distance_scale = s2
    f = logits(la.mean, data.model.body(x).detach()) / la.output_temperature
    near(la(x), (f / (1 + math.pi / 8 * s2 * e[:, None]).sqrt()).softmax(-1), rtol=1e-6, atol=1e-9)
    la.distance_scale = 0
    assert_close(la(x), f.softmax(-1))


def test_every_link_is_finite_without_any_variance():
    data = classification()
    la = tuned(data)
    la.distance_scale = 0
    for link in ("probit", "mf1", "mf2", "mc"):
        assert_close(la(data.test, link_approx=link), la(data.test))
    for link in ("bridge", "bridge_norm"):
        assert torch.isfinite(la(data.test, link_approx=link)).all()


@pytest.mark.parametrize("link", ["probit", "mf1", "mf2", "mc", "bridge", "bridge_norm"])
def test_every_link_sees_the_width(link):
    data = classification()
    la = tuned(data)
    la.weight_uncertainty = True
    x = 4 * data.test
    la.distance_scale = 0
    narrow = la(x, link_approx=link, n_samples=4096, generator=generator(0))
    la.distance_scale = 30.0
    wide = la(x, link_approx=link, n_samples=4096, generator=generator(0))
    far = excess_of(data, x) > 1
    assert far.any()
    assert not torch.equal(wide, narrow)
    if link == "bridge":  # whose mean does not depend on a variance that all outputs share
        return
    assert (wide.max(-1).values < narrow.max(-1).values)[far].all()


def test_a_regression_is_wider_by_the_formula_where_inputs_are_foreign():
    data = regression(n_outputs=1)
    la = tuned(data, likelihood="regression")
    x = torch.cat([data.test, 5 * data.test])
    (phi, _), (phi_val, _) = features(data, data.train), features(data, data.val)
    mean, S = phi.mean(0), brute_force.oas(torch.cov(phi.T), len(phi) - 1)
    S = ((len(phi) - 1) * S + 10 * torch.cov(phi.T)) / (len(phi) + 9)
    d = torch.tensor([math.sqrt(brute_force.squared_distance(row, mean, S)) for row in phi_val]).sort().values
    at = [(len(d) + 1) * q for q in (0.5, 0.95)]
    q50, q95 = (float(d[int(h) - 1] + (h - int(h)) * (d[int(h)] - d[int(h) - 1])) for h in at)
    rows = data.model.body(x).detach()
    e = (
        (torch.tensor([math.sqrt(brute_force.squared_distance(row, mean, S)) for row in rows]) - q95) / (q95 - q50)
    ).clamp(min=0)
    la.distance_scale = 0
    before = la(x)[1].flatten()
    la.distance_scale = 3.0
    assert (e > 0).any()
    near(la(x)[1].flatten() - before, float(la.sigma_noise) ** 2 * 3.0 * e**2, rtol=1e-5, atol=1e-8)
    joint = la(x, joint=True)[1]
    assert_close(joint.diagonal(), la(x)[1].flatten())


def test_weights_functions_and_evidence_are_those_of_the_posterior():
    data = classification()
    la = tuned(data)
    for draw in (
        lambda: la.sample(5, generator=generator(0)),
        lambda: la.functional_samples(4 * data.test, generator=generator(0)),
        la.log_marginal_likelihood,
    ):
        before = draw()
        la.distance_scale, la.weight_uncertainty = 30.0, not la.weight_uncertainty
        assert torch.equal(draw(), before)


def test_where_no_width_is_possible_it_is_said():
    data = classification()
    x, y = joined(data.val)
    same = x[:1].expand_as(x)
    la = tuned(data._replace(val=[(same, y)]))
    assert any("No width" in note for note in la.tuning_.notes)
    assert la.distance_scale == 0
    with pytest.raises(UnsupportedError, match="distance_aware=True"):
        la.tune([(same, y)], distance_aware=True)


def test_features_without_a_density_leave_predictions_as_they_are():
    data = classification()
    body = nn.Sequential(nn.Linear(3, D), nn.Hardtanh()).double()
    with torch.no_grad():
        body[0].weight.zero_()
    model = nn.Sequential(body, nn.Linear(D, C).double())
    la = Laplace(model, "classification")
    la.fit(data.train)
    la.accept_untuned()
    assert torch.isfinite(la(data.test)).all()
    with pytest.raises(UnsupportedError, match="constant within every class"):
        la.ood_score(data.test, "density")
    la.tune(data.val)
    assert any("constant within every class" in note for note in la.tuning_.notes)


def test_gradients_in_the_inputs_are_finite():
    data = classification()
    la = Laplace(data.model, "classification", enable_backprop=True)
    la.fit(data.train)
    la.tune(data.val)
    la.distance_scale = 3.0
    for link in ("probit", "mf1", "mf2", "mc"):
        x = (4 * data.test).requires_grad_()
        (gradient,) = torch.autograd.grad(la(x, link_approx=link, n_samples=16)[:, 0].sum(), x)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


def test_the_score_does_not_depend_on_a_temperature_that_is_assigned_later():
    la = tuned(data := classification())
    before = la.ood_score(data.test)
    la.output_temperature = 5.0
    assert_close(la.ood_score(data.test), before)
