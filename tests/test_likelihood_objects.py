"""`likelihood=` takes an object as well as a name, and one of a user's own."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradHessian, BackPackGGN
from laplace.errors import StateError, UnsupportedError
from laplace.likelihoods import (
    BernoulliLikelihood,
    BradleyTerryLikelihood,
    CategoricalLikelihood,
    GaussianLikelihood,
    HeteroscedasticLikelihood,
    MultiLabelLikelihood,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
    register,
)
from tests.kinds import data, network
from tests.tools import assert_close


@dataclass(frozen=True)
class Damped(PoissonLikelihood):
    """Counts, and a number of its own."""

    strength: float = 1.0

    name: ClassVar[str] = "damped_counts"


def counts():
    x, y = data()
    return [(x, y.exp().round())]


@pytest.mark.parametrize(
    "likelihood",
    [
        CategoricalLikelihood(),
        GaussianLikelihood(),
        BradleyTerryLikelihood(),
        BernoulliLikelihood(),
        PoissonLikelihood(),
        MultiLabelLikelihood(),
        NegativeBinomialLikelihood(),
        HeteroscedasticLikelihood(),
    ],
    ids=lambda likelihood: likelihood.name,
)
def test_an_object_is_its_name(likelihood):
    la = Laplace(network(), likelihood)
    assert la.likelihood == likelihood.name
    assert isinstance(la.likelihood, str)
    assert str(la.likelihood) == likelihood.name
    assert type(la.likelihood_) is type(likelihood)


def test_numbers_of_an_object_are_those_of_the_estimator():
    x, y = data()
    objects = [
        Laplace(network(), GaussianLikelihood(torch.tensor(0.5), temperature=2.0)),
        Laplace(network(), "regression", sigma_noise=0.5, temperature=2.0),
    ]
    for la in objects:
        la.fit([(x, y)])
    first, second = objects
    assert float(first.sigma_noise) == 0.5
    assert first.temperature == 2.0
    assert_close(first.log_marginal_likelihood(), second.log_marginal_likelihood())
    assert Laplace(network(), CategoricalLikelihood(output_temperature=3.0)).output_temperature == 3.0
    first.sigma_noise = 0.7
    assert float(first.likelihood_.sigma_noise) == pytest.approx(0.7)


@pytest.mark.parametrize("option", [{"sigma_noise": 0.3}, {"temperature": 3.0}], ids=str)
def test_a_number_in_both_places_is_refused(option):
    likelihood = GaussianLikelihood(torch.tensor(0.5), temperature=2.0)
    with pytest.raises(UnsupportedError, match=f"{next(iter(option))} is given twice"):
        Laplace(network(), likelihood, **option)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_likelihood_of_a_user_is_used_saved_and_known_by_name(subset, tmp_path):
    x = data()[0]
    la, ours = (Laplace(network(), likelihood, subset) for likelihood in (Damped(strength=2.0), "poisson"))
    for each in (la, ours):
        each.fit(counts())
    assert la.likelihood == "damped_counts"
    for mine, theirs in zip(la(x), ours(x), strict=True):
        assert_close(mine, theirs)
    assert_close(la.log_marginal_likelihood(), ours.log_marginal_likelihood())
    assert pickle.loads(pickle.dumps(la)).likelihood_ == la.likelihood_
    la.save(tmp_path / "state.pt")
    again = Laplace(network(), Damped(strength=2.0), subset)
    again.load(tmp_path / "state.pt")
    assert_close(again(x)[1], la(x)[1])
    with pytest.raises(StateError, match=r"damped_counts\(strength=2\.0\).*damped_counts\(strength=1\.0\)"):
        Laplace(network(), "damped_counts", subset).load(tmp_path / "state.pt")


@pytest.mark.parametrize("backend", [AutogradHessian, BackPackGGN], ids=lambda cls: cls.__name__)
def test_back_ends_that_need_more_than_the_likelihood_says_refuse_it(backend):
    la = Laplace(network(), Damped(), "all", "diag", backend=backend)
    with pytest.raises(UnsupportedError, match="damped_counts"):
        la.fit(counts())


def test_two_classes_with_one_name_and_classes_without_are_refused():
    @dataclass(frozen=True)
    class Other(PoissonLikelihood):
        name: ClassVar[str] = "damped_counts"

    @dataclass(frozen=True)
    class Nameless(PoissonLikelihood):
        pass

    register(Damped)
    with pytest.raises(UnsupportedError, match="Damped is the likelihood with the name 'damped_counts'"):
        Laplace(network(), Other())
    for cls in (Nameless, nn.Linear):
        with pytest.raises(UnsupportedError, match="with a name of its own"):
            register(cls)
