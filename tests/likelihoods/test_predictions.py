"""Predictions, scores and energies of every likelihood against numerical integration of its density."""

import itertools
import re

import pytest
import torch
from torch import Tensor

from laplace.enums import LinkApprox, PredType
from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods import Ask, resolve
from tests.contracts import generator
from tests.likelihood_kinds import EVERY, KINDS, PROBABILITY_LINKS, ROWS, Kind, gaussian_grid
from tests.tools import assert_close, assert_mean_is, assert_within

ROWS_OF_F = 3
N = 20_000
ALPHAS = (0.0, 0.3, 1.0)
everyone = pytest.mark.parametrize(("kind", "n_outputs"), EVERY, ids=str)
every_kind = pytest.mark.parametrize("kind", ROWS, ids=str)
exact_energies = pytest.mark.parametrize(
    ("kind", "n_outputs"), [row for row in EVERY if not row[0].energy_error], ids=str
)


def asked(likelihood, link: str, **options) -> Ask:
    return likelihood.asks(PredType.GLM, LinkApprox(link), **{"joint": False, "diagonal_output": False, **options})


def moments(kind: Kind, link: str, n_outputs: int) -> tuple[Tensor, Tensor]:
    """Of outputs; bridges are good for independent logits of the size of variance that the second one scales to."""
    mean, cov = kind.moments(ROWS_OF_F, n_outputs)
    if link.startswith("bridge"):
        cov = (n_outputs / 2) ** 0.5 * n_outputs / (n_outputs - 1) * torch.eye(n_outputs).expand_as(cov)
    return mean, cov


def spreads(kind: Kind, likelihood, link: str, cov: Tensor) -> list[Tensor]:
    """Covariances, and variances where they may be asked for."""
    variances = link in kind.diagonal or asked(likelihood, link) is Ask.VARIANCE
    return [cov, cov.diagonal(dim1=1, dim2=2)] if variances else [cov]


def temperatures(kind: Kind) -> tuple[float, ...]:
    return (1.0, 2.5) if kind.of_logits else (1.0,)


def integral(mean: Tensor, spread: Tensor, function) -> Tensor:
    """E[function(f)] of f ~ N(mean, spread); the function is given [S, rows, C]."""
    f, mass = gaussian_grid(mean, spread)
    return torch.tensordot(mass, function(f), 1)


def log_integral(kind: Kind, mean: Tensor, spread: Tensor, y: Tensor, power: float) -> Tensor:
    """log E[p(y|f)^power] row by row, or at power 0 E[log p(y|f)]; of marginals where densities are those."""
    if kind.each_output and mean.shape[1] > kind.each_output:
        variances = spread if spread.dim() == 2 else spread.diagonal(dim1=1, dim2=2)
        each = [slice(c, c + 1) for c in range(mean.shape[1])]
        return sum(log_integral(kind, mean[:, c], variances[:, c], y[:, c], power) for c in each)
    f, mass = gaussian_grid(mean, spread)
    log_p = kind.log_density(f, y.expand(len(f), *y.shape))
    if power == 0:
        return torch.tensordot(mass, log_p, 1)
    return (mass.log().unsqueeze(-1) + power * log_p).logsumexp(0)


def probability_of(kind: Kind, probabilities: Tensor, y: Tensor) -> Tensor:
    return probabilities.gather(1, kind.classes(y).unsqueeze(1)).squeeze(1)


# -- predictions ------------------------------------------------------------------------------------------------------


