"""From Gaussians over logits to probabilities."""

import itertools
from functools import partial

import pytest
import torch

from laplace.enums import LinkApprox
from laplace.likelihoods import softmax as links
from laplace.likelihoods.draws import MAX_SOBOL, draw
from tests import reference
from tests.contracts import check_link, check_normalized_for_any_logits, generator
from tests.tools import assert_close, assert_within

SEEDED_MC = {n: lambda mean, cov, n=n: links.mc(mean, cov, n, generator(0)) for n in (1, 7, 300)}
EVERY_LINK = {
    "probit": links.probit,
    "mf1": links.mean_field_1,
    "mf2": links.mean_field_2,
    "bridge": links.bridge,
    "bridge_norm": links.bridge_norm,
    "mc, 1 sample": SEEDED_MC[1],
    "mc, 300 samples": SEEDED_MC[300],
}


def gaussian(n_rows: int, n_classes: int, *, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    noise = generator(0)
    root = torch.randn(n_rows, n_classes, n_classes, generator=noise)
    mean = size * torch.randn(n_rows, n_classes, generator=noise)
    return mean, root @ root.mT + 0.1 * torch.eye(n_classes)


@pytest.mark.parametrize(
    ("link", "formula"),
    [
        (links.probit, reference.probit),
        (links.mean_field_1, reference.mean_field_1),
        (links.mean_field_2, reference.mean_field_2),
        (links.bridge, reference.bridge),
        (links.bridge_norm, partial(reference.bridge, normalized=True)),
    ],
    ids=["probit", "mf1", "mf2", "bridge", "bridge_norm"],
)
def test_closed_forms_satisfy_the_contract(link, formula):
    check_link(link, formula)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("link", EVERY_LINK.values(), ids=EVERY_LINK)
def test_every_link_is_normalized_for_any_finite_logits(link, n_classes):
    check_normalized_for_any_logits(link, n_classes)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("link", EVERY_LINK.values(), ids=EVERY_LINK)
def test_every_link_is_normalized_when_there_is_no_uncertainty(link, n_classes):
    """A dead row of features before a head without bias: logits and covariance are exactly zero."""
    mean = torch.zeros(2, n_classes)
    mean[1, 0] = 2.0
    probabilities = link(mean, torch.zeros(2, n_classes, n_classes)).exp()
    assert_close(probabilities.sum(-1), torch.ones(2))
    assert_close(probabilities[0], torch.full((n_classes,), 1 / n_classes))


@pytest.mark.parametrize(
    "link", [links.probit, links.mean_field_1, links.mean_field_2, SEEDED_MC[7]], ids=["probit", "mf1", "mf2", "mc"]
)
def test_certain_logits_give_the_softmax(link):
    mean, _ = gaussian(5, 4)
    assert_close(link(mean, torch.zeros(5, 4, 4)).exp(), mean.softmax(-1))
    assert_close(link(mean, torch.zeros(5, 4)).exp(), mean.softmax(-1))


def test_probit_needs_variances_only():
    mean, cov = gaussian(5, 4)
    assert_close(links.probit(mean, cov.diagonal(dim1=1, dim2=2)), links.probit(mean, cov))
    assert LinkApprox.PROBIT in links.VARIANCE_LINKS


def test_mean_field_with_variances_is_that_of_independent_logits():
    mean, cov = gaussian(5, 4)
    variance = cov.diagonal(dim1=1, dim2=2)
    assert_close(links.mean_field_1(mean, cov), links.mean_field_1(mean, variance))
    assert_close(links.mean_field_2(mean, torch.diag_embed(variance)), links.mean_field_1(mean, variance))
    assert LinkApprox.MF1 in links.VARIANCE_LINKS
    assert LinkApprox.MF2 not in links.VARIANCE_LINKS


def test_mean_field_2_does_not_see_what_all_logits_share():
    """A constant added to all logits, certain or not, changes no probability."""
    mean, cov = gaussian(5, 4)
    shifted = links.mean_field_2(mean + 3.0, cov + 7.0)
    assert_close(shifted, links.mean_field_2(mean, cov))
    assert (links.mean_field_1(mean, cov + 7.0) - links.mean_field_1(mean, cov)).abs().max() > 0.1


def test_mean_field_2_is_nearest_where_logits_share_their_variance():
    """Lu, Ie & Sha (2020): of two and three classes, against the integral."""
    for n_classes in (2, 3):
        mean, cov = gaussian(20, n_classes)
        cov = 0.2 * cov + 4.0
        exact = reference.expected_softmax(mean, cov)
        errors = {
            name: (link(mean, cov).exp() - exact).abs().mean()
            for name, link in (("mf1", links.mean_field_1), ("mf2", links.mean_field_2), ("probit", links.probit))
        }
        assert errors["mf2"] < 0.02
        assert errors["mf2"] < 0.3 * min(errors["mf1"], errors["probit"])


def test_mean_field_of_many_classes_is_computed_in_chunks_of_rows(monkeypatch):
    mean, cov = gaussian(7, 5)
    whole = links.mean_field_2(mean, cov), links.mean_field_1(mean, cov)
    monkeypatch.setattr(links, "chunk_elements", lambda device: 50)  # two rows
    assert_close(links.mean_field_2(mean, cov), whole[0])
    assert_close(links.mean_field_1(mean, cov), whole[1])


def test_probit_is_near_the_exact_integral_for_two_classes_of_which_one_is_certain():
    """MacKay's approximation of E sigmoid(a), a ~ N(m, v): known to be within 0.02 of it."""
    mean = torch.linspace(-4, 4, 9)[:, None] * torch.tensor([1.0, 0.0])
    cov = torch.diag_embed(torch.tensor([3.0, 1e-12]).expand(9, 2))
    exact = reference.expected_softmax(mean, cov)
    kappa = (1 + torch.pi / 8 * 3.0) ** -0.5
    assert (links.probit(mean, cov).exp() - exact).abs().max() < 0.02
    assert_close(links.probit(mean, cov).exp()[:, 0], torch.sigmoid(kappa * mean[:, 0]))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_monte_carlo_converges_to_the_exact_integral(n_classes):
    mean, cov = gaussian(6, n_classes, size=2.0)
    exact = reference.expected_softmax(mean, cov)
    n = 20_000
    # The variance of a probability with mean p is at most p (1 - p).
    assert_within(links.mc(mean, cov, n, generator(1)).exp(), exact, (exact * (1 - exact) / n).sqrt(), "mc")
    variances = cov.diagonal(dim1=1, dim2=2)
    exact = reference.expected_softmax(mean, torch.diag_embed(variances))
    assert_within(links.mc(mean, variances, n, generator(1)).exp(), exact, (exact * (1 - exact) / n).sqrt(), "mc")


def test_sobol_points_have_less_than_half_of_the_error_of_independent_samples():
    """Root mean squared error over seeds, of 128 samples of ten logits."""
    noise = generator(0)
    mean, variance = 2 * torch.randn(8, 10, generator=noise), torch.full((8, 10), 2.0)
    exact = links.mc(mean, variance, 2**16, generator(99)).exp()

    def error(link):
        found = torch.stack([link(mean, variance, 128, generator(seed)).exp() - exact for seed in range(20)])
        return found.square().mean().sqrt()

    def independent(mean, variance, n_samples, generator):
        return links.average_softmax(draw(mean, variance, n_samples, generator), n_samples)

    assert error(links.mc) < 0.5 * error(independent)


def test_beyond_the_dimensions_of_sobol_points_samples_are_independent():
    mean = torch.zeros(1, MAX_SOBOL + 1)
    first = links.mc(mean, torch.ones_like(mean), 2, generator(0)).exp()
    drawn = torch.cat(list(draw(mean, torch.ones_like(mean), 2, generator(0))))
    assert_close(first, drawn.softmax(-1).mean(0))


def test_monte_carlo_is_reproducible_and_shares_its_samples_between_rows():
    mean, cov = gaussian(3, 4)
    first = links.mc(mean, cov, 10, generator(0))
    assert torch.equal(first, links.mc(mean, cov, 10, generator(0)))
    assert not torch.equal(first, links.mc(mean, cov, 10, generator(1)))
    torch.manual_seed(3)
    unseeded = links.mc(mean, cov, 10)
    torch.manual_seed(3)
    assert torch.equal(unseeded, links.mc(mean, cov, 10))
    twins = links.mc(mean[:1].expand(3, -1), cov[:1].expand(3, -1, -1), 10, generator(0))
    assert_close(twins, twins[:1].expand(3, -1))


def test_saturated_monte_carlo_keeps_finite_logs():
    """The average of softmaxes underflows in probabilities; in logs it does not."""
    log_probabilities = links.mc(torch.tensor([[0.0, 1e3, -1e3]]), torch.eye(3)[None], 50, generator(0))
    assert bool(torch.isfinite(log_probabilities).all())


@pytest.mark.parametrize("n_classes", [2, 3, 6])
def test_probabilities_flatten_as_logits_become_uncertain(n_classes):
    mean, _ = gaussian(5, n_classes)
    confidence = [links.probit(mean, torch.full_like(mean, v)).exp().max(-1).values for v in (0.0, 1.0, 10.0, 1e6)]
    assert all(bool((more > less).all()) for more, less in itertools.pairwise(confidence))
    assert (confidence[-1] - 1 / n_classes).abs().max() < 0.01


@pytest.mark.parametrize(
    "link",
    [links.probit, links.mean_field_1, links.mean_field_2, links.bridge, links.bridge_norm, SEEDED_MC[7]],
    ids=["probit", "mf1", "mf2", "bridge", "bridge_norm", "mc"],
)
def test_links_are_differentiable_in_mean_and_covariance(link):
    mean, root = gaussian(3, 3)

    def through_a_root(mean, root):
        return link(mean, root @ root.mT)

    assert torch.autograd.gradcheck(through_a_root, (mean.requires_grad_(), root.requires_grad_()))


def test_every_name_has_its_function():
    assert {name.value: function for name, function in links.LINKS.items()} == {
        "probit": links.probit,
        "mc": links.mc,
        "mf1": links.mean_field_1,
        "mf2": links.mean_field_2,
        "bridge": links.bridge,
        "bridge_norm": links.bridge_norm,
    }
