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
    if kind.classes is None and kind.noise:
        y, mass = gaussian_grid(f, torch.full_like(f, 1.3**2), 30)
        wider = torch.distributions.Normal(f, 1.3).log_prob(y).sum(-1)
        total = torch.tensordot(mass, (kind.log_density(f.expand_as(y), y) - wider).exp(), 1)
    else:
        total = kind.expect(f, lambda f, y: torch.ones(len(f)))
    torch.testing.assert_close(total, torch.ones(4), rtol=0, atol=1e-6)


@everyone
def test_the_second_derivative_of_the_density_is_the_fisher_information_on_average(kind, n_outputs):
    f = kind.outputs(3, n_outputs, seed=5)
    likelihood = resolve(kind.name)

    def curvature(f, y):
        hessians = [
            torch.func.hessian(likelihood.nll)(row[None], target[None]) for row, target in zip(f, y, strict=True)
        ]
        return torch.stack([hessian.reshape(n_outputs, n_outputs) for hessian in hessians])

    # With these links to outputs it is the same for every target: some of the support are enough.
    for row in range(3):
        y = kind.support(f[row])[0][:3]
        for found in curvature(f[row].expand(len(y), -1), y):
            assert_close(found, kind.fisher(f[row : row + 1])[0], "second derivative")