@everyone
def test_predictions_are_integrals_over_the_outputs(kind, n_outputs):
    for T, (link, error) in itertools.product(temperatures(kind), kind.links.items()):
        mean, cov = moments(kind, link, n_outputs)
        mean, cov = (T * mean, T**2 * cov) if link.startswith("bridge") else (mean, cov)
        likelihood = resolve(kind.name, output_temperature=T).for_targets()
        for spread in spreads(kind, likelihood, link, cov):
            found = likelihood.predict(mean, spread, likelihood.link(LinkApprox(link), N, generator(0)))
            truth = integral(mean, spread, lambda f: kind.mean(f / T))  # noqa: B023
            if kind.classes is None:
                square = integral(mean, spread, lambda f: torch.einsum("src,srk->srck", g := kind.mean(f), g))
                covariance = square - torch.einsum("rc,rk->rck", truth, truth)
                assert_close(found[0], truth, f"mean, {link}")
                expected = covariance if spread.dim() == 3 else covariance.diagonal(dim1=1, dim2=2)
                assert_close(found[1], expected, f"covariance, {link}")
            elif link == "mc":
                square = integral(mean, spread, lambda f: kind.mean(f / T) ** 2)  # noqa: B023
                assert_within(found, truth, ((square - truth**2).clamp(min=0) / N).sqrt(), "mc")
            else:
                assert found.shape == truth.shape
                assert float((found - truth).abs().max()) < error, f"{link} at output temperature {T}"


@everyone
def test_variances_are_asked_for_only_where_they_are_enough(kind, n_outputs):
    mean, cov = kind.moments(ROWS_OF_F, n_outputs)
    likelihood = resolve(kind.name).for_targets()
    for link in kind.links:
        if asked(likelihood, link) is Ask.VARIANCE:
            if link != "mc":  # whose samples are others
                by_both = [
                    likelihood.predict(mean, spread, likelihood.link(LinkApprox(link), 1, None))
                    for spread in (cov, cov.diagonal(dim1=1, dim2=2))
                ]
                assert_close(*by_both, link)
        else:
            assert n_outputs > 1 or kind.classes is None
        if link in kind.diagonal:
            assert asked(likelihood, link, diagonal_output=True) is Ask.VARIANCE
    assert likelihood.asks(PredType.NN, LinkApprox.PROBIT, joint=False, diagonal_output=False) is Ask.FUNCTIONS


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind.classes is None], ids=str)
def test_joint_predictions_are_integrals_over_all_outputs_at_once(kind):
    mean, cov = kind.moments(1, kind.n_outputs[-1])
    likelihood = resolve(kind.name)
    assert asked(likelihood, "probit", joint=True) is Ask.JOINT
    found = likelihood.predict_joint(mean, cov[0])
    truth = integral(mean, cov, kind.mean)[0]
    square = integral(mean, cov, lambda f: torch.einsum("src,srk->srck", g := kind.mean(f), g))[0]
    assert_close(found[0], truth)
    assert_close(found[1], square - torch.outer(truth, truth))


@everyone
def test_averages_of_samples_are_what_they_are_of_the_density(kind, n_outputs):
    mean, cov = kind.moments(ROWS_OF_F, n_outputs)
    root = torch.linalg.cholesky(cov + 1e-30 * torch.eye(n_outputs)) if not kind.pairs else cov.sqrt()
    f = mean + torch.einsum("rck,src->srk", root.mT, torch.randn(4000, *mean.shape, generator=generator(1)))
    parts = [f[:1500], f[1500:1501], f[1501:]]
    for T in temperatures(kind):
        likelihood = resolve(kind.name, output_temperature=T).for_targets()
        assert_close(likelihood.expectation(f), kind.mean(f / T))
        found = likelihood.average(iter(parts), len(f), mean)
        predicted, g = likelihood.predict(*found), kind.mean(f / T)
        if kind.classes is None:
            assert_close(predicted[0], g.mean(0))
            assert_close(predicted[1], g.var(0))
        else:
            assert_close(predicted, g.mean(0))
        assert_mean_is(g, integral(mean, cov, lambda f: kind.mean(f / T)))  # noqa: B023


