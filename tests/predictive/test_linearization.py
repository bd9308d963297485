"""Linearized networks and heads, their pairs and their spectral coordinates, against written-out Jacobians."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from laplace.curvature.by_autograd import WrittenOut
from laplace.errors import ShapeError, UnsupportedError
from laplace.predictive import Linearization, NetworkLinearization, Options, compare
from laplace.predictive.pairs import Pairs, against_zero
from laplace.predictive.pushforward import output_moments, samples_of_moments
from laplace.predictive.spectral import SpectralLinearization
from laplace.prior import GaussianPrior
from laplace.structures import DiagPrecision, FullCurvature, FullPrecision
from tests.cases import named as case_named
from tests.contracts import generator
from tests.gp.samples import last_layer, whole_network
from tests.networks import named as network_named
from tests.structures.samples import psd, uniform
from tests.tools import assert_close, assert_covariance_of

F64 = torch.float64


class Situation(NamedTuple):
    """Inputs, their Jacobian ``[rows, C, P]``, and whether they are of a last layer."""

    inputs: NetworkLinearization
    J: Tensor
    linear: bool


def situation(kind: str, name: str) -> Situation:
    thing: Any = case_named(name) if kind == "head" else network_named(name)
    x = thing.data(n_rows=3, shift=2)[0]
    inputs = last_layer(thing, x) if kind == "head" else whole_network(thing, x)
    J = thing.problem().jacobian(x).flatten(0, 1)
    return Situation(inputs, J, kind == "head")


SITUATIONS = (
    ("head", "classification"),
    ("head", "positions_regression"),
    ("head", "no_bias_regression"),
    ("network", "mlp"),
    ("network", "positions"),
    ("network", "conv2d"),
)
"""Made within a test: models and data are in the precision that tests have."""
everywhere = pytest.mark.parametrize("here", SITUATIONS, ids="-".join, indirect=True)


@pytest.fixture
def here(request: pytest.FixtureRequest) -> Situation:
    return situation(*request.param)


def precisions(P: int) -> list[Any]:
    return [DiagPrecision(uniform(P)), FullPrecision(psd(P, 1, 3) + torch.diag(uniform(P, 2)))]


def covariance(J: Tensor, precision: Any) -> Tensor:
    """J A⁻¹ Jᵀ over rows and outputs."""
    flat = J.flatten(0, 1)
    return flat @ precision.to_dense().inverse() @ flat.T


def own(cov: Tensor, rows: int) -> Tensor:
    """The block of each row."""
    return cov.view(rows, -1, rows, cov.shape[0] // rows).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


@everywhere
def test_moments_are_those_of_the_jacobian(here):
    rows, C, P = here.J.shape
    for precision in precisions(P):
        joint = covariance(here.J, precision)
        assert_close(here.inputs.joint_covariance(precision, F64), joint)
        assert_close(here.inputs.covariance(precision, F64), own(joint, rows))
        assert_close(here.inputs.variance(precision, F64), joint.diagonal().view(rows, C))
    twice, other = precisions(P)
    found = list(here.inputs.variances([twice, twice, other], F64))
    assert found[0] is found[1]
    assert_close(found[2], here.inputs.variance(other, F64))
    assert_close(here.inputs.mean(F64), here.inputs.f.reshape(-1, C))
    assert here.inputs.n_outputs == C


@everywhere
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_few_columns_at_a_time_are_the_same(here, step, monkeypatch):
    precision = precisions(here.J.shape[2])[0]
    expected = here.inputs.variance(precision, F64)
    monkeypatch.setattr(type(here.inputs.derivatives), "n_columns_at_once", property(lambda self: step))
    assert_close(here.inputs.variance(precision, F64), expected)
    drawn = torch.cat(list(here.inputs.functions(precision, 2, generator(1), F64)))
    z = precision.sample(2, generator(1))
    assert_close(drawn, here.inputs.mean(F64) + torch.einsum("rcp,sp->src", here.J, z))


@everywhere
def test_blocks_of_some_columns_are_those_columns(here):
    n, rows = here.inputs.n_columns, here.inputs.blocks(F64)[0].n_rows
    J = here.J.reshape(rows, n, -1)
    for start, stop in ((0, None), (1, 2), (0, n + 3), (n - 1, n)):
        found = torch.cat([block.dense() for block in here.inputs.blocks(F64, start, stop)], -1).transpose(0, 1)
        assert_close(found, J[:, start:stop])


@everywhere
def test_functions_are_draws_of_the_weights_where_these_are_fewer_numbers(here):
    rows, C, P = here.J.shape
    precision, n_samples = precisions(P)[0], min(3, rows * C - 1)
    drawn = torch.cat(list(here.inputs.functions(precision, n_samples, generator(1), F64)))
    z = precision.sample(n_samples, generator(1))
    assert drawn.shape == (n_samples, rows, C)
    assert_close(drawn, here.inputs.mean(F64) + torch.einsum("rcp,sp->src", here.J, z))


def test_functions_of_a_network_are_drawn_in_function_space_where_outputs_are_fewer():
    here, n = situation("network", "mlp"), 20_000
    precision = precisions(here.J.shape[2])[1]
    drawn = torch.cat(list(here.inputs.functions(precision, n, generator(1), F64)))
    assert_covariance_of(drawn.flatten(1), here.inputs.f.flatten(), covariance(here.J, precision))
    head = situation("head", "classification")
    precision = precisions(head.J.shape[2])[0]
    z = precision.sample(500, generator(1))
    drawn = torch.cat(list(head.inputs.functions(precision, 500, generator(1), F64)))
    assert_close(drawn, head.inputs.mean(F64) + torch.einsum("rcp,sp->src", head.J, z))
    assert_close(torch.cat(list(head.inputs.network_functions(precision, 500, generator(1), F64))), drawn)


def test_functions_of_the_network_itself_are_its_outputs_at_drawn_weights():
    network = network_named("mlp")
    here, model = situation("network", "mlp"), network.model()
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    x = network.data(n_rows=3, shift=2)[0]

    def evaluate(weights: Tensor) -> Tensor:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(weights, model.parameters())
            return model(x)

    inputs, precision = replace(here.inputs, evaluate=evaluate, theta=theta), precisions(len(theta))[0]
    drawn = torch.cat(list(inputs.network_functions(precision, 3, generator(2), F64)))
    expected = [evaluate(theta + z) for z in precision.sample(3, generator(2))]
    assert_close(drawn, torch.stack(expected))


def some_head(*shape: int, seed: int = 0) -> NetworkLinearization:
    noise = generator(seed)
    f, phi = (torch.randn(*shape, n, generator=noise, dtype=F64) for n in (3, 4))
    return NetworkLinearization.of_head(f, phi, [(3, 4), (3,)])


@pytest.mark.parametrize("shapes", [[(3, 2), (1, 2)], [(3, 2), (2, 5)], [(2,), (4,), (1,)]], ids=str)
def test_rows_of_heads_follow_one_another_and_are_selected(shapes):
    first, *others = parts = [some_head(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    together, precision = first.followed_by(others), precisions(15)[1]
    assert_close(together.mean(F64), torch.cat([part.mean(F64) for part in parts]))
    assert_close(together.covariance(precision, F64), torch.cat([part.covariance(precision, F64) for part in parts]))
    same_positions = len({shape[1:] for shape in shapes}) == 1
    assert together.f.shape[1:-1] == (shapes[0][1:] if same_positions else ())
    rows = torch.tensor([3, 0])
    chosen = together.select(rows)
    assert chosen.f.shape == (2, 3)
    assert_close(chosen.mean(F64), together.mean(F64)[rows])
    assert_close(chosen.covariance(precision, F64), together.covariance(precision, F64)[rows])


def test_outputs_without_derivatives_have_no_moments():
    here = situation("network", "mlp")
    bare = replace(here.inputs, derivatives=None)
    with pytest.raises(UnsupportedError, match="without derivatives"):
        bare.variance(precisions(here.J.shape[2])[0], F64)
    assert bare.kept(bare.f.numel()) == (bare, bare.f.numel())
    assert bare.kept(bare.f.numel() - 1) is None


@everywhere
def test_what_is_kept_gives_the_same_and_says_its_size(here):
    precision = precisions(here.J.shape[2])[1]
    kept, size = here.inputs.kept(10**9)
    assert_close(kept.covariance(precision, F64), here.inputs.covariance(precision, F64))
    assert_close(kept.variance(precision, F64), here.inputs.variance(precision, F64))
    if here.linear:
        assert size == here.inputs.f.numel()
        return
    blocks = kept.blocks(F64)
    assert size == here.inputs.f.numel() + sum(block.size for block in blocks)
    assert here.inputs.kept(0) is None
    one = [block.size for block in here.inputs.blocks(F64, 0, 1)]
    written = [block.n_rows * block.n_params for block in blocks]
    least = sum(min(pair) for pair in zip(one, written, strict=True)) * here.inputs.n_columns + here.inputs.f.numel()
    assert here.inputs.kept(least) is not None
    assert here.inputs.kept(least - 1) is None


# -- pairs ------------------------------------------------------------------------------------------------------------


def pairs(kind: str) -> tuple[Linearization, Tensor]:
    """Scores of pairs, and their Jacobian ``[pairs, 2, P]``."""
    if kind == "network":
        noise = generator(8)
        f, J = torch.randn(4, 2, 1, generator=noise).double(), torch.randn(4, 2, 9, generator=noise).double()
        inputs = NetworkLinearization(f, WrittenOut(f, J, (6, 3)), lambda theta: f, torch.zeros(9).double())
        return inputs, J
    thing = case_named("preferences")
    x = thing.data(n_rows=4, shift=2)[0]
    inputs = last_layer(thing, x)
    return inputs, thing.problem().jacobian(x).reshape(len(inputs.f), 2, -1)


@pytest.mark.parametrize("kind", ["head", "network"])
def test_pairs_are_the_difference_of_their_scores_and_zero(kind):
    scores, J = pairs(kind)
    gap = J[:, 0] - J[:, 1]
    compared, f = compare(scores), scores.f.reshape(-1, 2)
    assert isinstance(compared, Pairs)
    logits = torch.stack([f[:, 0] - f[:, 1], torch.zeros(len(f)).double()], 1)
    assert_close(compared.f, logits)
    assert_close(compared.mean(F64), logits)
    assert compared.is_linear is (kind == "head")
    for precision in precisions(J.shape[2]):
        variance = torch.einsum("np,pq,nq->n", gap, precision.to_dense().inverse(), gap)
        both = torch.stack([variance, torch.zeros_like(variance)], 1)
        assert_close(compared.variance(precision, F64), both)
        assert_close(compared.covariance(precision, F64), torch.diag_embed(both))
        assert_close(compared.pair_variance(precision, F64), variance.unsqueeze(1))
    precision = precisions(J.shape[2])[0]
    drawn = torch.cat(list(compared.functions(precision, 3, generator(3), F64)))
    of_scores = torch.cat(list(scores.functions(precision, 3, generator(3), F64))).view(3, -1, 2)
    assert drawn.shape == (3, len(f), 2)
    assert_close(drawn[..., 0], of_scores[..., 0] - of_scores[..., 1])
    assert not drawn[..., 1].any()
    with pytest.raises(UnsupportedError, match="no joint covariance"):
        compared.joint_covariance(precision, F64)


def test_pairs_are_kept_rotated_and_joined_by_their_scores():
    scores, J = pairs("head")
    compared, precision = compare(scores), precisions(J.shape[2])[1]
    kept, size = compared.kept(10**6)
    assert size == scores.kept(10**6)[1]
    assert compared.kept(1) is None
    curvature, prior = (
        FullCurvature(psd(J.shape[2], 4)),
        GaussianPrior(torch.zeros(()).double(), uniform(1), (J.shape[2],)),
    )
    basis = curvature.basis(prior)
    turned = kept.rotated(basis, F64)
    there, here = basis.posterior(curvature, prior), curvature.posterior(prior)
    assert_close(turned.variance(there, F64), compared.variance(here, F64))
    twice = compared.followed_by([compared])
    assert_close(twice.f, torch.cat([compared.f, compared.f]))
    assert_close(twice.variance(precision, F64), torch.cat([compared.variance(precision, F64)] * 2))
    first = list(compared.network_functions(precision, 2, generator(0), F64))
    assert_close(torch.cat(first), torch.cat(list(compared.functions(precision, 2, generator(0), F64))))


def test_other_outputs_than_two_scores_are_no_pairs():
    assert against_zero(torch.tensor([[3.0, 1.0]])).tolist() == [[2.0, 0.0]]
    for shape in ((4, 3, 1), (4, 2, 2), (4, 3)):
        inputs = replace(situation("network", "mlp").inputs, f=torch.zeros(shape).double())
        with pytest.raises(ShapeError, match="probabilities of pairs"):
            compare(inputs)


# -- spectral coordinates ---------------------------------------------------------------------------------------------


@everywhere
def test_in_spectral_coordinates_all_is_the_same(here, monkeypatch):
    rows, C, P = here.J.shape
    prior = GaussianPrior(torch.zeros(()).double(), uniform(1), (P,))
    curvature = FullCurvature(psd(P, 5, 4))
    basis = curvature.basis(prior)
    there, dense = basis.posterior(curvature, prior), curvature.posterior(prior)
    joint = covariance(here.J, dense)
    enough = here.inputs.f.numel() * P
    for limit in (enough, enough - 1):
        monkeypatch.setattr("laplace.predictive.spectral.KEPT_SQUARES", limit)
        turned = here.inputs.rotated(basis, F64)
        assert isinstance(turned, SpectralLinearization)
        assert turned.rotated(basis, F64) is turned
        assert_close(turned.variance(there, F64), joint.diagonal().view(rows, C))
        assert bool(turned._squares) is (limit == enough)
        assert_close(turned.variance(there, F64), joint.diagonal().view(rows, C))
        assert_close(turned.covariance(there, F64), own(joint, rows))
        assert_close(turned.joint_covariance(there, F64), joint)
    z = there.sample(3, generator(7))
    drawn = torch.cat(list(turned.functions(there, 3, generator(7), F64)))
    JQ = here.J @ basis.eigenvectors
    assert_close(drawn, here.inputs.mean(F64) + torch.einsum("rcp,sp->src", JQ, z))
    different = [basis.posterior(curvature, prior), there, there]
    for found in turned.variances(different, F64):
        assert_close(found, joint.diagonal().view(rows, C))


def test_pairs_in_spectral_coordinates():
    scores, J = pairs("network")
    P = J.shape[2]
    prior, curvature = GaussianPrior(torch.zeros(()).double(), uniform(1), (P,)), FullCurvature(psd(P, 5, 4))
    basis = curvature.basis(prior)
    gap = J[:, 0] - J[:, 1]
    variance = torch.einsum("np,pq,nq->n", gap, curvature.posterior(prior).to_dense().inverse(), gap)
    turned = scores.rotated(basis, F64)
    assert_close(turned.pair_variance(basis.posterior(curvature, prior), F64), variance.unsqueeze(1))


# -- moments handed out and drawn again -------------------------------------------------------------------------------


@everywhere
def test_moments_that_users_get_are_those_and_samples_of_them_have_them(here):
    rows, C, P = here.J.shape
    precision, n = precisions(P)[1], 20_000
    joint = covariance(here.J, precision)
    lead = here.inputs.f.shape[:-1]
    mean, cov = output_moments(here.inputs, precision, F64, joint=True, diagonal=False)
    assert_close(mean, here.inputs.f.flatten())
    assert_close(cov, joint)
    drawn = samples_of_moments(mean, cov, Options(n_samples=n, generator=generator(1)), diagonal=False)
    assert_covariance_of(drawn, mean, joint)
    mean, cov = output_moments(here.inputs, precision, F64, joint=False, diagonal=False)
    assert_close(cov, own(joint, rows).reshape(*lead, C, C))
    drawn = samples_of_moments(mean, cov, Options(n_samples=n, generator=generator(1)), diagonal=False)
    assert drawn.shape == (n, *mean.shape)
    assert_covariance_of(drawn.reshape(n, rows, C)[:, -1], mean.reshape(rows, C)[-1], own(joint, rows)[-1])
    mean, variance = output_moments(here.inputs, precision, F64, joint=False, diagonal=True)
    assert_close(variance, joint.diagonal().view(*lead, C))
    for spread, diagonal in ((variance, True), (variance, False), (cov, True)):
        drawn = samples_of_moments(mean, spread, Options(n_samples=n, generator=generator(1)), diagonal=diagonal)
        last = drawn.reshape(n, rows, C)[:, -1]
        assert_covariance_of(last, mean.reshape(rows, C)[-1], torch.diag(variance.reshape(rows, C)[-1]))
