"""The Bradley-Terry likelihood of preferences between pairs."""

import pytest
import torch

from laplace.enums import CurvatureKind, LinkApprox
from laplace.errors import InputError, ShapeError
from laplace.likelihoods import BradleyTerryLikelihood, CategoricalLikelihood
from tests.contracts import check_likelihood
from tests.tools import assert_close

LIKELIHOOD = BradleyTerryLikelihood()
Y = torch.tensor([0, 1, 1, 0, 1])


def scores(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_bradley_terry_satisfies_the_contract():
    check_likelihood(LIKELIHOOD, scores(5, 2), Y)


def test_it_is_the_softmax_over_the_two_scores():
    f, softmax = scores(5, 2), CategoricalLikelihood()
    assert_close(LIKELIHOOD.nll(f, Y), softmax.nll(f, Y))
    assert_close(LIKELIHOOD.gradient(f, Y), softmax.gradient(f, Y))
    assert_close(LIKELIHOOD.hessian(f).dense(), softmax.hessian(f).dense())


def test_the_other_item_first_is_the_other_label():
    f = scores(5, 2)
    assert_close(LIKELIHOOD.nll(f.flip(-1), 1 - Y), LIKELIHOOD.nll(f, Y))
    assert_close(LIKELIHOOD.gradient(f.flip(-1), 1 - Y), LIKELIHOOD.gradient(f, Y).flip(-1))


def test_only_the_difference_of_the_scores_matters():
    f = scores(5, 2)
    assert_close(LIKELIHOOD.nll(f + 3, Y), LIKELIHOOD.nll(f, Y))
    assert_close(LIKELIHOOD.gradient(f, Y).sum(-1), torch.zeros(5))
    assert_close(LIKELIHOOD.hessian_root(f).sum(1), torch.zeros(5, 1))


@pytest.mark.parametrize("gap", [0.0, 1.0, 10.0, 25.0, 80.0, -25.0, -80.0])
def test_confident_float32_scores_keep_their_digits(gap):
    """1 - p has no digits left from a gap of 17 on; each quantity is right in proportion to its own size."""
    f, y = torch.tensor([[gap, 0.0], [0.0, gap]]), torch.tensor([0, 0])
    narrow = f.float()
    for of in (lambda f: -LIKELIHOOD.gradient(f, y), LIKELIHOOD.hessian_root, lambda f: LIKELIHOOD.hessian(f).diag()):
        torch.testing.assert_close(of(narrow).double(), of(f), rtol=1e-5, atol=0.0)
    for row, label in zip(narrow, y, strict=True):
        wide = torch.log1p((-(row[0] - row[1]).double()).exp())
        torch.testing.assert_close(LIKELIHOOD.nll(row[None], label[None]).double(), wide, rtol=1e-5, atol=0.0)
    p = torch.sigmoid(torch.tensor(gap))
    torch.testing.assert_close(LIKELIHOOD.hessian(f).diag()[0, 0], p * torch.sigmoid(torch.tensor(-gap)))


def test_extreme_scores_stay_finite():
    f = 1e4 * scores(5, 2).float()
    draws = LIKELIHOOD.sample_gradient(f, 3)
    for quantity in (LIKELIHOOD.nll(f, Y), LIKELIHOOD.gradient(f, Y), LIKELIHOOD.hessian(f).dense(), draws):
        assert bool(torch.isfinite(quantity).all())


def test_only_the_temperature_scales():
    likelihood = BradleyTerryLikelihood(temperature=4.0)
    for scale in (likelihood.scale, *map(likelihood.curvature_scale, CurvatureKind)):
        assert_close(torch.as_tensor(scale), torch.tensor(0.25))
    assert float(likelihood.log_normalizer(10, 2)) == 0.0


@pytest.mark.parametrize("shape", [(5, 2, 1), (5, 2), (10, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_scores_of_pairs_become_rows(shape, dtype):
    f = scores(5, 2)
    positions = LIKELIHOOD.flatten(f.reshape(shape), Y.to(dtype))
    assert_close(positions.f, f)
    assert positions.y.tolist() == Y.tolist()
    assert positions.y.dtype is torch.int64
    assert positions.kept is None
    assert positions.datum is None
    features = scores(5, 2, 3)
    assert_close(positions.select(features), features.reshape(5, 6))
    assert LIKELIHOOD.count(Y, 1) == 5


def test_a_head_is_seen_by_the_difference_of_features_and_its_bias_cancels():
    phi, theta = scores(5, 2, 3).double(), scores(7)[3:].double()

    def nll(theta):
        return LIKELIHOOD.nll((phi @ theta[:3] + theta[3]).reshape(5, 2), Y)

    positions = LIKELIHOOD.flatten((phi @ theta[:3] + theta[3]).unsqueeze(-1), Y)
    rows, constant = LIKELIHOOD.head_rows(positions, phi)
    ahead = rows @ theta[:3] + constant * theta[3]
    assert_close(LIKELIHOOD.nll(LIKELIHOOD.of_head(ahead.unsqueeze(-1)), Y), nll(theta))
    hessian = LIKELIHOOD.head_hessian(LIKELIHOOD.hessian(positions.f)).dense()
    J = torch.cat([rows, torch.full((5, 1), constant).double()], 1).unsqueeze(1)
    assert_close((J.mT @ hessian @ J).sum(0), torch.autograd.functional.hessian(nll, theta))
    assert not LIKELIHOOD.independent(True)


@pytest.mark.parametrize(
    ("f", "y", "error", "says"),
    [
        (scores(5, 1), Y, ShapeError, r"fitted on pairs.*scores \[5, 1\] and targets \[5\].*Stack the two items"),
        (scores(5, 3), Y, ShapeError, r"one score per item.*scores \[5, 3\]"),
        (scores(5, 2, 2), Y, ShapeError, r"one score per item.*scores \[5, 2, 2\]"),
        (scores(5, 3, 1), Y, ShapeError, r"scores \[5, 3, 1\]"),
        (scores(5, 2, 1), Y[:4], ShapeError, r"targets \[4\]"),
        (scores(5, 2, 1), Y[:, None], ShapeError, r"targets \[5, 1\]"),
        (scores(5, 2, 1), 2 * Y, InputError, r"0 or 1.*got 0\.\.2"),
        (scores(5, 2, 1), Y - 1, InputError, r"0 or 1.*got -1\.\.0"),
        (scores(5, 2, 1), Y.double(), InputError, r"integers.*float64.*y\.long"),
        (scores(5, 2, 1), Y.bool(), InputError, "integers.*bool"),
        (scores(5, 2, 1) / 0, Y, InputError, "outputs of the model must be finite"),
    ],
    ids=["single inputs", "three outputs", "two scores an item", "triples", "too few", "extra axis", "label 2", "label -1",
         "float", "bool", "infinite"],
)  # fmt: skip
def test_what_is_no_preference_is_refused(f, y, error, says):
    with pytest.raises(error, match=says):
        LIKELIHOOD.flatten(f, y)


def test_scores_are_predicted_as_they_are_and_pairs_through_the_link():
    link = lambda mean, cov: mean.log_softmax(-1)  # noqa: E731
    f, cov = scores(5, 2), torch.ones(5, 2)
    of_pairs = LIKELIHOOD.for_targets()
    assert_close(of_pairs.predict(f, cov, link), f.softmax(-1))
    assert_close(of_pairs.predictive_nll(f, cov, Y, link), LIKELIHOOD.nll(f, Y))
    mean, variance = LIKELIHOOD.predict(f[:, :1], cov[:, :1], LIKELIHOOD.link(LinkApprox.PROBIT, 1, None))
    assert mean.equal(f[:, :1])
    assert variance.equal(cov[:, :1])
    assert LIKELIHOOD.expectation(f).equal(f)
