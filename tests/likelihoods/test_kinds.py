"""Every likelihood satisfies the contract that its density in `tests/likelihood_kinds.py` says."""

import pytest
import torch

from laplace.enums import Likelihood
from laplace.likelihoods import LIKELIHOODS, resolve
from tests.contracts import check_likelihood
from tests.likelihood_kinds import EVERY, KINDS, gaussian_grid
from tests.tools import assert_close

everyone = pytest.mark.parametrize(("kind", "n_outputs"), EVERY, ids=str)


def test_every_name_has_a_density():
    assert set(KINDS) == {member.value for member in Likelihood} == {str(name) for name in LIKELIHOODS}


@everyone
def test_the_contract_holds(kind, n_outputs):
    f = kind.outputs(4, n_outputs)
    check_likelihood(resolve(kind.name), f, kind.targets(f))


@everyone
def test_densities_of_the_table_sum_to_one(kind, n_outputs):
    """Of a continuous target: by a grid that is wider than the density."""
    f = kind.outputs(4, n_outputs)
    if kind.name.endswith("regression"):
        f = f if kind.noise else 0.3 * f
        center, std = kind.mean(f), 1.3
        y, mass = gaussian_grid(center, torch.full_like(center, std**2), 30)
        wider = torch.distributions.Normal(center, std).log_prob(y).sum(-1)
        total = torch.tensordot(mass, (kind.log_density(f.expand(len(y), *f.shape), y) - wider).exp(), 1)
    else:
        total = kind.expect(f, lambda f, y: torch.ones(len(f)))
    torch.testing.assert_close(total, torch.ones(4), rtol=0, atol=1e-6)


@everyone
def test_the_second_derivative_of_the_density_is_the_fisher_information_on_average(kind, n_outputs):
    f = kind.outputs(3, n_outputs, seed=5)
    likelihood = resolve(kind.name)

    def curvature(f, y):
        f = f.clone().requires_grad_()
        (slope,) = torch.autograd.grad(likelihood.nll(f, y), f, create_graph=True)
        rows = [torch.autograd.grad(slope[:, c].sum(), f, retain_graph=True)[0] for c in range(n_outputs)]
        return torch.stack(rows, 1)

    if not kind.canonical:
        assert_close(kind.expect(f, curvature), kind.fisher(f), "second derivative")
        return
    # With these links to outputs it is the same for every target: some of the support are enough.
    for row in range(3):
        y = kind.support(f[row])[0][:3]
        for found in curvature(f[row].expand(len(y), -1), y):
            assert_close(found, kind.fisher(f[row : row + 1])[0], "second derivative")
