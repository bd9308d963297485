"""The curvature of a subset: additive, shared between priors, and what stands for the data that are not in it."""

from dataclasses import replace

import pytest
import torch

from laplace.gp.kernel import SubsetKernel
from laplace.gp.subset_curvature import SubsetCurvature
from laplace.prior import GaussianPrior
from tests.contracts import check_curvature
from tests.gp.samples import F64
from tests.gp.subsets import KINDS, Sample, sample
from tests.gp.test_kernel import roots
from tests.tools import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
weights = pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in KINDS if kind != "separate"])


def prior_of(here: Sample, delta: float | torch.Tensor = 1.3) -> GaussianPrior:
    return GaussianPrior(torch.zeros(()), torch.as_tensor(delta, dtype=F64).reshape(1), (here.kernel.n_params,))


def dense(here: Sample, root: torch.Tensor) -> torch.Tensor:
    return here.precision(root, 0.0)


@pytest.mark.parametrize(
    ("kind", "name"), [("whole", "mlp"), ("last", "classification"), ("last", "no_bias_regression")]
)
def test_it_is_a_curvature(kind, name):
    here = sample(kind, name)
    for root in roots(here):
        other = 0.5 * root.flip(0)
        first, second = SubsetCurvature(here.kernel, root), SubsetCurvature(here.kernel, other)
        parts = dense(here, root), dense(here, other)
        check_curvature(first, second, parts[0] + parts[1], parts, prior_of(here))


@weights
def test_the_subset_stands_for_all_data(kind, name):
    here = sample(kind, name)
    for root in roots(here):
        H, ratio = dense(here, root), 2.5
        curvature, prior = SubsetCurvature(here.kernel, root, ratio) * 1.7, prior_of(here)
        eye = torch.eye(len(H))
        A = 1.7 * H + 1.3 * ratio * eye
        assert_close(curvature.posterior(prior).to_dense(), A, "prior times N/M")
        assert_close(curvature.posterior_logdet(prior), A.logdet(), "that of the posterior")
        everything = (1.7 * ratio * H + 1.3 * eye).logdet()
        assert_close(curvature.log_det_ratio(prior), everything - prior.logdet(), "the evidence sees N/M H")


@weights
def test_the_log_determinant_is_differentiable(kind, name):
    here = sample(kind, name)
    for root in roots(here):
        H, eye = dense(here, root), torch.eye(here.kernel.n_params)
        delta, scale = torch.tensor(1.3, requires_grad=True), torch.tensor(0.7, requires_grad=True)
        found = (SubsetCurvature(here.kernel, root) * scale).log_det_ratio(prior_of(here, delta))
        truth = (scale * H + delta * eye).logdet() - len(H) * delta.log()
        assert_close(found, truth)
        for ours, theirs in zip(*(torch.autograd.grad(v, (delta, scale)) for v in (found, truth)), strict=True):
            assert_close(ours, theirs, "slope")


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_in_the_basis_posteriors_are_diagonal(kind, name):
    here = sample(kind, name)
    for root in roots(here):
        curvature = SubsetCurvature(here.kernel, root, 1.5) * 0.7
        basis = curvature.basis(prior_of(here))
        found = basis.posterior(curvature, prior_of(here)).vector.view(len(basis.eigenvalues), -1)
        assert_close(found[:, 0], torch.full((len(found),), 1.3 * 1.5), "what is left of the prior")
        expected = torch.linalg.eigvalsh(0.7 * here.kernel.gram(root)) + 1.3 * 1.5
        assert_close(found[:, 1:], expected)
        white = basis.whitening
        unit = white.mT @ here.kernel.gram(root) @ white
        assert_close(unit, torch.diag_embed((unit.diagonal(dim1=1, dim2=2) > 0.5).double()), "whitened, or not spanned")


def test_noise_by_output_scales_the_roots_of_outputs():
    here = sample("last", "positions_regression")
    scale = torch.tensor([0.5, 2.0], requires_grad=True)
    kernel = here.kernel
    weight = scale.repeat_interleave(kernel.head.augmented.shape[1] - 1)
    factors = torch.cat([weight, scale])
    for root in roots(here):
        found = SubsetCurvature(kernel, root).scale_weights(factors)
        half = factors.detach().sqrt()
        assert_close(found.to_dense(), half.unsqueeze(1) * dense(here, root) * half)
        (slope,) = torch.autograd.grad(found.log_det_ratio(prior_of(here)), scale)
        truth = (
            factors.sqrt().unsqueeze(1) * dense(here, root) * factors.sqrt() + 1.3 * torch.eye(len(factors))
        ).logdet()
        assert_close(slope, *torch.autograd.grad(truth, scale))


def test_gram_and_eigenvalues_are_shared_by_multiples():
    here = sample("last", "classification")
    curvature = SubsetCurvature(here.kernel, here.roots(diagonal=False))
    assert (curvature * 2.0).eigenvalues is curvature.eigenvalues
    assert (curvature * 2.0).gram is curvature.gram
    assert curvature.merge(curvature).gram.shape[1] == 2 * curvature.gram.shape[1]


def test_curvature_that_is_not_finite_is_seen():
    here = sample("last", "classification")
    root = here.roots(diagonal=False)
    assert SubsetCurvature(here.kernel, root).is_finite
    assert not SubsetCurvature(here.kernel, root * torch.inf).is_finite
    assert not SubsetCurvature(
        SubsetKernel.of_head(replace(here.kernel.head, phis=tuple(phi * 1e200 for phi in here.kernel.head.phis))), root
    ).is_finite


def test_state_describes_the_curvature():
    here = sample("last", "classification")
    curvature = SubsetCurvature(here.kernel, here.roots(diagonal=False), 2.0)
    again = SubsetCurvature.from_state(curvature.state(), F64)
    assert again.ratio == 2.0
    assert torch.equal(again.gram, curvature.gram)