@everyone
def test_a_variance_needs_two_samples_and_a_probability_one(kind, n_outputs):
    f, likelihood = kind.outputs(ROWS_OF_F, n_outputs), resolve(kind.name).for_targets()
    if kind.classes is None:
        with pytest.raises(InputError, match="n_samples of at least 2; got 1"):
            likelihood.average(iter([f.unsqueeze(0)]), 1, f)
    else:
        assert_close(likelihood.predict(*likelihood.average(iter([f.unsqueeze(0)]), 1, f)), kind.mean(f))


@everyone
def test_the_variance_around_means_is_an_integral(kind, n_outputs):
    mean, cov = kind.moments(ROWS_OF_F, n_outputs)
    likelihood = resolve(kind.name)
    variance = cov.diagonal(dim1=1, dim2=2)
    if kind.pairs:
        assert likelihood.noise_variance(mean, variance) is None
        return
    if kind.variance is None:
        with pytest.raises(UnsupportedError, match=f"{kind.name}.*variance of its targets"):
            likelihood.noise_variance(mean, variance)
        return
    f = kind.outputs(2, n_outputs)
    numbers = kind.expect(f, lambda _, y: kind.numbers(y, n_outputs) ** 2) - kind.mean(f) ** 2
    assert_close(kind.variance(f), numbers, "variance of the table, by the density")
    assert_close(likelihood.noise_variance(mean, variance), integral(mean, variance, kind.variance))


# -- scores -----------------------------------------------------------------------------------------------------------


@everyone
def test_the_predictive_density_is_an_integral_or_the_predicted_probability(kind, n_outputs):
    mean, cov = kind.moments(ROWS_OF_F, n_outputs)
    y = kind.targets(mean)
    for T, link in itertools.product(temperatures(kind), kind.links):
        likelihood = resolve(kind.name, output_temperature=T).for_targets()
        for spread in spreads(kind, likelihood, link, cov):
            links = [likelihood.link(LinkApprox(link), 500, generator(0)) for _ in range(2)]
            found = likelihood.predictive_nll(mean, spread, y, links[0])
            if kind.classes is None:
                torch.testing.assert_close(found, -log_integral(kind, mean, spread, y, 1.0).sum(), rtol=1e-7, atol=0)
                continue
            probabilities = likelihood.probabilities(likelihood.predict(mean, spread, links[1]))
            assert_close(probabilities.sum(-1), torch.ones(len(probabilities)))
            assert_close(found, -probability_of(kind, probabilities, y).log().sum())


def brier(kind, probabilities: Tensor, y: Tensor) -> Tensor:
    label = torch.nn.functional.one_hot(kind.classes(y), probabilities.shape[1])
    return (probabilities - label).square().sum()


