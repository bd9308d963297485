"""Inputs of a process under its posterior, as they are and in the eigenbasis of the subset, against dense algebra."""

import pytest
import torch

from laplace.errors import UnsupportedError
from laplace.gp.process import Process, ProcessLinearization, RotatedProcess
from laplace.gp.subset_curvature import SubsetCurvature
from laplace.structures import AbstractPrecision
from tests.contracts import generator, of_head
from tests.gp.samples import F64
from tests.gp.subsets import KINDS, N_INPUTS, Sample, sample
from tests.gp.test_kernel import roots
from tests.gp.test_subset_curvature import prior_of
from tests.tools import assert_close, assert_covariance_of

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
everywhere = pytest.mark.parametrize(("kind", "name"), KINDS)
DELTAS = (0.1, 1.3, 20.0)


def both(here: Sample, root: torch.Tensor, delta: float) -> list[tuple[Process, AbstractPrecision]]:
    """The same posterior by factorization and in the eigenbasis."""
    curvature, prior = SubsetCurvature(here.kernel, root), prior_of(here, delta)
    inputs, basis = ProcessLinearization(here.inputs, here.kernel, F64), curvature.basis(prior)
    rotated = inputs.rotated(basis, F64)
    assert isinstance(rotated, RotatedProcess)
    return [(inputs, curvature.posterior(prior)), (rotated, basis.posterior(curvature, prior))]


@everywhere
def test_covariances_are_those_of_the_process(kind, name):
    here = sample(kind, name)
    n = len(here.J_inputs)
    for root in roots(here):
        for delta in DELTAS:
            truth = here.covariance(root, delta)
            blocks = truth.view(n, here.n_outputs, n, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            for inputs, posterior in both(here, root, delta):
                assert_close(inputs.joint_covariance(posterior, F64), truth, "joint")
                assert_close(inputs.covariance(posterior, F64), blocks, "covariance")
                assert_close(inputs.variance(posterior, F64), blocks.diagonal(dim1=1, dim2=2), "variance")


@everywhere
def test_variances_under_many_priors_are_those_under_each(kind, name):
    here = sample(kind, name)
    for root in roots(here):
        curvature = SubsetCurvature(here.kernel, root)
        basis = curvature.basis(prior_of(here))
        inputs = ProcessLinearization(here.inputs, here.kernel, F64).rotated(basis, F64)
        posteriors = [basis.posterior(curvature, prior_of(here, delta)) for delta in DELTAS]
        twice = [list(inputs.variances(posteriors, F64)) for _ in range(2)]
        for first, second, delta in zip(*twice, DELTAS, strict=True):
            assert torch.equal(first, second)
            assert_close(first.flatten(), here.covariance(root, delta).diagonal().clone())
        assert inputs.rotated(basis, F64) is inputs


@pytest.mark.parametrize(("kind", "name"), [("whole", "positions"), ("last", "positions_regression")])
def test_chunks_of_rows_give_the_same(kind, name, monkeypatch):
    here = sample(kind, name)
    root = roots(here)[0]
    (_, _), (rotated, posterior) = both(here, root, 1.0)
    expected = rotated.variance(posterior, F64)
    monkeypatch.setattr("laplace.gp.process.chunk_elements", lambda device: 1)
    monkeypatch.setattr("laplace.gp.process.KEPT_SQUARES", 0)
    again = both(here, root, 1.0)[1][0]
    assert_close(again.variance(posterior, F64), expected)
    assert isinstance(again, RotatedProcess)
    assert not again._squares


@pytest.mark.parametrize(("kind", "name"), [("whole", "mlp"), ("last", "classification")])
def test_functions_have_the_joint_distribution(kind, name):
    here = sample(kind, name)
    root = roots(here)[0]
    truth = here.covariance(root, 1.3)
    for inputs, posterior in both(here, root, 1.3):
        drawn = torch.cat(list(inputs.functions(posterior, 20_000, generator(0), F64)))
        assert drawn.shape == (20_000, N_INPUTS, here.n_outputs)
        assert_covariance_of(drawn.flatten(1), inputs.f.flatten(), truth)


@everywhere
def test_what_is_kept_predicts_the_same(kind, name):
    here = sample(kind, name)
    root = roots(here)[0]
    (inputs, posterior), _ = both(here, root, 1.3)
    assert inputs.kept(0) is None
    found = inputs.kept(10**9)
    assert found is not None
    kept, size = found
    assert size > inputs.f.numel()
    assert_close(kept.variance(posterior, F64), inputs.variance(posterior, F64))
    assert_close(kept.joint_covariance(posterior, F64), inputs.joint_covariance(posterior, F64))


def test_variances_are_differentiable_in_the_inputs():
    here = sample("last", "classification")
    root = here.roots(diagonal=False)
    phi = here.inputs.head[0].phi.clone().requires_grad_(True)  # pyright: ignore[reportAttributeAccessIssue]
    posterior = both(here, root, 1.3)[0][1]

    def variance(phi: torch.Tensor) -> torch.Tensor:
        inputs = of_head(here.inputs.f, phi)
        return ProcessLinearization(inputs, here.kernel, F64).variance(posterior, F64)

    assert torch.autograd.gradcheck(variance, (phi,))


def test_a_basis_rotates_no_bare_features():
    here = sample("last", "classification")
    basis = SubsetCurvature(here.kernel, here.roots(diagonal=False)).basis(prior_of(here))
    with pytest.raises(UnsupportedError, match="ProcessLinearization"):
        basis.blocks([])
