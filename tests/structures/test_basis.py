"""Coordinates that posteriors of one curvature share."""

import pytest
import torch

from laplace import Laplace
from laplace.errors import NotPositiveDefiniteError
from laplace.structures import FullCurvature, Kron, KronCurvature
from laplace.structures.basis import DenseBasis, RotatedGroups
from tests.contracts import generator, of_head
from tests.structures.samples import PER_LAYER, PER_WEIGHT, SCALAR, C, D, P, prior, psd
from tests.tools import assert_close

F64 = torch.float64
G = psd(C, 0)
CURVATURES = {
    "full": FullCurvature(psd(P, 1)),
    "kron": KronCurvature(Kron([[G, psd(D, 2)], [G]]), (5, 5)),
}
INPUTS = of_head(
    torch.randn(6, C, dtype=F64, generator=generator(0)), torch.randn(6, D, dtype=F64, generator=generator(1))
)


def rotated(curvature, precision):
    basis = curvature.basis(prior(precision))
    return basis, INPUTS.rotated(basis, F64)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", CURVATURES)
def test_predictions_in_shared_coordinates_are_those_of_the_posterior(name, scale):
    curvature = CURVATURES[name]
    basis, inputs = rotated(curvature, SCALAR)
    precisions = [SCALAR * 10.0**power for power in (-2, 0, 3)]
    if name == "kron":
        precisions.append(PER_LAYER)
    there = [basis.posterior(curvature * scale, prior(precision)) for precision in precisions]
    here = [(curvature * scale).posterior(prior(precision)) for precision in precisions]
    for fast, exact, variance in zip(there, here, inputs.variances(there, F64), strict=True):
        assert_close(variance, INPUTS.variance(exact, F64))
        assert_close(inputs.variance(fast, F64), INPUTS.variance(exact, F64))
        assert_close(inputs.covariance(fast, F64), INPUTS.covariance(exact, F64))
        assert_close(inputs.joint_covariance(fast, F64), INPUTS.joint_covariance(exact, F64))


@pytest.mark.parametrize("name", CURVATURES)
def test_functions_drawn_there_have_the_same_covariance(name):
    curvature = CURVATURES[name]
    basis, inputs = rotated(curvature, SCALAR)
    posterior = basis.posterior(curvature, prior(SCALAR))
    samples = torch.cat(list(inputs.functions(posterior, 20000, generator(2), F64))).flatten(1)
    cov = INPUTS.joint_covariance(curvature.posterior(prior(SCALAR)), F64)
    errors = ((cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / 20000).sqrt()
    assert bool(((samples.T.cov() - cov).abs() <= 5 * errors).all())


def test_kinds_of_coordinates():
    assert isinstance(CURVATURES["full"].basis(prior(SCALAR)), DenseBasis)
    assert CURVATURES["full"].basis(prior(PER_WEIGHT)) is None
    assert isinstance(CURVATURES["kron"].basis(prior(PER_LAYER)), RotatedGroups)


def test_differentiation_goes_through_shared_coordinates():
    for curvature in CURVATURES.values():
        basis, inputs = rotated(curvature, SCALAR)

        def variance(delta, scale, basis=basis, inputs=inputs, curvature=curvature):
            return inputs.variance(basis.posterior(curvature * scale, prior(delta)), F64)

        values = SCALAR.clone().requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(variance, values)


def test_an_indefinite_matrix_is_refused_and_rounding_is_not():
    indefinite = FullCurvature(torch.diag(torch.linspace(-1, 1, P, dtype=F64)))
    basis = indefinite.basis(prior(SCALAR))
    with pytest.raises(NotPositiveDefiniteError, match="GGN"):
        basis.posterior(indefinite, prior(SCALAR * 1e-3))
    rounding = FullCurvature(torch.diag(torch.tensor([1.0] + [-1e-16] * (P - 1), dtype=F64)))
    basis = rounding.basis(prior(SCALAR))
    assert bool((basis.posterior(rounding, prior(SCALAR * 1e-20)).vector > 0).all())


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")  # nobody trained this network
def test_a_convolution_over_many_pixels_is_rotated_once_for_every_prior(device):
    """Where the product of its factors is rotated instead of them, and not again by the posterior in those coordinates."""
    x = torch.randn(6, 2, 12, 12, dtype=F64, generator=generator(3)).to(device)
    y = torch.tensor([0, 1, 2, 0, 1, 2], device=device)
    layers = torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(300, 3)
    la = Laplace(torch.nn.Sequential(*layers).to(device, F64), "classification", "all", "kron")
    la.fit([(x, y)])
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y.flip(0))], grid_size=3)
    grid, scores = la.tuning_.points, la.tuning_.values
    for precision, score in zip(grid, scores, strict=True):
        la.prior_precision = float(precision)
        assert_close(score, -la(x).gather(1, y.flip(0)[:, None]).log().mean().cpu())
