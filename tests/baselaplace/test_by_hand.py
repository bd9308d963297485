"""Means and curvatures that are assigned take part in everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laplace.errors import InputError, NotFittedError, ShapeError, UnsupportedError
from laplace.utils import Kron, KronDecomposed
from tests.contracts import generator
from tests.estimators import dense
from tests.kinds import DOUBLE, data, every_kind, fitted, make, observed, weights_kinds
from tests.tools import assert_close


def doubled(H: Any) -> Any:
    """Twice a curvature, in its own form."""
    if isinstance(H, tuple):
        return H[0], 2 * H[1]
    if isinstance(H, list):
        return [2 * block for block in H]
    if hasattr(H, "eigenvalues") and not isinstance(H, KronDecomposed):
        return type(H)(H.eigenvectors, [2 * values for values in H.eigenvalues])
    return 2 * H


@every_kind
def test_an_assigned_curvature_is_that_of_everything(subset, structure):
    """Twice the curvature is what half the noise variance gives, and the loss stays that of the fit."""
    la, x = fitted(subset, structure), data()[0][:4]
    H, loss = dense(la.H), la.loss
    la.H = doubled(la.H)
    other = fitted(subset, structure)
    other.sigma_noise = 0.5**0.5
    assert_close(dense(la.H), 2 * H)
    assert_close(dense(la.posterior_precision), dense(other.posterior_precision))
    for ours, theirs in zip(la(x), other(x), strict=True):
        assert_close(ours, theirs)
    noise = generator(2), generator(2)
    assert_close(la.sample(3, generator=noise[0]), other.sample(3, generator=noise[1]))
    assert_close(la.log_det_ratio, other.log_det_ratio)
    assert_close(la.loss, loss)
    expected = la.log_likelihood - 0.5 * (other.log_det_ratio + la.scatter)
    assert_close(la.log_marginal_likelihood(), expected)


@every_kind
def test_without_a_fit_an_assigned_mean_and_curvature_are_the_posterior(subset, structure):
    done, la, x = fitted(subset, structure), make(subset, structure), data()[0][:4]
    la.mean, la.H = done.mean, done.H
    for ours, theirs in zip(la(x), done(x), strict=True):
        assert_close(ours, theirs)
    assert_close(dense(la.posterior_precision), dense(done.posterior_precision))
    assert_close(la.sample(2, generator=generator(2)), done.sample(2, generator=generator(2)))
    la.optimize_prior_precision(method="gridsearch", val_loader=[data()], grid_size=5)
    done.optimize_prior_precision(method="gridsearch", val_loader=[data()], grid_size=5)
    assert_close(la.prior_precision, done.prior_precision)
    for request in (la.log_marginal_likelihood, lambda: la.loss, lambda: la.log_likelihood):
        with pytest.raises(NotFittedError, match="assigned by hand"):
            request()
    with pytest.raises(NotFittedError, match="assigned by hand"):
        la.optimize_prior_precision()
    with pytest.raises(UnsupportedError, match=r"override=True|cannot add"):
        la.fit([data()], override=False)
    la.fit([data()])
    assert_close(
        la.log_marginal_likelihood(),
        fitted(subset, structure, prior_precision=la.prior_precision).log_marginal_likelihood(),
    )


@every_kind
def test_without_a_fit_a_curvature_alone_is_taken_at_the_weights_of_the_model(subset, structure):
    done, la = fitted(subset, structure), make(subset, structure)
    la.H = done.H
    assert_close(la.mean, done.mean)


@weights_kinds
def test_an_assigned_mean_is_the_center_and_has_no_known_loss(subset, structure):
    la = fitted(subset, structure)
    mean = la.mean + 0.1
    la.mean = mean
    mean.zero_()
    assert_close(la.mean, fitted(subset, structure).mean + 0.1)
    exact = torch.distributions.MultivariateNormal(la.mean, precision_matrix=dense(la.posterior_precision))
    theta = torch.zeros_like(la.mean)
    assert_close(la.log_prob(theta), exact.log_prob(theta))
    with pytest.raises(NotFittedError, match="assigned by hand"):
        la.log_marginal_likelihood()
    with pytest.warns(UserWarning, match=r"la\.mean was assigned"):
        la(data()[0])


@weights_kinds
def test_assigning_the_mean_that_was_there_changes_nothing(subset, structure):
    la = fitted(subset, structure)
    before = observed(la)
    la.mean = la.mean
    for old, new in zip(before, observed(la), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "blockdiag"])
def test_data_add_to_an_assigned_curvature(structure):
    la = fitted("all", structure)
    la.H = doubled(la.H)
    la.fit([data()], override=False)
    assert la.n_data == 40
    if structure == "kron":
        G, A = fitted("all", structure).H_facs.kfacs[2]
        # Twice a product is √2 on each side; G adds up, A is the mean over 20 and 20 rows.
        assert_close(la.H_facs.kfacs[2][0], (2**0.5 + 1) * G)
        assert_close(la.H_facs.kfacs[2][1], (2**0.5 + 1) / 2 * A)
    else:
        assert_close(dense(la.H), 3 * dense(fitted("all", structure).H))


def test_factors_may_be_assigned_as_they_are_read():
    la = fitted("all", "kron")
    factors, before = la.H_facs, dense(la.H)
    la.H = factors
    assert_close(dense(la.H), before)


def bad_values(structure: str, n: int) -> list[tuple[Any, type[Exception], str]]:
    factors = fitted("all", "kron").H_facs
    some = {
        "full": [
            (torch.zeros(n), ShapeError, r"shape \[26, 26\]; got \[26\]"),
            (torch.full((n, n), torch.nan), InputError, "must be finite"),
            (torch.arange(float(n * n)).reshape(n, n), InputError, "symmetric"),
            (factors, InputError, "number or a tensor"),
        ],
        "diag": [
            (torch.zeros(n, n), ShapeError, r"shape \[26\]; got \[26, 26\]"),
            (torch.full((n,), torch.inf), InputError, "must be finite"),
            (None, InputError, "number or a tensor"),
        ],
        "kron": [
            (torch.zeros(n, n), InputError, "laplace.utils.Kron"),
            (Kron(factors.kfacs[:-1]), ShapeError, "list of 4"),
            (Kron([[torch.eye(3)] * len(block) for block in factors.kfacs]), ShapeError, r"H\[0\]\[0\]"),
            (Kron([[side * torch.nan for side in block] for block in factors.kfacs]), InputError, "finite"),
            (fitted("all", "kron").posterior_precision, InputError, "prior precision"),
        ],
        "blockdiag": [
            (torch.zeros(n, n), InputError, "list of 4"),
            ([torch.zeros(2, 2)] * 4, ShapeError, r"H\[0\]"),
            ([torch.zeros(2, 2)], ShapeError, "got 1"),
        ],
        "ekfac": [(torch.zeros(n, n), InputError, "EKFACPrecision"), (factors, InputError, "EKFACPrecision")],
        "lowrank": [
            (torch.zeros(n, n), InputError, "list of 2"),
            ((torch.ones(n, 2), torch.ones(2)), InputError, "orthonormal"),
            ((torch.zeros(n, 2), torch.ones(3)), ShapeError, r"\[26, 3\]"),
        ],
    }
    return some[structure]


@pytest.mark.parametrize("before_fit", [True, False])
@pytest.mark.parametrize("structure", ["full", "diag", "kron", "blockdiag", "ekfac", "lowrank"])
def test_a_curvature_that_does_not_fit_is_refused_and_nothing_changes(structure, before_fit):
    la = make("all", structure) if before_fit else fitted("all", structure)
    before = dense(la.H), la.mean
    for value, error, message in bad_values(structure, la.n_params):
        with pytest.raises(error, match=message):
            la.H = value
    assert torch.equal(dense(la.H), before[0])
    assert torch.equal(la.mean, before[1])


@every_kind
def test_a_mean_that_does_not_fit_is_refused_and_nothing_changes(subset, structure):
    la = fitted(subset, structure)
    before = la.mean
    for value, error in (
        (torch.zeros(5), ShapeError),
        (0.0, ShapeError),
        (before * torch.nan, InputError),
        ("x", InputError),
    ):
        with pytest.raises(error, match="mean"):
            la.mean = value
    assert torch.equal(la.mean, before)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_posterior_over_functions_takes_no_curvature_and_says_which_do(subset):
    la = make(subset, "gp", n_subset=5)
    for name in ("mean", "H"):
        with pytest.raises(UnsupportedError, match=r"cannot be assigned: call fit.*'diag'"):
            setattr(la, name, torch.zeros(3))
    with pytest.raises(NotFittedError, match=r"fit\("):
        la.mean  # noqa: B018


def test_a_noise_for_each_output_scales_an_assigned_curvature_of_the_last_layer():
    done = fitted("last_layer", "diag", sigma_noise=torch.tensor([0.5, 2.0], **DOUBLE))
    la = make("last_layer", "diag", sigma_noise=torch.tensor([0.5, 2.0], **DOUBLE))
    la.H = done.H
    assert_close(la.posterior_precision, done.posterior_precision)
    other = make("last_layer", "diag", sigma_noise=torch.ones(3))
    with pytest.raises(ShapeError, match="the model has 2"):
        other.H = done.H