def crps(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """The integral of (F(z) - 1{z >= y})^2, F with the noise of targets, by the trapezoid rule on both sides of y."""
    std = (variance + 1).sqrt()
    total = torch.zeros(())
    for m, s, target in zip(mean.flatten(), std.flatten(), y.flatten(), strict=True):
        for edge, above in ((m - 12 * s, 0.0), (m + 12 * s, 1.0)):
            z = torch.linspace(float(target), float(edge), 20_001)
            cdf = torch.distributions.Normal(m, s).cdf(z)
            total = total + torch.trapezoid((cdf - above).square(), z).abs()
    return total


@everyone
def test_every_score_is_that_of_its_definition(kind, n_outputs):
    mean, cov = kind.moments(ROWS_OF_F, n_outputs)
    y, variance = kind.targets(mean), cov.diagonal(dim1=1, dim2=2)
    likelihood = resolve(kind.name).for_targets()
    link = likelihood.link(LinkApprox.PROBIT, 1, None)
    scores = likelihood.scores()
    assert scores["nll"](mean, cov, y, link) == likelihood.predictive_nll(mean, cov, y, link)
    for name, score in scores.items():
        if name == "ece":
            assert score is None
            assert likelihood.probabilities(likelihood.predict(mean, cov, link)).shape == (
                kind.classes(y).numel(),
                kind.n_classes(n_outputs),
            )
        elif name == "brier":
            probabilities = likelihood.probabilities(likelihood.predict(mean, cov, link))
            assert_close(score(mean, cov, y, link), brier(kind, probabilities, y))
        elif name == "crps":
            torch.testing.assert_close(score(mean, cov, y, link), crps(mean, variance, y), rtol=1e-6, atol=0)
            assert_close(score(mean, variance, y, link), score(mean, cov, y, link))
        else:
            assert name == "nll", "a score without a definition here"
    assert ("brier" in scores) == ("ece" in scores) == (kind.classes is not None)


@every_kind
def test_probabilities_are_refused_where_there_are_none(kind):
    if kind.classes is None:
        with pytest.raises(UnsupportedError, match=f"{kind.name}.*no class probabilities"):
            resolve(kind.name).probabilities(torch.ones(2, 1))


# -- energies ---------------------------------------------------------------------------------------------------------


def energies(kind: Kind, n_outputs: int, alpha: float, T: float, mean: Tensor, cov: Tensor, y: Tensor):
    """What the likelihood says and what integration says, without the normalizer."""
    likelihood = resolve(kind.name, temperature=T).for_targets()
    variances = likelihood.energy_asks(alpha) is Ask.VARIANCE
    spread = cov.diagonal(dim1=1, dim2=2) if variances else cov
    normalizer = likelihood.log_normalizer(1, n_outputs) / T
    integrated = log_integral(kind, mean, spread, y, alpha / T)
    truth = -integrated / (alpha or T) - normalizer
    return likelihood.energy(mean, spread, y, alpha), truth


@pytest.mark.every(4)
@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("alpha", ALPHAS)
@everyone
def test_energies_are_integrals(kind, n_outputs, alpha, T):
    mean, cov = kind.moments(ROWS_OF_F, n_outputs)
    cov = 0.1 * cov if kind.energy_error else cov
    found, truth = energies(kind, n_outputs, alpha, T, mean, cov, kind.targets(mean))
    assert found.shape == (ROWS_OF_F,)
    if kind.energy_error:
        assert float((found - truth).abs().max()) < kind.energy_error
        if alpha == 0:
            assert bool((found >= truth).all()), "it is an upper bound"
    else:
        torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
@exact_energies
def test_derivatives_of_exact_energies_are_those_of_the_integrals(kind, n_outputs, alpha):
    """Training follows them."""
    mean, cov = kind.moments(ROWS_OF_F, n_outputs)
    y = kind.targets(mean)
    slopes = []
    for which in (0, 1):
        at = mean.clone().requires_grad_(), cov.clone().requires_grad_()
        total = energies(kind, n_outputs, alpha, 1.5, *at, y)[which].sum()
        by_mean, by_cov = torch.autograd.grad(total, at)
        slopes.append((by_mean, 0.5 * (by_cov + by_cov.mT)))
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        assert float(theirs.abs().max()) > 1e-3


@pytest.mark.parametrize("alpha", ALPHAS)
@everyone
def test_energies_are_sampled_by_their_definition_or_refused(kind, n_outputs, alpha):
    f = kind.outputs(50 * ROWS_OF_F, n_outputs).reshape(50, ROWS_OF_F, n_outputs)
    y, likelihood = kind.targets(f[0]), resolve(kind.name, temperature=2.0).for_targets()
    if not kind.sampled_energy:
        with pytest.raises(UnsupportedError, match=f"mc_softmax_samples.*{kind.name}|{kind.name}.*mc_softmax_samples"):
            likelihood.check_sampled_energy()
        with pytest.raises(UnsupportedError, match="mc_softmax_samples"):
            likelihood.sampled_energy(f, y, alpha)
        return
    likelihood.check_sampled_energy()
    log_p = kind.log_density(f, y.expand(50, *y.shape)) / 2
    truth = -log_p.mean(0) if alpha == 0 else -(alpha * log_p).exp().mean(0).log() / alpha
    assert_close(likelihood.sampled_energy(f, y, alpha), truth)


# -- what has no meaning ----------------------------------------------------------------------------------------------


def has_a_meaning(kind: Kind, pred_type: str, link: str, joint: bool, diagonal: bool) -> bool:
    if link not in kind.links or (joint and (diagonal or pred_type == "nn" or link not in kind.joint)):
        return False
    if link in ("mf1", "mf2", "bridge", "bridge_norm") and pred_type == "nn":
        return False
    return link in kind.diagonal or not diagonal


@every_kind
def test_predictions_without_a_meaning_are_refused_by_name(kind):
    likelihood = resolve(kind.name)
    names = f"{kind.name}|link_approx|joint|diagonal_output|pred_type"
    for pred_type, link, joint, diagonal in itertools.product(
        ("glm", "nn"), PROBABILITY_LINKS, (False, True), (False, True)
    ):
        options = PredType(pred_type), LinkApprox(link)
        flags = {"joint": joint, "diagonal_output": diagonal, "fitting": None}
        if has_a_meaning(kind, pred_type, link, joint, diagonal):
            likelihood.check_prediction(*options, **flags)
        else:
            with pytest.raises(UnsupportedError, match=names):
                likelihood.check_prediction(*options, **flags)


@every_kind
def test_preferences_are_predicted_of_pairs_alone(kind):
    options = {"joint": False, "diagonal_output": False, "fitting": True}
    check = resolve(kind.name).check_prediction
    if kind.pairs:
        check(PredType.GLM, LinkApprox.PROBIT, **options)
    else:
        with pytest.raises(UnsupportedError, match=f"fitting=True.*{kind.name}"):
            check(PredType.GLM, LinkApprox.PROBIT, **options)


@every_kind
def test_noise_and_output_temperature_without_a_meaning_are_refused_by_name(kind):
    likelihood = resolve(kind.name)
    likelihood.check_noise(torch.ones(()))
    likelihood.check_output_temperature(1.0)
    expected = ("sigma_noise",) if kind.noise else ("output_temperature",) if kind.of_logits else ()
    assert likelihood.hyperparameters == expected
    refused = []
    if not kind.noise:
        refused += [
            (f"sigma_noise.*{kind.name}", lambda: likelihood.check_noise(torch.tensor(2.0))),
            (f"noise='scalar'.*{kind.name}", lambda: likelihood.beside_prior("scalar", None)),
            (f"{kind.name}.*observation noise", lambda: likelihood.residual_noise(torch.ones(()), 3)),
            (f"{kind.name}.*noise for each output", lambda: likelihood.weighing(torch.ones(2))),
        ]
    if not kind.of_logits:
        refused += [
            (f"output_temperature.*{kind.name}", lambda: likelihood.check_output_temperature(2.0)),
            (f"output_temperature.*{kind.name}", lambda: likelihood.beside_prior(None, True)),
        ]
    for says, call in refused:
        with pytest.raises(UnsupportedError, match=says):
            call()
    second = {"regression": "sigma_noise"}.get(kind.name, "output_temperature" if kind.of_logits else None)
    assert likelihood.beside_prior(None, None) == (second, 0 if second is None else 1)
    assert likelihood.beside_prior("keep", False) == (None, 0)


@every_kind
def test_it_takes_the_numbers_that_it_has(kind):
    found = resolve(kind.name, 0.5, 3.0, 2.0)
    assert float(found.temperature) == 3.0
    assert float(getattr(found, "sigma_noise", 0.5)) == 0.5
    assert float(getattr(found, "output_temperature", 2.0)) == 2.0
    assert hasattr(found, "sigma_noise") == kind.noise
    assert hasattr(found, "output_temperature") == kind.of_logits
    assert re.match(kind.name, found.described)


@every_kind
def test_only_classes_are_balanced(kind):
    check = resolve(kind.name).check_balanced
    if kind is KINDS["classification"]:
        check()
    else:
        with pytest.raises(UnsupportedError, match=f"balanced=True.*{kind.name}"):
            check()
