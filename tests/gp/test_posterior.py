"""Posteriors over functions: pairs, samples and what is kept."""

import pytest
import torch

from laplace.errors import UnsupportedError
from laplace.gp import variational
from laplace.gp.nystrom import NystromMap, leading_directions
from laplace.gp.posterior import FeatureMap, FeaturePrecision, FunctionLinearization
from laplace.gp.variational import InducingMap
from laplace.predictive.pairs import compare
from laplace.structures.basis import DenseBasis
from tests.cases import named as case_named
from tests.gp.samples import F64, situation
from tests.networks import named
from tests.tools import assert_close, assert_covariance_of

kinds = pytest.mark.parametrize("kind", ["nystrom", "inducing"])


def build(thing, kind: str) -> tuple[FunctionLinearization, FeaturePrecision]:
    here = situation(thing)
    features: FeatureMap = NystromMap(leading_directions(here.points, 4))
    if kind == "inducing":
        features = InducingMap(here.points, variational.kernel_factor(here.points))
    inputs = FunctionLinearization.of(here.inputs, features, F64)
    K = inputs.phi.shape[-1]
    half = torch.randn(K, K)
    return inputs, FeaturePrecision.of(half @ half.T, torch.tensor(0.6))


@kinds
def test_functions_are_draws_from_the_joint_posterior(kind):
    inputs, precision = build(named("mlp_regression"), kind)
    noise = torch.Generator().manual_seed(0)
    samples = torch.cat(list(inputs.functions(precision, 20000, noise, F64))).flatten(1)
    assert_covariance_of(samples, inputs.f.flatten(), inputs.joint_covariance(precision, F64))


@kinds
def test_pairs_are_differences_of_scores(kind):
    scores, precision = build(case_named("preferences"), kind)
    joint = scores.joint_covariance(precision, F64)  # [4, 4]: two pairs
    difference = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]])
    expected = (difference @ joint @ difference.T).diagonal()
    assert_close(compare(scores).variance(precision, F64)[:, 0], expected)


def test_outputs_and_features_are_kept_and_nothing_is_rotated():
    inputs, _ = build(named("mlp"), "nystrom")
    assert inputs.kept(10**6) == (inputs, inputs.f.numel() + inputs.phi.numel())
    assert inputs.kept(3) is None
    with pytest.raises(UnsupportedError, match="not rotated"):
        inputs.rotated(DenseBasis(lambda curvature, prior: curvature, torch.eye(2)), F64)
